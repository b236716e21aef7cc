"""A GPU budget: the library's slots are as large as the split counts, and a session obeys it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

import onnxruntime as ort  # noqa: E402
from gpu_layers import make_attributes, make_input, make_layer, same_bits  # noqa: E402
from gpu_models import with_rest  # noqa: E402

import moe_infer  # noqa: E402
from layer_models import config_of, layer_model  # noqa: E402
from moe_infer.op import DTYPES, SUBLAYERS  # noqa: E402
from moe_infer.runtime import native, plugin  # noqa: E402
from moe_infer.slot_layout import slot_bytes  # noqa: E402

pytestmark = pytest.mark.needs_library
EXPERTS, D_MODEL, HIDDEN = 6, 40, 56
TRT = "TensorrtExecutionProvider"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sublayer", [s.name for s in SUBLAYERS.values() if s.tensors])
@pytest.mark.parametrize("slots", [2, EXPERTS])
def test_the_librarys_slots_are_as_large_as_ours(
    tmp_path: Path, sublayer: str, dtype: str, slots: int
) -> None:
    attributes = make_attributes(
        tmp_path,
        sublayer,
        "default",
        EXPERTS,
        D_MODEL,
        HIDDEN,
        max_concurrency=slots,
        expert_bias=int(bool(SUBLAYERS[sublayer].biases)),
    )
    gc.collect()
    before = {layer.id for layer in native.live_layers()}
    with make_layer(attributes, D_MODEL, dtype):
        (found,) = [layer for layer in native.live_layers() if layer.id not in before]
        assert found.slot_bytes == slot_bytes(config_of(attributes), D_MODEL, dtype)
        assert found.slots == slots


@pytest.mark.engine
def test_a_session_obeys_its_budget(tmp_path: Path) -> None:
    if TRT not in ort.get_available_providers() or not plugin.status().usable:
        pytest.skip(f"no TensorRT provider, or {plugin.status().reason}")
    attributes = [
        make_attributes(tmp_path, kind, "softmax_topk", EXPERTS, D_MODEL, HIDDEN, 2)
        for kind in ("T5_FF", "Gated_SiLU")
    ]
    path, cache = tmp_path / "model.onnx", tmp_path / "cache"
    onnx.save(layer_model(attributes, D_MODEL), path)
    whole = sum(layer.slots_bytes for layer in moe_infer.inspect_model(path))
    least = whole * 2 // EXPERTS
    x = make_input(10, D_MODEL, "float32").reshape(1, 10, D_MODEL)
    cached = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache)}
    providers = [(TRT, cached), *with_rest(TRT)[1:]]
    outputs: list[np.ndarray] = []
    # The last finds the cached engine of the second.
    for budget, expected in (
        (None, [6, 6]),
        (least, [2, 2]),
        (whole // 2, [3, 3]),
        (least, [2, 2]),
    ):
        gc.collect()
        before = {layer.id for layer in native.live_layers()}
        session = moe_infer.InferenceSession(path, providers=providers, gpu_budget=budget)
        for _ in range(2):
            (y,) = session.run(None, {"x": x})
        outputs.append(y)
        found = [layer for layer in session.expert_stats() if layer.id not in before]
        assert [layer.slots for layer in found] == expected
        if budget is not None:
            assert session.gpu_budget is not None
            assert [layer.slots for layer in session.gpu_budget.layers] == expected
            assert sum(layer.slots * layer.slot_bytes for layer in found) <= budget
        del session
    assert all(same_bits(y, outputs[0]) for y in outputs)
    assert len(list(cache.glob("*.engine"))) == 3, "an engine for each split"
