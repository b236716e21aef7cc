"""Experts that the device fetches: the bits of resident ones, the host's decisions, CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

from gpu_layers import Buffer, make_attributes, make_input, make_layer, run, same_bits  # noqa: E402
from gpu_threads import in_threads  # noqa: E402

from layer_models import NUMPY  # noqa: E402
from moe_infer.op import DTYPES, SUBLAYERS  # noqa: E402

pytestmark = pytest.mark.needs_library
Array = np.ndarray[Any, Any]
EXPERTS, D_MODEL, HIDDEN = 16, 64, 96
WITH_WEIGHTS = [name for name, sublayer in SUBLAYERS.items() if sublayer.tensors]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def attributes_of(folder: Path, sublayer: str, dtype: str, slots: int, **more: Any) -> Any:
    size = (EXPERTS, D_MODEL, HIDDEN)
    made = make_attributes(folder, sublayer, "softmax_topk", *size, 2, dtype, **more)
    return {**made, "max_concurrency": slots}


def logits_for(*experts: tuple[int, ...], dtype: str = "float32") -> Array:
    """Router logits of tokens, each of which chooses these experts, the first one most."""
    logits = np.full((len(experts), EXPERTS), -4.0)
    for token, chosen in enumerate(experts):
        logits[token, list(chosen)] = 2 - 0.5 * np.arange(len(chosen))
    return logits.astype(NUMPY[dtype])


def random_choices(seed: int, tokens: int) -> list[tuple[int, ...]]:
    """Skewed, so that some experts come back often."""
    rng = np.random.default_rng(seed)
    likely = 1.0 / (1 + np.arange(EXPERTS))
    likely /= likely.sum()
    return [tuple(rng.choice(EXPERTS, 2, replace=False, p=likely)) for _ in range(tokens)]


def when_resident(attributes: dict[str, Any], inputs: list[Array], dtype: str) -> list[Array]:
    """Outputs of the layer with all its experts in GPU memory: what its streaming must give."""
    whole = {**attributes, "max_concurrency": attributes["expert_count"]}
    with make_layer(whole, inputs[0].shape[-1], dtype) as layer:
        return [run(layer, x) for x in inputs]


@pytest.fixture(params=["device", "host", "auto"])
def fetch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MOE_INFER_FETCH", request.param)
    yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", WITH_WEIGHTS)
def test_the_device_gives_the_bits_of_resident_experts(
    folder: Path, sublayer: str, dtype: str, fetch: str
) -> None:
    """1 token, few, and more than the slots can hold at once, which the host then fetches."""
    inputs = [
        make_input(tokens, D_MODEL, dtype, seed=s) for s in (1, 2) for tokens in (1, 3, 1, 40)
    ]
    expected = when_resident(attributes_of(folder, sublayer, dtype, 6), inputs, dtype)
    for slots in (6, 15):
        with make_layer(attributes_of(folder, sublayer, dtype, slots), D_MODEL, dtype) as layer:
            for i, (x, right) in enumerate(zip(inputs, expected, strict=True)):
                assert same_bits(run(layer, x), right), f"{slots} slots, input {i}"


@pytest.mark.parametrize("policy", ["", "lru", "lfu"])
def test_the_device_decides_as_the_host_does(
    folder: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_INFER_POLICY", policy)
    made = attributes_of(folder, "Gated_SiLU", "bfloat16", 6, centroids=False)
    calls = [random_choices(seed, 1 + seed % 3) for seed in range(80)]
    told: dict[str, list[Any]] = {}
    for mode in ("host", "device"):
        monkeypatch.setenv("MOE_INFER_FETCH", mode)
        with make_layer(made, D_MODEL, "bfloat16", "float32") as layer:
            found = []
            for chosen in calls:
                run(layer, make_input(len(chosen), D_MODEL, "bfloat16"), logits_for(*chosen))
                stats = layer.stats()
                found.append((stats.hits, stats.misses, stats.evictions, stats.bytes_fetched))
            told[mode] = found
    assert told["device"] == told["host"]
    assert told["host"][-1][1] > 20


def test_host_and_device_take_turns_on_one_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long runs, which the host drives, between short ones: each finds what the other brought."""
    monkeypatch.setenv("MOE_INFER_FETCH", "auto")
    made = attributes_of(folder, "Gated_SiLU", "float16", 6, centroids=False)
    long_run = [(e, (e + 1) % 4) for e in range(4)] * 25  # 100 tokens, experts 0 to 3
    with make_layer(made, D_MODEL, "float16", "float32") as layer:

        def misses(chosen: list[tuple[int, ...]]) -> int:
            before = layer.stats().misses
            run(layer, make_input(len(chosen), D_MODEL, "float16"), logits_for(*chosen))
            return layer.stats().misses - before

        assert misses(long_run) == 4
        assert misses([(0, 3)]) == 0
        assert misses([(8, 9)]) == 2
        assert misses(long_run) == 0
        assert misses([(8, 9)]) == 0
        assert misses([(0, 1), (2, 3), (8, 9)]) == 0


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", WITH_WEIGHTS)
def test_a_cuda_graph_of_a_layer_that_streams(
    folder: Path, sublayer: str, dtype: str, tokens: int
) -> None:
    """Replays choose other experts each time, and find them."""
    made = attributes_of(folder, sublayer, dtype, 6)
    inputs = [make_input(tokens, D_MODEL, dtype, seed) for seed in range(12)]
    expected = when_resident(made, inputs, dtype)
    with make_layer(made, D_MODEL, dtype) as layer:
        size = inputs[0].nbytes
        x, y = Buffer(size, inputs[0]), Buffer(size)
        workspace = Buffer(layer.workspace(tokens))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream().cuda_stream
            layer.run(x.address, None, y.address, tokens, workspace.address, workspace.size, stream)
        for turn in range(2):
            for i, (given, right) in enumerate(zip(inputs, expected, strict=True)):
                x.bytes.copy_(Buffer(size, given).bytes)
                graph.replay()
                torch.cuda.synchronize()
                assert same_bits(y.array(NUMPY[dtype], given.shape), right), f"{turn}, {i}"
            # A run of its own between replays.
            assert same_bits(run(layer, inputs[3]), expected[3])
        for name, buffer in {"x": x, "y": y, "workspace": workspace}.items():
            buffer.check_guards(name)
        assert layer.stats().misses >= EXPERTS - 6


