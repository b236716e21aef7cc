"""One layer through the C entry against the float64 reference; residency must change nothing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

from gpu_layers import (  # noqa: E402
    Buffer,
    decided,
    make_attributes,
    make_input,
    make_layer,
    reference,
    run,
    same_bits,
)
from gpu_threads import in_threads  # noqa: E402

from layer_models import (  # noqa: E402
    FORMATS,
    NUMPY,
    TOLERANCES,
    assert_close,
    config_of,
    layer_attributes,
    make_parts,
    write_experts,
)
from moe_infer.op import DTYPES, ROUTERS, SUBLAYERS  # noqa: E402
from moe_infer.weights import WeightFileError  # noqa: E402
from router_options import SIGMOID_OPTIONS  # noqa: E402

pytestmark = pytest.mark.needs_library
TOKENS = (0, 1, 2, 7, 128, 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def top_k_of(router: str) -> int:
    return 1 if ROUTERS[router].single_expert else 2


# --- Against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_sublayer_router_type(folder: Path, sublayer: str, router: str, dtype: str) -> None:
    attributes = make_attributes(folder, sublayer, router, 8, 64, 96, top_k_of(router), dtype)
    x = make_input(33, 64, dtype)
    with make_layer(attributes, 64, dtype) as layer:
        assert_close(run(layer, x), reference(attributes, x), dtype)


@pytest.mark.parametrize("logits_dtype", ["float32", "same"])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "cpm_2"])
def test_router_logits(
    folder: Path, router: str, dtype: str, normalize: int, logits_dtype: str
) -> None:
    kind = dtype if logits_dtype == "same" else logits_dtype
    attributes = make_attributes(
        folder,
        "Gated_SiLU",
        router,
        8,
        64,
        96,
        top_k_of(router),
        dtype,
        centroids=False,
        normalize_routing_weights=normalize,
    )
    x, logits = make_input(33, 64, dtype), make_input(33, 8, kind, seed=2)
    with make_layer(attributes, 64, dtype, kind) as layer:
        assert_close(run(layer, x, logits), reference(attributes, x, logits), dtype)


@pytest.mark.parametrize("slots", [1, 2, "all"])
@pytest.mark.parametrize("experts", [1, 2, 20, 128])
@pytest.mark.parametrize(("sublayer", "dtype"), [("T5_FF", "float32"), ("Gated_SiLU", "float16")])
def test_tokens_experts_slots(
    folder: Path, sublayer: str, dtype: str, experts: int, slots: int | str
) -> None:
    top_k = min(experts, 2)
    attributes = make_attributes(folder, sublayer, "softmax_topk", experts, 32, 48, top_k, dtype)
    attributes["max_concurrency"] = experts if slots == "all" else slots
    with make_layer(attributes, 32, dtype) as layer:
        for tokens in TOKENS:
            x = decided(attributes, make_input(tokens, 32, dtype))
            assert_close(run(layer, x), reference(attributes, x), dtype)


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "hidden"), [(36, 52), (33, 7), (1, 1), (512, 1024)])
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU"])
def test_sizes(
    folder: Path, sublayer: str, d_model: int, hidden: int, dtype: str, slots: int
) -> None:
    attributes = make_attributes(
        folder,
        sublayer,
        "softmax_topk",
        5,
        d_model,
        hidden,
        2,
        dtype,
        max_concurrency=slots,
    )
    with make_layer(attributes, d_model, dtype) as layer:
        for tokens in (1, 3, 150):
            x = make_input(tokens, d_model, dtype)
            assert_close(run(layer, x), reference(attributes, x), dtype)


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file_dtype", DTYPES)
def test_type_and_format_of_the_file(
    folder: Path, file_dtype: str, dtype: str, form: str, slots: int
) -> None:
    attributes = make_attributes(
        folder,
        "T5_FF",
        "default",
        5,
        40,
        24,
        dtype=file_dtype,
        form=form,
        max_concurrency=slots,
    )
    x = make_input(50, 40, dtype)
    with make_layer(attributes, 40, dtype) as layer:
        assert_close(run(layer, x), reference(attributes, x), dtype)


@pytest.mark.parametrize("slots", [1, 6])
@pytest.mark.parametrize("expert", [0, 5])
def test_all_tokens_to_one_expert(folder: Path, expert: int, slots: int) -> None:
    attributes = make_attributes(
        folder, "T5_FF", "default", 6, 32, 48, centroids=False, max_concurrency=slots
    )
    x = make_input(300, 32, "float32")
    logits = np.zeros((300, 6), np.float32)
    logits[:, expert] = 1
    with make_layer(attributes, 32, "float32", "float32") as layer:
        found = run(layer, x, logits)
        stats = layer.stats()
    assert_close(found, reference(attributes, x, logits), "float32")
    if slots == 1:
        # The others cost nothing.
        assert (stats.hits, stats.misses, stats.evictions) == (0, 1, 0)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "cpm_2"])
def test_ties_go_to_the_lower_expert(folder: Path, router: str) -> None:
    attributes = make_attributes(
        folder, "Gated_SiLU", router, 70, 32, 48, top_k_of(router), centroids=False
    )
    if router == "sigmoid_topk":
        attributes["router_bias"] = [0.0] * 70
    x = make_input(64, 32, "float32")
    logits = np.random.default_rng(3).integers(0, 3, (64, 70)).astype(np.float32)
    logits[0] = 0
    with make_layer(attributes, 32, "float32", "float32") as layer:
        assert_close(run(layer, x, logits), reference(attributes, x, logits), "float32")


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_nan_and_infinity_stay_where_they_are(
    folder: Path, sublayer: str, dtype: str, slots: int
) -> None:
    """A bad token gets what the reference gives; the others are as without it."""
    attributes = make_attributes(
        folder, sublayer, "softmax_topk", 8, 64, 96, 2, dtype, centroids=False
    )
    attributes["max_concurrency"] = slots
    x, logits = make_input(20, 64, dtype), make_input(20, 8, "float32", seed=2)
    bad_x, bad_logits = x.copy(), logits.copy()
    bad_x[3, 5], bad_x[4, 6] = np.nan, np.inf
    bad_logits[7, 1], bad_logits[8] = np.nan, np.nan
    with make_layer(attributes, 64, dtype, "float32") as layer:
        found = run(layer, bad_x, bad_logits)
        again = run(layer, x, logits)
    good = np.setdiff1d(np.arange(20), [3, 4, 7, 8])
    expected = reference(attributes, x, logits)
    assert_close(found[good], expected[good], dtype)
    assert_close(again, expected, dtype)
    assert np.isnan(found[[7, 8]].astype(np.float32)).all()
    assert np.isnan(found[3].astype(np.float32)).any()


# --- Routers' options


DIFFERENT = {"hidden": 4, "d_model": 8}  # cheap experts that still tell which ones ran


def check_routing(attributes: dict[str, Any], logits: Any, dtype: str = "float32") -> None:
    x = make_input(len(logits), 8, "float32")
    with make_layer(attributes, 8, "float32", dtype) as layer:
        assert_close(run(layer, x, logits), reference(attributes, x, logits), "float32")


@pytest.mark.parametrize(("experts", "options"), SIGMOID_OPTIONS, ids=str)
def test_sigmoid_topk(folder: Path, experts: int, options: dict[str, Any]) -> None:
    attributes = make_attributes(
        folder, "ReLU_FF", "sigmoid_topk", experts, centroids=False, **DIFFERENT, **options
    )
    if attributes["router_bias"] is None:
        del attributes["router_bias"]
    rng = np.random.default_rng(experts)
    scores = rng.standard_normal((100, experts)).astype(np.float32)
    check_routing(attributes, scores)
    scores[3, experts - 1] = np.nan
    scores[5] = -np.inf
    scores[6, 1] = np.inf
    check_routing(attributes, scores)
    # Nearly all experts and groups are as good as others. Of two values only: with three, sums of
    # different ones can be equal in float64 and not in float32.
    attributes.pop("router_bias", None)
    tied = rng.integers(0, 2, (100, experts)).astype(np.float32)
    check_routing(attributes, tied)
    check_routing({**attributes, "router_bias": [-0.25] * experts}, tied)


@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize(("experts", "top_k", "normalize"), [(16, 2, 0), (70, 2, 1), (300, 1, 0)])
def test_sparse_mixer(
    folder: Path, experts: int, top_k: int, normalize: int, jitter: float, offset: float
) -> None:
    attributes = make_attributes(
        folder,
        "ReLU_FF",
        "sparse_mixer",
        experts,
        top_k=top_k,
        centroids=False,
        router_jitter=jitter,
        normalize_routing_weights=normalize,
        routed_scaling_factor=0.5,
        **DIFFERENT,
    )
    scores = np.random.default_rng(experts).standard_normal((100, experts)).astype(np.float32)
    scores += np.float32(offset)
    check_routing(attributes, scores)
    scores[3, 2] = np.nan
    scores[5] = -np.inf
    scores[6, 1] = np.inf
    scores[7] = 0
    check_routing(attributes, scores)


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax"])
def test_scaled_weights(folder: Path, router: str) -> None:
    attributes = make_attributes(
        folder,
        "ReLU_FF",
        router,
        20,
        top_k=4,
        centroids=False,
        routed_scaling_factor=-1.5,
        **DIFFERENT,
    )
    check_routing(attributes, make_input(50, 20, "float32", seed=2))


# --- Biases and activations


BIASED = [name for name, sublayer in SUBLAYERS.items() if sublayer.biases]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize(
    ("d_model", "hidden"), [(64, 96), (36, 52), (33, 7), (1, 1), (512, 1024)], ids=str
)
@pytest.mark.parametrize("sublayer", BIASED)
def test_feed_forwards(
    folder: Path, sublayer: str, d_model: int, hidden: int, bias: int, dtype: str
) -> None:
    """Many rows an expert, few, and experts that no token chose; the same bits when streaming."""
    attributes = make_attributes(
        folder, sublayer, "softmax_topk", 5, d_model, hidden, 2, dtype, expert_bias=bias
    )
    inputs = [decided(attributes, make_input(tokens, d_model, dtype)) for tokens in (0, 1, 3, 200)]
    with make_layer(attributes, d_model, dtype) as layer:
        found = [run(layer, x) for x in inputs]
    for x, got in zip(inputs, found, strict=True):
        assert_close(got, reference(attributes, x), dtype)
    with make_layer({**attributes, "max_concurrency": 2}, d_model, dtype) as layer:
        for x, got in zip(inputs, found, strict=True):
            assert same_bits(run(layer, x), got)


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("file_dtype", DTYPES)
@pytest.mark.parametrize(
    ("sublayer", "dtype"), [("Clamped_SwiGLU", "bfloat16"), ("GELU_FF", "float32")]
)
def test_biases_of_another_type_and_form(
    folder: Path, sublayer: str, dtype: str, file_dtype: str, form: str, slots: int
) -> None:
    attributes = make_attributes(
        folder,
        sublayer,
        "default",
        5,
        40,
        24,
        dtype=file_dtype,
        form=form,
        expert_bias=1,
        max_concurrency=slots,
    )
    x = make_input(50, 40, dtype)
    with make_layer(attributes, 40, dtype) as layer:
        assert_close(run(layer, x), reference(attributes, x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize(
    "parameters",
    [
        {"swiglu_limit": 0.0},
        {"swiglu_limit": 0.25},
        {"activation_alpha": 0.5, "activation_beta": -2.0, "swiglu_limit": 1.5},
    ],
    ids=str,
)
def test_parameters_of_the_activation(
    folder: Path, parameters: dict[str, float], bias: int, dtype: str
) -> None:
    attributes = make_attributes(
        folder,
        "Clamped_SwiGLU",
        "topk_softmax",
        8,
        64,
        96,
        4,
        dtype,
        expert_bias=bias,
        **parameters,
    )
    x = make_input(200, 64, dtype)
    with make_layer(attributes, 64, dtype) as layer:
        assert_close(run(layer, x), reference(attributes, x), dtype)


# --- Long sums in float32


def test_long_sums_are_within_the_tolerance(tmp_path: Path) -> None:
    """65,536 products a sum.

    The second half of the hidden units takes back what the first half gives, in another order: the
    outputs are zero, where the tolerance is least, and the sums are of unit variance halfway. In
    one sequence of float32 FMAs 42 of the 8,192 elements would be beyond the tolerance, the worst
    2.3 times; in slices of 1,024 products the worst is at a quarter of it.
    """
    d_model, hidden = 64, 65536
    parts = make_parts("Gated_SiLU", 1, d_model, hidden, "float32")
    half = hidden // 2
    order = np.random.default_rng(2).permutation(half)
    for name in ("0/gate_weight", "0/up_weight"):
        parts[name][half:] = parts[name][:half][order]
    down = parts["0/down_weight"] * np.float32(np.sqrt(2))  # of unit variance by half of the units
    down[:, half:] = -down[:, :half][:, order]
    parts["0/down_weight"] = down
    path = write_experts(tmp_path / "long", parts, "Gated_SiLU", 1, "safetensors stacked")
    attributes = layer_attributes("Gated_SiLU", "default", 1, d_model, hidden, 1, path, True)
    x = make_input(128, d_model, "float32")
    expected = reference(attributes, x)
    assert np.abs(expected).max() < 1e-9
    with make_layer(attributes, d_model, "float32") as layer:
        assert_close(run(layer, x), expected, "float32")
        assert_close(run(layer, x[:1]), expected[:1], "float32")


@pytest.mark.parametrize(
    ("sublayer", "bias"), [("T5_FF", 0), ("GELU_FF", 0), ("GELU_FF", 1), ("Gated_SiLU", 1)]
)
def test_sums_in_slices(folder: Path, sublayer: str, bias: int) -> None:
    """Two slices and three, the last ones of 1 and 3 products; the same bits when streaming.

    A residual or a bias counts once, an activation is of the whole sum.
    """
    d_model, hidden = 1025, 2051
    attributes = make_attributes(
        folder, sublayer, "softmax_topk", 2, d_model, hidden, 2, expert_bias=bias
    )
    inputs = [make_input(tokens, d_model, "float32") for tokens in (1, 200)]
    with make_layer(attributes, d_model, "float32") as layer:
        found = [run(layer, x) for x in inputs]
    for x, got in zip(inputs, found, strict=True):
        assert_close(got, reference(attributes, x), "float32")
    with make_layer({**attributes, "max_concurrency": 1}, d_model, "float32") as layer:
        for x, got in zip(inputs, found, strict=True):
            assert same_bits(run(layer, x), got)


# --- Residency changes nothing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU"])
@pytest.mark.parametrize("size", [(64, 96), (36, 52), (512, 768)])
def test_resident_and_streaming_agree_in_every_bit(
    folder: Path, size: tuple[int, int], sublayer: str, dtype: str
) -> None:
    d_model, hidden = size
    made = make_attributes(folder, sublayer, "softmax_topk", 8, d_model, hidden, 2, dtype)
    inputs = [make_input(tokens, d_model, dtype) for tokens in (1, 2, 16, 33, 400)]
    with make_layer(made, d_model, dtype) as layer:
        resident = [run(layer, x) for x in inputs]
    for slots in (1, 3, 7):
        with make_layer({**made, "max_concurrency": slots}, d_model, dtype) as layer:
            for x, expected in zip(inputs, resident, strict=True):
                assert same_bits(run(layer, x), expected), f"{slots} slots, {len(x)} tokens"
                assert same_bits(run(layer, x), expected), f"{slots} slots, again"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["npz stored", "npz deflated", "safetensors stacked"])
def test_pinned_and_pageable_agree(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str
) -> None:
    """Experts larger than the rings of pinned and of device staging buffers."""
    size = {"experts": 3, "d_model": 1000, "hidden": 3000}  # 36 MB an expert, in odd chunks
    made = make_attributes(folder, "T5_FF", "default", form=form, **size)
    x = make_input(64, 1000, dtype)
    with make_layer(made, 1000, dtype) as layer:
        resident = run(layer, x)
    for pinned in ("64G", "0", "70M"):
        monkeypatch.setenv("MOE_INFER_PINNED_BYTES", pinned)
        with make_layer({**made, "max_concurrency": 2}, 1000, dtype) as layer:
            for _ in range(3):
                assert same_bits(run(layer, x), resident), f"MOE_INFER_PINNED_BYTES={pinned}"
    assert_close(resident, reference(made, x), dtype)


# --- The cache


def test_statistics(folder: Path) -> None:
    attributes = make_attributes(
        folder, "T5_FF", "default", 6, 32, 48, centroids=False, max_concurrency=2
    )
    expert_bytes = 4 * (32 + 3 * 32 * 48)
    with make_layer(attributes, 32, "float32", "float32") as layer:

        def use(*experts: int) -> tuple[int, int, int]:
            logits = np.zeros((len(experts), 6), np.float32)
            logits[np.arange(len(experts)), experts] = 1
            before = layer.stats()
            run(layer, make_input(len(experts), 32, "float32"), logits)
            after = layer.stats()
            assert after.bytes_fetched == after.misses * expert_bytes
            return (
                after.hits - before.hits,
                after.misses - before.misses,
                after.evictions - before.evictions,
            )

        assert use(0, 1) == (0, 2, 0)
        assert use(0, 1, 1) == (2, 0, 0)
        assert use(1) == (1, 0, 0)
        assert use(2) == (0, 1, 1)  # takes the place of 0, not used for longest
        assert use(1, 2) == (2, 0, 0)
        assert use(0, 1, 3) == (1, 2, 2)  # 1 runs before its slot is taken
        assert use() == (0, 0, 0)
        stats = layer.stats()
        assert (stats.runs, stats.tokens) == (7, 2 + 3 + 1 + 1 + 2 + 3)


def test_a_changed_file_is_an_error_and_not_a_crash(folder: Path, tmp_path: Path) -> None:
    attributes = make_attributes(tmp_path, "T5_FF", "default", 6, 32, 48, max_concurrency=1)
    x = make_input(40, 32, "float32")
    path = Path(attributes["expert_weight_file"])
    before = path.read_bytes()
    with make_layer(attributes, 32, "float32") as layer:
        expected = run(layer, x)
        path.write_bytes(before[: len(before) // 2])  # in place: the mapping shrinks
        with pytest.raises(WeightFileError, match="has changed"):
            run(layer, x)
    with pytest.raises(WeightFileError):
        make_layer(attributes, 32, "float32")
    path.write_bytes(before)
    with make_layer(attributes, 32, "float32") as layer:
        assert same_bits(run(layer, x), expected)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, in place: each run is right or says what happened."""
    monkeypatch.setenv("MOE_INFER_PINNED_BYTES", "0")
    attributes = make_attributes(tmp_path, "T5_FF", "default", 6, 256, 512, max_concurrency=1)
    path = Path(attributes["expert_weight_file"])
    x = make_input(40, 256, "float32")
    expected = reference(attributes, x)
    whole, times = path.read_bytes(), path.stat()
    told, right = [], 0
    with make_layer(attributes, 256, "float32") as layer:
        done = threading.Event()

        def cut() -> None:
            while not done.is_set():
                os.truncate(path, len(whole) // 3)
                path.write_bytes(whole)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                time.sleep(0.02)

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            for _ in range(300):
                try:
                    assert_close(run(layer, x), expected, "float32")
                    right += 1
                except WeightFileError as error:
                    told.append(str(error))
        finally:
            done.set()
            thread.join()
        assert_close(run(layer, x), expected, "float32")  # the file is back
    assert told and right
    assert all("has changed" in error or "has shrunk" in error for error in told)


@pytest.mark.parametrize("slots", [2, 6])
@pytest.mark.parametrize("form", ["npz stored", "npz deflated", "safetensors stacked"])
def test_checks_of_the_weights_that_the_environment_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, slots: int
) -> None:
    parts = make_parts("T5_FF", 6, 32, 48, "float32")
    parts["4/wo_weight"][3, 2] = np.inf
    path = write_experts(tmp_path / "bad", parts, "T5_FF", 6, form)
    attributes = layer_attributes("T5_FF", "default", 6, 32, 48, 1, path, True)
    attributes["max_concurrency"] = slots
    make_layer(attributes, 32, "float32").close()
    monkeypatch.setenv("MOE_INFER_CHECK_FINITE", "1")
    with pytest.raises(WeightFileError, match=r"holds inf at \[(4, )?3, 2\]"):
        make_layer(attributes, 32, "float32")
    monkeypatch.setenv("MOE_INFER_CHECK_CRC", "1")
    good = make_attributes(tmp_path, "T5_FF", "default", 6, 32, 48, form=form)
    good["max_concurrency"] = slots
    x = make_input(40, 32, "float32")
    with make_layer(good, 32, "float32") as layer:
        assert_close(run(layer, x), reference(good, x), "float32")


