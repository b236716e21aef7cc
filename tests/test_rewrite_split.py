"""Experts on the rows of a Split (JetMoE): what must not match. The models' rows are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from compare_rewrites import edited, nodes, producer  # noqa: E402

pytestmark = pytest.mark.needs_torch


def _of_mlp(graph: onnx.GraphProto, op_type: str) -> onnx.NodeProto:
    """The first node of a type behind the first layer's router of feed-forward experts."""
    logits = next(n for n in nodes(graph, "Gemm") if "mlp.router" in n.input[1])
    after = list(graph.node)[list(graph.node).index(logits) :]
    return next(n for n in after if n.op_type == op_type)


def _splits(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Both Splits by the experts' counts of the first layer."""
    first = _of_mlp(graph, "TopK")
    after = list(graph.node)[list(graph.node).index(first) :]
    return [n for n in after if n.op_type == "Split" and len(n.output) == 4][:2]


def _experts_in_another_order(graph: onnx.GraphProto) -> None:
    counts = producer(graph, _splits(graph)[0].input[1])
    counts.input[0], counts.input[1] = counts.input[1], counts.input[0]


def _results_in_another_order(graph: onnx.GraphProto) -> None:
    made = _splits(graph)[1].output[0]
    product = next(n for n in nodes(graph, "Gemm") if n.input[0] == made)
    concat = next(n for n in nodes(graph, "Concat") if product.output[0] in n.input)
    concat.input[0], concat.input[1] = concat.input[1], concat.input[0]


def _one_expert_twice(graph: onnx.GraphProto) -> None:
    made = _splits(graph)[0].output
    first, second = (next(n for n in nodes(graph, "Gemm") if n.input[0] == m) for m in made[:2])
    second.input[1] = first.input[1]


def _rows_overwrite(graph: onnx.GraphProto) -> None:
    del _of_mlp(graph, "ScatterND").attribute[:]


def _rows_of_other_tokens(graph: onnx.GraphProto) -> None:
    divisor = numpy_helper.from_array(np.array(3.0, np.float32), "three")
    graph.initializer.append(divisor)
    _of_mlp(graph, "Div").input[1] = "three"


def _constant_counts(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array([7, 7, 7, 7], np.int64), "counts"))
    for split in _splits(graph):
        split.input[1] = "counts"


def _weights_before_the_experts(graph: onnx.GraphProto) -> None:
    """The experts read their rows times the routing weight: not linear in it."""
    weighted = _of_mlp(graph, "ScatterND")
    product = producer(graph, producer(graph, weighted.input[2]).input[0])
    assert product.op_type == "Mul"
    rows = _splits(graph)[0]
    scale = producer(graph, product.input[1])
    graph.node.remove(scale)
    made = helper.make_node("Mul", [rows.input[0], scale.output[0]], ["scaled"])
    at = list(graph.node).index(rows)
    graph.node.insert(at, scale)
    graph.node.insert(at + 1, made)
    rows.input[0] = "scaled"
    product.op_type, product.input[:] = "Identity", [product.input[0]]


NEAR: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "counts in another order": (_experts_in_another_order, ""),
    "results in another order": (_results_in_another_order, "is not expert"),
    "a weight of two experts": (_one_expert_twice, "several experts read the weight"),
    "rows overwrite": (_rows_overwrite, "ScatterND"),
    "rows of other tokens": (_rows_of_other_tokens, ""),
    "weighted before the experts": (_weights_before_the_experts, "an unknown function"),
}


@pytest.mark.parametrize(("edit", "reason"), NEAR.values(), ids=NEAR.keys())
def test_near_misses_are_left_alone_and_explained(
    edit: Callable[[onnx.GraphProto], None], reason: str, tmp_path: Path
) -> None:
    path = edited(model_zoo.export("JetMoE", "dynamo"), tmp_path, edit)
    report = moe_infer.rewrite(path, tmp_path / "out")
    # The second layer was not edited.
    assert len(report.layers) == 1, str(report)
    anchors = {miss.anchor: miss.reason for miss in report.near_misses}
    (edited_one,) = [a for a in anchors if "node_topk_1__1" in a]
    assert anchors[edited_one], str(report)
    assert any(reason in miss.reason for miss in report.near_misses), str(report)


def test_counts_of_the_sample_input_are_a_wrong_export(tmp_path: Path) -> None:
    path = edited(model_zoo.export("JetMoE", "dynamo"), tmp_path, _constant_counts)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert report.wrong_export
    assert not (tmp_path / "out").exists()
    assert "Export again with torch.onnx.export(dynamo=True)" in report.near_misses[0].reason
