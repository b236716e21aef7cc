"""Rewrites of what torch.onnx.export (dynamo) emits, compared with the unrewritten graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import models_torch  # noqa: E402
from evaluate_graph import assert_same_outputs  # noqa: E402
from moe_infer.graph.rewrite import rewrite  # noqa: E402
from moe_infer.op import DOMAIN, OP_TYPE  # noqa: E402

pytestmark = pytest.mark.needs_torch

SUBLAYERS = {"gated": "Gated_SiLU", "t5": "T5_FF"}
FEW = [s for s in models_torch.variants() if s.product == "bmm" and s.layout == "separate"][::4]


def _check_types(path: Path) -> None:
    """Every value has a type and a shape, and MoELayer is the only operator of its domain."""
    model = onnx.load(path, load_external_data=False)
    have = {
        v.name: v.type.tensor_type
        for v in (*model.graph.value_info, *model.graph.output, *model.graph.input)
    }
    for node in model.graph.node:
        for name in node.output:
            assert have[name].elem_type, name
            assert have[name].HasField("shape"), name
    assert {n.op_type for n in model.graph.node if n.domain == DOMAIN} == {OP_TYPE}
    assert [o.version for o in model.opset_import if o.domain == DOMAIN] == [1]


def _x(batch: int, seq: int) -> dict[str, Any]:
    shape = (batch, seq, models_torch.D_MODEL)
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("style", list(models_torch.variants()), ids=lambda s: s.name)
def test_every_style_is_found_and_computes_the_same(
    style: models_torch.Style, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    path = tmp_path / "in" / "model.onnx"
    models_torch.export(models_torch.Stack(style), path)
    report = rewrite(path, tmp_path / "out")
    assert len(report.layers) == 2, str(report)
    for layer in report.layers:
        assert layer.config.expert_sublayer_type == SUBLAYERS[style.sublayer]
        assert layer.config.moe_variant == style.router
        assert layer.config.top_k == style.top_k
        assert layer.config.normalize_routing_weights == int(style.normalize)
        assert layer.config.max_concurrency == models_torch.EXPERTS
    assert not report.untyped_values
    _check_types(tmp_path / "out" / "model.onnx")
    for batch, seq in ((2, 5), (1, 1), (3, 4)):
        assert_same_outputs(path, tmp_path / "out" / "model.onnx", _x(batch, seq))


@pytest.mark.parametrize("opset", [18, 19, 21])
@pytest.mark.parametrize("style", FEW, ids=lambda s: s.name)
def test_other_opsets(style: models_torch.Style, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    path = tmp_path / "in" / "model.onnx"
    model = models_torch.export(models_torch.Stack(style), path, opset=opset)
    assert opset in [o.version for o in model.opset_import]
    assert len(rewrite(path, tmp_path / "out").layers) == 2
    assert_same_outputs(path, tmp_path / "out" / "model.onnx", _x(2, 3))


def test_static_shapes(tmp_path: Path) -> None:
    path = tmp_path / "in" / "model.onnx"
    models_torch.export(models_torch.Stack(models_torch.Style()), path, dynamic=False)
    report = rewrite(path, tmp_path / "out")
    assert len(report.layers) == 2, str(report)
    assert_same_outputs(path, tmp_path / "out" / "model.onnx", _x(2, 5))


def test_external_data_is_moved_and_experts_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "in" / "model.onnx"
    style = models_torch.Style()
    models_torch.export(models_torch.Stack(style), path, external=True)
    report = rewrite(path, tmp_path / "out", max_concurrency=2)
    assert len(report.layers) == 2
    assert report.layers[0].config.max_concurrency == 2
    assert_same_outputs(path, tmp_path / "out" / "model.onnx", _x(2, 5))
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    names = {t.name for t in model.graph.initializer}
    assert not names & {c for layer in report.layers for c in layer.constants}
    stacked = models_torch.EXPERTS * models_torch.HIDDEN * models_torch.D_MODEL
    assert all(np.prod(t.dims) < stacked for t in model.graph.initializer)


def test_symbolic_dimensions_survive(tmp_path: Path) -> None:
    path = tmp_path / "in" / "model.onnx"
    models_torch.export(models_torch.Stack(models_torch.Style()), path)
    rewrite(path, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    (info,) = [v for v in model.graph.value_info if v.name == model.graph.node[-1].input[0]]
    assert [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim][:2] == [
        "batch",
        "seq",
    ]
    moe = next(n for n in model.graph.node if n.op_type == OP_TYPE)
    (info,) = [v for v in model.graph.value_info if v.name == moe.output[0]]
    assert info.type.tensor_type.shape.dim[0].dim_param
    assert info.type.tensor_type.shape.dim[1].dim_value == models_torch.D_MODEL


def test_a_layer_that_reads_the_output_of_the_one_before(tmp_path: Path) -> None:
    torch.manual_seed(4)
    style = models_torch.Style(sublayer="t5")
    path = tmp_path / "in" / "model.onnx"
    layers = [models_torch.Moe(style) for _ in range(3)]
    models_torch.export(torch.nn.Sequential(*layers), path)
    report = rewrite(path, tmp_path / "out")
    assert len(report.layers) == 3, str(report)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    outputs = [layer.output for layer in report.layers]
    assert any(set(n.input) & set(outputs) for n in model.graph.node if n.op_type == OP_TYPE)
    name = model.graph.input[0].name
    assert_same_outputs(path, tmp_path / "out" / "model.onnx", {name: _x(2, 3)["x"]})