@pytest.mark.alone
def test_resident_experts_are_shared(tmp_path: Path) -> None:
    attributes = make_attributes(tmp_path, "Gated_SiLU", "default", 8, 512, 2048)
    with make_layer(attributes, 512, "float32") as first:
        free = torch.cuda.mem_get_info()[0]
        with make_layer(attributes, 512, "float32") as second:
            assert free - torch.cuda.mem_get_info()[0] < 32 << 20  # an expert has 12 MiB, all 96
            x = make_input(20, 512, "float32")
            assert same_bits(run(first, x), run(second, x))
        assert_close(run(first, x), reference(attributes, x), "float32")


# --- Errors


def test_bad_runs_are_errors_and_the_layer_lives(folder: Path) -> None:
    attributes = make_attributes(folder, "T5_FF", "default", 6, 32, 48, max_concurrency=2)
    x = make_input(9, 32, "float32")
    with make_layer(attributes, 32, "float32") as layer:
        size = layer.workspace(9)
        a, out, work = Buffer(x.nbytes, x), Buffer(x.nbytes), Buffer(size)
        for arguments, sentence in (
            ((a.address, None, out.address, 9, work.address, size - 1), f"have {size} bytes"),
            ((None, None, out.address, 9, work.address, size), "hidden_states must be"),
            ((a.address, None, out.address, 9, work.address + 8, size), "workspace must be"),
            ((a.address, None, out.address, -1, work.address, size), "got -1"),
        ):
            with pytest.raises(ValueError, match=sentence):
                layer.run(*arguments)
        assert_close(run(layer, x), reference(attributes, x), "float32")


