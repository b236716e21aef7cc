"""Loops over experts that an exporter unrolled, in graphs of transformers 4 and optimum-onnx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import moe_infer
from compare_rewrites import TOLERANCE, check_same, edited, nodes, refused, run_lowered
from export_fixtures import recorded, unpack
from moe_infer.weights import open_weight_file

ROUTERS = {
    "olmoe-dynamo": ("softmax_topk", 2, 0),
    "olmoe-torchscript": ("softmax_topk", 2, 0),
    "qwen3-moe-optimum": ("softmax_topk", 2, 1),
    "mixtral-torchscript": ("softmax_topk", 2, 1),
}


def _feeds(path: Path, ids: Any) -> dict[str, Any]:
    """The inputs that a graph has; optimum's names masks and positions, too."""
    seq = np.arange(ids.shape[1], dtype=np.int64)[None].repeat(len(ids), 0)
    made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": seq}
    model = onnx.load(path, load_external_data=False)
    return {i.name: made[i.name] for i in model.graph.input}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_block_is_found_and_computes_the_same(name: str, tmp_path: Path) -> None:
    path = unpack(name, tmp_path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == 1, str(report)
    assert not report.near_misses, str(report)
    (layer,) = report.layers
    config = layer.config
    assert layer.family == "unrolled"
    assert config.expert_sublayer_type == "Gated_SiLU"
    found = config.moe_variant, config.top_k, config.normalize_routing_weights
    assert found == ROUTERS[name]
    assert report.model_path is not None
    inputs, logits = recorded(name)
    feeds = _feeds(path, inputs["input_ids"])
    (made, *_) = run_lowered(report.model_path, feeds)
    np.testing.assert_allclose(made, logits, rtol=0, atol=TOLERANCE)
    check_same(path, report.model_path, [feeds])
    # These have a node for each expert that is chosen, and fail where one is not.
    lengths = [] if name.startswith("mixtral") else [(1, 1), (2, 3)]
    for batch, seq in lengths:
        shorter = _feeds(path, inputs["input_ids"][:batch, :seq])
        check_same(path, report.model_path, [shorter])


def test_a_loop_over_the_chosen_experts_becomes_right_for_every_input(tmp_path: Path) -> None:
    """The traced loop runs only when all experts are chosen; the rewritten one always does."""
    path = unpack("mixtral-torchscript", tmp_path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert report.model_path is not None
    inputs, logits = recorded("mixtral-torchscript")
    (first,) = run_lowered(report.model_path, {"input_ids": inputs["input_ids"][:, :1]})
    # The model is causal.
    np.testing.assert_allclose(first, logits[:, :1], rtol=0, atol=TOLERANCE)


def test_the_file_holds_each_experts_own_weights(tmp_path: Path) -> None:
    path = unpack("olmoe-dynamo", tmp_path)
    model = onnx.load(path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert report.expert_weight_path is not None
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    file = open_weight_file(report.expert_weight_path)
    gate_up, down = (file.read(f"layers.0.{n}") for n in ("gate_up", "down"))
    for e in range(4):
        prefix = f"model.model.layers.0.mlp.experts.{e}."
        np.testing.assert_array_equal(gate_up[e, 0::2], stored[prefix + "gate_proj.weight"])
        np.testing.assert_array_equal(gate_up[e, 1::2], stored[prefix + "up_proj.weight"])
        np.testing.assert_array_equal(down[e], stored[prefix + "down_proj.weight"])
    left = onnx.load(report.model_path)
    assert not [t.name for t in left.graph.initializer if "experts" in t.name]


# Near misses, all from OLMoE's loop


def _scatters(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return nodes(graph, "ScatterND")


def _products(graph: onnx.GraphProto, projection: str) -> list[onnx.NodeProto]:
    return [n for n in nodes(graph, "Gemm") if f"{projection}_proj.weight" in n.input[1]]


def _rows_to_other_tokens(graph: onnx.GraphProto) -> None:
    scatters = _scatters(graph)
    scatters[2].input[1] = scatters[1].input[1]


def _overwritten(graph: onnx.GraphProto) -> None:
    del _scatters(graph)[1].attribute[:]


def _one_expert_negated(graph: onnx.GraphProto) -> None:
    product = _products(graph, "up")[2]
    at = list(graph.node).index(product)
    made, product.output[0] = product.output[0], "positive"
    graph.node.insert(at + 1, helper.make_node("Neg", ["positive"], [made], "negated"))


def _a_weight_of_two_experts(graph: onnx.GraphProto) -> None:
    first, second = _products(graph, "down")[:2]
    second.input[1] = first.input[1]


def _gate_and_up_swapped_in_one(graph: onnx.GraphProto) -> None:
    gate, up = _products(graph, "gate")[1], _products(graph, "up")[1]
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def _weights_of_other_choices(graph: onnx.GraphProto) -> None:
    gathers = [n for n in nodes(graph, "Concat") if n.output[0] in _gathered_by(graph)]
    first = gathers[0]
    first.input[0], first.input[1] = first.input[1], first.input[0]


def _gathered_by(graph: onnx.GraphProto) -> set[str]:
    return {n.input[1] for n in nodes(graph, "GatherND")}


def _a_weight_is_an_input(graph: onnx.GraphProto) -> None:
    name = _products(graph, "up")[1].input[1]
    (tensor,) = [t for t in graph.initializer if t.name == name]
    graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def _a_weight_is_used_elsewhere(graph: onnx.GraphProto) -> None:
    name = _products(graph, "up")[1].input[1]
    graph.node.append(helper.make_node("Identity", [name], ["copied"], "copy"))
    graph.output.append(helper.make_tensor_value_info("copied", 1, [8, 16]))


NEAR: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "rows go to another expert's tokens": (
        _rows_to_other_tokens,
        "a ScatterND that does not write rows to the tokens they came from",
    ),
    "an expert overwrites": (_overwritten, "a ScatterND that overwrites what another expert gave"),
    "one expert differs": (_one_expert_negated, "expert 2 computes something else than expert 0"),
    "two experts share a weight": (_a_weight_of_two_experts, "several experts read the weight"),
    "weights of other choices": (
        _weights_of_other_choices,
        "rows are taken of something with other axes than their mask",
    ),
    "a weight is an input": (_a_weight_is_an_input, "is an input of the graph, not a constant"),
    "a weight is used elsewhere": (_a_weight_is_used_elsewhere, "which is shared with the layer"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone_and_explained(name: str, tmp_path: Path) -> None:
    edit, reason = NEAR[name]
    path = edited(unpack("olmoe-dynamo", tmp_path), tmp_path, edit)
    report = refused(path, tmp_path)
    assert not report.wrong_export
    assert any(reason in miss.reason for miss in report.near_misses), str(report)


def test_projections_swapped_in_one_expert_are_swapped_in_the_file(tmp_path: Path) -> None:
    path = edited(unpack("olmoe-dynamo", tmp_path), tmp_path, _gate_and_up_swapped_in_one)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert report.model_path is not None, str(report)
    inputs, logits = recorded("olmoe-dynamo")
    check_same(path, report.model_path, [inputs])
    (made,) = run_lowered(report.model_path, inputs)
    assert np.abs(made - logits).max() > 100 * TOLERANCE


# Loops in which experts are missing


def _an_expert_left_out(graph: onnx.GraphProto) -> None:
    scatters = _scatters(graph)
    scatters[3].input[0] = scatters[1].output[0]


def test_a_constant_loop_without_an_expert_is_refused(tmp_path: Path) -> None:
    path = edited(unpack("olmoe-dynamo", tmp_path), tmp_path, _an_expert_left_out)
    report = refused(path, tmp_path)
    assert report.wrong_export
    (miss,) = report.near_misses
    assert "holds 3 of 4 experts (missing: 2)" in miss.reason, str(report)


def test_a_loop_over_the_sample_inputs_experts_is_refused(tmp_path: Path) -> None:
    """One token chose two experts; the loop has two passes, whatever the input chooses."""
    report = refused(unpack("mixtral-torchscript-missing", tmp_path), tmp_path)
    assert report.wrong_export
    (miss,) = report.near_misses
    assert "holds 2 of 4 experts (missing: " in miss.reason
    assert "Export again with" in miss.reason
    assert str(report).startswith("the export is wrong; nothing was written")
