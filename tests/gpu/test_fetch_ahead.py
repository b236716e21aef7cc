"""Fetching ahead: the bits of resident experts, whatever was guessed, and what is counted."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

from gpu_layers import make_attributes, make_input, make_layer  # noqa: E402
from gpu_threads import in_threads  # noqa: E402

from moe_infer.runtime.native import Layer, NextLogits  # noqa: E402

pytestmark = pytest.mark.needs_library
LAYERS, EXPERTS, TOP_K, SLOTS = 4, 16, 4, 9
DTYPE = "bfloat16"
SMALL, LARGE = (64, 96), (1024, 3072)
"""(d_model, hidden_size): an expert of one piece, and of 18 MB, whose blocks fill an H200."""


@pytest.fixture(autouse=True)
def by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_INFER_FETCH", "host")


class Model:
    """Layers on one stream, with or without guesses.

    Args:
        attributes: of every layer.
        d_model: of their input.
    """

    def __init__(self, attributes: dict[str, Any], d_model: int) -> None:
        self.layers = [make_layer(attributes, d_model, DTYPE, "float32") for _ in range(LAYERS)]
        self.stream = torch.cuda.Stream()
        size = self.layers[0].workspace(1)
        self._workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._x = torch.from_numpy(make_input(1, d_model, "float32")).cuda().to(torch.bfloat16)

    def run(self, chosen: Any, guessed: Any = None) -> Any:
        """Outputs (LAYERS, d_model) of a token whose layers choose, and guess, these experts.

        Args:
            chosen: (LAYERS, TOP_K).
            guessed: (LAYERS, TOP_K) of the layer itself, by the one before it; None: no guesses.
        """
        with torch.cuda.stream(self.stream):
            logits = logits_of(chosen)
            guesses = None if guessed is None else logits_of(guessed)
            outputs = self.outputs()
            for i, layer in enumerate(self.layers):
                following = None
                if guesses is not None and i + 1 < LAYERS:
                    following = NextLogits(guesses[i + 1].data_ptr(), EXPERTS, "float32")
                self.launch(layer, logits[i], outputs[i], following)
            self.stream.synchronize()
        return outputs

    def launch(self, layer: Layer, logits: Any, output: Any, following: NextLogits | None) -> None:
        """One layer, on the current stream."""
        layer.run(
            self._x.data_ptr(),
            logits.data_ptr(),
            output.data_ptr(),
            1,
            self._workspace.data_ptr(),
            len(self._workspace),
            torch.cuda.current_stream().cuda_stream,
            following,
        )

    def outputs(self) -> Any:
        """(LAYERS, d_model), of NaN."""
        shape = (LAYERS, self._x.shape[1])
        return torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")

    def count(self, name: str) -> int:
        return sum(getattr(layer.stats(), name) for layer in self.layers)


def logits_of(chosen: Any) -> Any:
    """(LAYERS, EXPERTS) float32 on the device."""
    logits = np.full((LAYERS, EXPERTS), -4.0, np.float32)
    np.put_along_axis(logits, np.asarray(chosen), [2.0, 1.5, 1.0, 0.5], axis=1)
    return torch.from_numpy(logits).cuda()


def choices(seed: int, runs: int) -> Any:
    """(runs, LAYERS, TOP_K), each token's experts different ones."""
    rng = np.random.default_rng(seed)
    scores = rng.random((runs, LAYERS, EXPERTS))
    return np.argsort(scores, axis=-1)[..., :TOP_K]


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    d_model, hidden = getattr(request, "param", SMALL)
    size = (EXPERTS, d_model, hidden)
    return make_attributes(
        tmp_path, "Gated_SiLU", "softmax_topk", *size, TOP_K, DTYPE, centroids=False
    )


def open_models(stack: ExitStack, made: dict[str, Any], d_model: int) -> tuple[Model, Model]:
    """One that streams, and one whose experts all stay."""
    models = []
    for slots in (SLOTS, EXPERTS):
        model = Model({**made, "max_concurrency": slots}, d_model)
        for layer in model.layers:
            stack.enter_context(layer)
        models.append(model)
    return models[0], models[1]


@pytest.mark.sanitize
@pytest.mark.parametrize("guess", ["right", "wrong", "half"])
def test_a_small_expert(made: dict[str, Any], guess: str) -> None:
    check_bits(made, SMALL[0], guess, runs=12)


@pytest.mark.parametrize("made", [LARGE], indirect=True)
@pytest.mark.parametrize("guess", ["right", "wrong", "half"])
def test_an_expert_of_many_pieces(made: dict[str, Any], guess: str) -> None:
    check_bits(made, LARGE[0], guess, runs=60)