def test_too_many_slots_say_how_much_is_missing(tmp_path: Path) -> None:
    """A sparse file of 2 TB: the index is right, the GPU too small."""
    import json
    import struct

    experts, d_model, hidden = 256, 16384, 65536
    tensors, offset = {}, 0
    for name, shape in (
        ("gate_up", (experts, 2 * hidden, d_model)),
        ("down", (experts, d_model, hidden)),
    ):
        size = 2 * int(np.prod(shape, dtype=np.int64))
        tensors[name] = {
            "dtype": "F16",
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            os.truncate(path, 8 + len(header) + offset)
        except OSError as error:
            pytest.skip(f"no sparse files here: {error}")
    attributes = {
        "expert_count": experts,
        "hidden_size": hidden,
        "expert_sublayer_type": "Gated_SiLU",
        "expert_weight_file": str(path),
        "max_concurrency": experts,
    }
    with pytest.raises(RuntimeError, match=r"not enough GPU memory .* lower attribute"):
        make_layer(attributes, d_model, "float16", "float16")


# --- Streams, threads, graphs


@pytest.mark.parametrize("slots", [2, 8])
def test_two_threads_with_two_layers(folder: Path, slots: int) -> None:
    layers, inputs, expected = [], [], []
    for sublayer in ("T5_FF", "Gated_SiLU"):
        attributes = make_attributes(folder, sublayer, "softmax_topk", 8, 64, 96, 2)
        attributes["max_concurrency"] = slots
        layers.append(make_layer(attributes, 64, "float32"))
        inputs.append([make_input(tokens, 64, "float32") for tokens in (1, 20, 77)])
        expected.append([reference(attributes, x) for x in inputs[-1]])

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for turn in range(60):
                x, right = inputs[i][turn % 3], expected[i][turn % 3]
                assert_close(run(layers[i], x, stream=stream), right, "float32")

    in_threads(2, work)
    for layer in layers:
        layer.close()


@pytest.mark.parametrize("slots", [2, 8])
def test_one_layer_from_two_threads(folder: Path, slots: int) -> None:
    attributes = make_attributes(folder, "T5_FF", "default", 8, 64, 96, max_concurrency=slots)
    inputs = [make_input(tokens, 64, "float32") for tokens in (5, 60)]
    expected = [reference(attributes, x) for x in inputs]

    with make_layer(attributes, 64, "float32") as layer:

        def work(i: int) -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(60):
                    assert_close(run(layer, inputs[i], stream=stream), expected[i], "float32")

        in_threads(2, work)


def captured(layer: Any, buffers: dict[str, Buffer], tokens: int) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(
            buffers["x"].address,
            None,
            buffers["y"].address,
            tokens,
            buffers["workspace"].address,
            buffers["workspace"].size,
            torch.cuda.current_stream().cuda_stream,
        )
    return graph


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_cuda_graph_when_resident(folder: Path, sublayer: str, dtype: str) -> None:
    attributes = make_attributes(folder, sublayer, "softmax_topk", 8, 64, 96, 2, dtype)
    inputs = [make_input(25, 64, dtype, seed) for seed in range(3)]
    with make_layer(attributes, 64, dtype) as layer:
        expected = [run(layer, x) for x in inputs]
        size = inputs[0].nbytes
        buffers = {
            "x": Buffer(size, inputs[0]),
            "y": Buffer(size),
            "workspace": Buffer(layer.workspace(25)),
        }
        graph = captured(layer, buffers, 25)
        for x, right in zip(inputs, expected, strict=True):
            fresh = Buffer(size, x)
            buffers["x"].bytes.copy_(fresh.bytes)
            graph.replay()
            torch.cuda.synchronize()
            assert same_bits(buffers["y"].array(NUMPY[dtype], x.shape), right)
        for name, buffer in buffers.items():
            buffer.check_guards(name)


def test_a_graph_that_may_need_more_experts_than_there_are_slots_is_refused(folder: Path) -> None:
    attributes = make_attributes(folder, "T5_FF", "default", 8, 64, 96, max_concurrency=3)
    x = make_input(25, 64, "float32")
    with make_layer(attributes, 64, "float32") as layer:
        buffers = {
            "x": Buffer(x.nbytes, x),
            "y": Buffer(x.nbytes),
            "workspace": Buffer(layer.workspace(25)),
        }
        with pytest.raises(ValueError, match="25 tokens may need 8 experts, and there are 3 slots"):
            captured(layer, buffers, 25)
        assert_close(run(layer, x), reference(attributes, x), "float32")


# --- For compute-sanitizer


@pytest.mark.sanitize
@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_small(folder: Path, sublayer: str, dtype: str, slots: int) -> None:
    """Odd sizes and NaN, with weights of another type than the inputs'."""
    file_dtype = "float16" if dtype == "float32" else "float32"
    attributes = make_attributes(
        folder, sublayer, "softmax_topk", 5, 36, 52, 2, file_dtype, form="npz deflated"
    )
    attributes["max_concurrency"] = slots
    x = make_input(19, 36, dtype)
    with make_layer(attributes, 36, dtype) as layer:
        assert_close(run(layer, x), reference(attributes, x), dtype)
        x[2, 3] = np.nan
        run(layer, x)
        run(layer, x[:1])
        run(layer, x[:0])


@pytest.mark.sanitize
@pytest.mark.parametrize("slots", [2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sublayer", "router", "options"),
    [
        ("Clamped_SwiGLU", "sigmoid_topk", {"n_group": 3, "topk_group": 1}),
        ("GELU_FF", "sparse_mixer", {}),
    ],
)
def test_small_with_biases(
    folder: Path, sublayer: str, router: str, options: dict[str, Any], dtype: str, slots: int
) -> None:
    """Odd sizes and sizes that tensor cores take."""
    for d_model, hidden in ((36, 51), (64, 96)):
        attributes = make_attributes(
            folder, sublayer, router, 6, d_model, hidden, 2, dtype, expert_bias=1, **options
        )
        attributes["max_concurrency"] = slots
        x = make_input(19, d_model, dtype)
        with make_layer(attributes, d_model, dtype) as layer:
            assert_close(run(layer, x), reference(attributes, x), dtype)
            run(layer, x[:1])


def test_tolerances_are_those_of_the_design() -> None:
    assert TOLERANCES == {
        "float32": (1e-5, 1e-4),
        "float16": (2e-3, 2e-3),
        "bfloat16": (1.6e-2, 1.6e-2),
    }
    assert config_of(  # and the reference stands on the same definition
        {"expert_count": 1, "hidden_size": 0, "expert_sublayer_type": "Identity"}
    ).resident