def test_kernels_and_the_host_take_turns_as_misses_come_and_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts large enough that the ways to copy them are measured; while all are hits kernels do
    it, and after some misses the host."""
    monkeypatch.setenv("MOE_INFER_FETCH", "auto")
    made = make_attributes(
        folder, "Gated_SiLU", "softmax_topk", 16, 1024, 1024, 2, "bfloat16", centroids=False
    )
    x = make_input(1, 1024, "bfloat16")
    rarely = [(0, 1), (2, 3)] * 30
    often = [(e % 16, (e + 5) % 16) for e in range(60)]
    with (
        make_layer(made, 1024, "bfloat16", "float32") as whole,
        make_layer({**made, "max_concurrency": 4}, 1024, "bfloat16", "float32") as layer,
    ):
        for i, chosen in enumerate(rarely + often + rarely + often):
            logits = logits_for(chosen)
            assert same_bits(run(layer, x, logits), run(whole, x, logits)), i
        assert layer.stats().misses > 60


@pytest.mark.parametrize("mode", ["device", "host"])
def test_larger_experts_arrive_whole(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many chunks, with a rest of less than 16 bytes, and products that begin while others come."""
    monkeypatch.setenv("MOE_INFER_FETCH", mode)
    made = make_attributes(
        folder, "Gated_SiLU", "softmax_topk", 12, 512, 1024, 2, "bfloat16", expert_bias=1
    )
    inputs = [make_input(tokens, 512, "bfloat16", seed) for seed in range(15) for tokens in (1, 4)]
    expected = when_resident(made, inputs, "bfloat16")
    with make_layer({**made, "max_concurrency": 8}, 512, "bfloat16") as layer:
        for i, (x, right) in enumerate(zip(inputs, expected, strict=True)):
            assert same_bits(run(layer, x), right), i
        stats = layer.stats()
    assert stats.misses > 20
    assert stats.stall_ns > 0


