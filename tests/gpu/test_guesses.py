"""Layers that guess the next one's experts, in a session of ONNX Runtime's TensorRT provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from gpu_models import with_rest  # noqa: E402
from tensorrt_needed import ENGINE, TRT  # noqa: E402

import moe_infer  # noqa: E402
from layer_models import assert_close, write_layer  # noqa: E402

pytestmark = ENGINE
LAYERS, D_MODEL, HIDDEN, EXPERTS, TOP_K, SLOTS = 4, 64, 96, 16, 2, 5


def make_model(folder: Path, slots: int) -> Path:
    """Layers behind each other with little between them, so that most guesses are right."""
    generator = np.random.default_rng(5)
    nodes, weights = [], []
    value = "x"
    for i in range(LAYERS):
        router = generator.standard_normal((D_MODEL, EXPERTS)).astype(np.float32)
        weights.append(numpy_helper.from_array(router, f"router_{i}"))
        nodes.append(
            helper.make_node("MatMul", [value, f"router_{i}"], [f"logits_{i}"], f"gate_{i}")
        )
        attributes = write_layer(
            folder / f"experts_{i}",
            "Gated_SiLU",
            "softmax_topk",
            EXPERTS,
            D_MODEL,
            HIDDEN,
            top_k=TOP_K,
            centroids=False,
            max_concurrency=slots,
        )
        inputs = [value, f"logits_{i}"]
        nodes.append(
            helper.make_node(
                "MoELayer", inputs, [f"m_{i}"], f"moe_{i}", domain="trt.plugins", **attributes
            )
        )
        nodes.append(helper.make_node("Add", [value, f"m_{i}"], [f"h_{i}"], f"add_{i}"))
        value = f"h_{i}"
    shape = ["tokens", D_MODEL]
    infos = [
        helper.make_tensor_value_info(f"m_{i}", TensorProto.FLOAT, shape) for i in range(LAYERS)
    ]
    graph = helper.make_graph(
        nodes,
        "guesses",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
        value_info=infos,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trt.plugins", 1)]
    path = folder / f"model_{slots}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize("fetch", ["host", "auto", "device"])
def test_a_session_that_guesses(
    tmp_path: Path, fetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a session whose experts all stay; by the host, experts come ahead."""
    monkeypatch.setenv("MOE_INFER_FETCH", fetch)
    resident = moe_infer.InferenceSession(make_model(tmp_path, EXPERTS), providers=with_rest(TRT))
    path = make_model(tmp_path, SLOTS)
    report = moe_infer.set_fetch_ahead(path, True, path)
    assert [guess.reason for guess in report.guesses] == [""] * (LAYERS - 1)
    session = moe_infer.InferenceSession(path, providers=with_rest(TRT))
    generator = np.random.default_rng(6)
    for i in range(40):
        tokens = 3 if i % 10 == 9 else 1
        x = generator.standard_normal((tokens, D_MODEL)).astype(np.float32)
        (found,), (expected,) = (s.run(None, {"x": x}) for s in (session, resident))
        assert_close(found, expected, "float32")
    # Both sessions' layers are on the same files.
    layers = [layer for layer in session.expert_stats() if layer.slots == SLOTS]
    assert len(layers) == LAYERS
    used = sum(layer.prefetches_used or 0 for layer in layers)
    assert (used > 20) == (fetch != "device")


def test_a_guess_of_another_size_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its rows have to be those of the hidden states."""
    model = onnx.load(make_model(tmp_path, SLOTS))
    model.graph.initializer.append(
        numpy_helper.from_array(np.zeros((5, EXPERTS), np.float32), "rows")
    )
    layer = next(node for node in model.graph.node if node.name == "moe_0")
    layer.input.append("rows")
    path = tmp_path / "wrong.onnx"
    onnx.save(model, path)
    with pytest.raises(Exception, match="TensorRT EP"):
        session = ort.InferenceSession(path, providers=[TRT])
        session.run(None, {"x": np.zeros((2, D_MODEL), np.float32)})
    assert "next_router_logits must have a row for each token" in capfd.readouterr().err