def check_bits(made: dict[str, Any], d_model: int, guess: str, runs: int) -> None:
    """Outputs are those of resident experts; guesses are counted as what they are."""
    chosen = choices(1, runs)
    other = choices(2, runs)
    guessed = {"right": chosen, "wrong": other, "half": np.where(runs_odd(runs), chosen, other)}
    with ExitStack() as stack:
        streams, resident = open_models(stack, made, d_model)
        for i in range(runs):
            found = streams.run(chosen[i], guessed[guess][i])
            assert torch.equal(found, resident.run(chosen[i])), f"run {i}"
        used, wasted = streams.count("prefetches_used"), streams.count("prefetches_wasted")
        misses, slot_bytes = streams.count("misses"), expert_bytes(streams)
        waste = streams.count("prefetch_bytes_wasted")
        assert streams.count("bytes_fetched") == misses * slot_bytes + waste
        assert streams.count("prefetch_bytes_used") <= used * slot_bytes
        if guess == "right":
            assert used > runs  # of 3 layers each, and the first run knows no order
            assert wasted == waste == 0
        else:
            assert wasted > 0
            assert guess == "wrong" or used > 0


def runs_odd(runs: int) -> Any:
    return (np.arange(runs) % 2 == 1)[:, None, None]


def expert_bytes(model: Model) -> int:
    """What a miss brings: a slot without its gaps, of which these sizes have none."""
    return model.layers[0].report().slot_bytes


def test_guesses_that_are_wrong_end(made: dict[str, Any]) -> None:
    """A third of them has to be right; the others cost the bus."""
    runs = 150
    chosen, other = choices(1, runs), choices(2, runs)
    with ExitStack() as stack:
        streams, _ = open_models(stack, made, SMALL[0])
        for i in range(runs // 2):
            streams.run(chosen[i], other[i])
        before = streams.count("prefetches_wasted") + streams.count("prefetches_used")
        for i in range(runs // 2, runs):
            streams.run(chosen[i], other[i])
        after = streams.count("prefetches_wasted") + streams.count("prefetches_used")
        assert before > 0
        assert after - before < before / 2
        # They are watched, and come again when they are right.
        for i in range(runs):
            streams.run(chosen[i], chosen[i])
        assert streams.count("prefetches_used") > runs


def test_without_guesses_nothing_is_fetched_ahead(made: dict[str, Any]) -> None:
    with ExitStack() as stack:
        streams, _ = open_models(stack, made, SMALL[0])
        for chosen in choices(1, 10):
            streams.run(chosen)
        assert streams.count("prefetches_used") == streams.count("prefetches_wasted") == 0


@pytest.mark.parametrize("made", [LARGE], indirect=True)
def test_models_in_threads(made: dict[str, Any]) -> None:
    """They share the place for guesses, and take it from each other."""
    runs, threads = 60, 3
    with ExitStack() as stack:
        pairs = [open_models(stack, made, LARGE[0]) for _ in range(threads)]

        def work(thread: int) -> None:
            streams, resident = pairs[thread]
            chosen = choices(10 + thread, runs)
            for i in range(runs):
                found = streams.run(chosen[i], chosen[i])
                assert torch.equal(found, resident.run(chosen[i])), f"thread {thread}, run {i}"

        in_threads(threads, work)
        assert sum(streams.count("prefetches_used") for streams, _ in pairs) > 0


@pytest.mark.parametrize("made", [LARGE], indirect=True)
def test_a_layer_that_goes_while_it_is_guessed_for(made: dict[str, Any]) -> None:
    chosen = choices(1, 6)
    with ExitStack() as stack:
        streams, resident = open_models(stack, made, LARGE[0])
        for i in range(3):
            streams.run(chosen[i], chosen[i])
        first, second = streams.layers[0], streams.layers[1]
        run_alone(streams, first, chosen[3])
        second.close()  # pieces of its expert are on their way
        attributes = {**made, "max_concurrency": SLOTS}
        streams.layers[1] = stack.enter_context(make_layer(attributes, LARGE[0], DTYPE, "float32"))
        for i in range(6):
            assert torch.equal(streams.run(chosen[i], chosen[i]), resident.run(chosen[i]))


def run_alone(model: Model, layer: Layer, chosen: Any) -> None:
    """Only the first layer, with a guess for the second."""
    logits = logits_of(chosen)
    following = NextLogits(logits[1].data_ptr(), EXPERTS, "float32")
    model.launch(layer, logits[0], model.outputs()[0], following)
    torch.cuda.synchronize()


def test_a_wrong_number_of_experts_is_no_guess(made: dict[str, Any]) -> None:
    """Whoever runs next has another router than the one that was asked."""
    chosen = choices(1, 4)
    with ExitStack() as stack:
        streams, resident = open_models(stack, made, SMALL[0])
        for row in chosen:
            found = run_with(streams, row, NextLogits(logits_of(row).data_ptr(), 3, "float32"))
            assert torch.equal(found, resident.run(row))
        assert streams.count("prefetches_used") == 0


def run_with(model: Model, chosen: Any, following: NextLogits) -> Any:
    """Every layer is given the same."""
    logits = logits_of(chosen)
    outputs = model.outputs()
    for i, layer in enumerate(model.layers):
        model.launch(layer, logits[i], outputs[i], following)
    torch.cuda.synchronize()
    return outputs


def test_a_type_that_is_none(made: dict[str, Any]) -> None:
    with ExitStack() as stack:
        streams, _ = open_models(stack, made, SMALL[0])
        row = choices(1, 1)[0]
        with pytest.raises(ValueError, match="next_router_logits must be float32"):
            run_with(streams, row, NextLogits(1024, EXPERTS, "int8"))