def test_one_layer_from_two_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_INFER_FETCH", "auto")
    made = attributes_of(folder, "Gated_SiLU", "float16", 6)
    inputs = [make_input(tokens, D_MODEL, "float16", tokens) for tokens in (1, 2, 90)]
    expected = when_resident(made, inputs, "float16")
    with make_layer(made, D_MODEL, "float16") as layer:

        def work(thread: int) -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for turn in range(60):
                    i = (turn + thread) % 3
                    assert same_bits(run(layer, inputs[i], stream=stream), expected[i])

        in_threads(3, work)


def test_a_run_that_waits_disturbs_no_capture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for a plan behind long work, while another thread captures a graph."""
    monkeypatch.setenv("MOE_INFER_FETCH", "host")
    made = attributes_of(folder, "Gated_SiLU", "float16", 6, centroids=False)
    x = make_input(1, D_MODEL, "float16")
    calls = [logits_for((e, e + 1)) for e in range(0, 12, 2)]
    with make_layer({**made, "max_concurrency": EXPERTS}, D_MODEL, "float16", "float32") as layer:
        expected = [run(layer, x, logits) for logits in calls]
    captured, ran = threading.Event(), threading.Event()
    a = torch.ones(4, device="cuda")
    torch.cuda._sleep(1)  # loads its kernel

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            b = a + 1
            captured.set()
            ran.wait(30)
        graph.replay()
        torch.cuda.synchronize()
        assert b.tolist() == [2.0] * 4

    with make_layer(made, D_MODEL, "float16", "float32") as layer:
        given = [(Buffer(x.nbytes, x), Buffer(c.nbytes, c), Buffer(x.nbytes)) for c in calls]
        workspace = Buffer(layer.workspace(1))
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()

        def work(thread: int) -> None:
            if thread == 0:
                return capture()
            captured.wait(30)
            try:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(20_000_000)
                for hidden, logits, output in given:
                    layer.run(
                        hidden.address,
                        logits.address,
                        output.address,
                        1,
                        workspace.address,
                        workspace.size,
                        stream.cuda_stream,
                    )
            finally:
                ran.set()

        in_threads(2, work)
        torch.cuda.synchronize()
        for (_, _, output), right in zip(given, expected, strict=True):
            assert same_bits(output.array(NUMPY["float16"], x.shape), right)


@pytest.mark.parametrize(
    ("environment", "form", "message"),
    [
        ({"MOE_INFER_FETCH": "gpu"}, "safetensors stacked", "must be auto, host or device"),
        ({}, "npz deflated", "another type or row order"),
        ({"MOE_INFER_PINNED_BYTES": "0"}, "safetensors stacked", "MOE_INFER_PINNED_BYTES"),
    ],
)
def test_what_the_device_cannot_fetch_is_said(
    folder: Path,
    environment: dict[str, str],
    form: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MOE_INFER_FETCH": "device", **environment}.items():
        monkeypatch.setenv(name, value)
    made = attributes_of(folder, "Gated_SiLU", "float16", 6, form=form)
    with pytest.raises(ValueError, match=message):
        make_layer(made, D_MODEL, "float16")


@pytest.mark.sanitize
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small(folder: Path, dtype: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_INFER_FETCH", "device")
    made = attributes_of(folder, "Gated_SiLU", dtype, 6, centroids=False)
    with make_layer(made, D_MODEL, dtype, "float32") as layer:
        for seed in range(6):
            x = make_input(tokens, D_MODEL, dtype, seed)
            run(layer, x, logits_for(*random_choices(seed, tokens)))
        x[0, 0] = np.nan
        run(layer, x, logits_for(*random_choices(0, tokens)))
