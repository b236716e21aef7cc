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
from compare_rewrites import (
    TOLERANCE,
    assert_left_alone,
    check_same,
    edited,
    nodes,
    refused,
    run_lowered,
)
from evaluate_graph import run_runtime
from export_fixtures import recorded, unpack
from moe_infer.weights import open_weight_file

ROUTERS = {  # router, experts a token, normalised
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


# optimum-onnx's gpt-oss: no loop, but every expert on every token


def test_every_expert_on_every_token_is_rewritten(tmp_path: Path) -> None:
    """Its router flattens the tokens and its output does not, so the output is reshaped."""
    path = unpack("gpt-oss-optimum", tmp_path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == 1, str(report)
    (layer,) = report.layers
    assert layer.family == "stacked"
    config = layer.config
    assert (config.expert_sublayer_type, config.expert_bias) == ("Clamped_SwiGLU", 1)
    assert (config.moe_variant, config.top_k) == ("topk_softmax", 2)
    assert not report.near_misses
    assert not report.untyped_values
    assert report.model_path is not None
    inputs, logits = recorded("gpt-oss-optimum")
    feeds = _feeds(path, inputs["input_ids"])
    (made, *_) = run_lowered(report.model_path, feeds)
    np.testing.assert_allclose(made, logits, rtol=0, atol=TOLERANCE)
    shorter = [_feeds(path, inputs["input_ids"][:b, :s]) for b, s in ((1, 1), (2, 5))]
    check_same(path, report.model_path, [feeds, *shorter])
    compared = moe_infer.verify(path, report.model_path, inputs=feeds)
    assert compared, str(compared)
    assert [layer.difference is not None for layer in compared.layers] == [True]


def _weights_added(graph: onnx.GraphProto) -> None:
    (total,) = [n for n in nodes(graph, "ReduceSum") if "experts" in n.name]
    next(n for n in graph.node if total.input[0] in n.output).op_type = "Add"


def _bias_of_each_row(graph: onnx.GraphProto) -> None:
    """Two rows of biases for each expert instead of one."""
    tensor = next(t for t in graph.initializer if list(t.dims) == [4, 1, 16])
    values = onnx.numpy_helper.to_array(tensor).repeat(2, axis=1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_weights_added, "the sum over all experts has no mask of the chosen ones"),
        (_bias_of_each_row, "are combined as if they were one"),
    ],
    ids=["weights added", "a bias for each row"],
)
def test_near_misses_of_gpt_oss(
    edit: Callable[[onnx.GraphProto], None], reason: str, tmp_path: Path
) -> None:
    assert_left_alone(edited(unpack("gpt-oss-optimum", tmp_path), tmp_path, edit), tmp_path, reason)


def test_a_loop_over_the_chosen_experts_becomes_right_for_every_input(tmp_path: Path) -> None:
    """The traced loop runs only when all experts are chosen; the rewritten one always does."""
    path = unpack("mixtral-torchscript", tmp_path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert report.model_path is not None
    inputs, logits = recorded("mixtral-torchscript")
    (first,) = run_lowered(report.model_path, {"input_ids": inputs["input_ids"][:, :1]})
    # The model is causal.
    np.testing.assert_allclose(first, logits[:, :1], rtol=0, atol=TOLERANCE)


def test_a_loop_that_runs_with_fewer_experts_is_left_alone(tmp_path: Path) -> None:
    """Its first pass is then the first expert that was chosen, and no longer expert 0."""

    def equal_parts(graph: onnx.GraphProto) -> None:
        split = max(nodes(graph, "Split"), key=lambda n: len(n.output))
        assert len(split.output) == 4
        del split.input[1]
        split.attribute.append(helper.make_attribute("num_outputs", 4))

    path = edited(unpack("mixtral-torchscript", tmp_path), tmp_path, equal_parts)
    (miss,) = refused(path, tmp_path).near_misses
    assert "does not fail when one is not chosen" in miss.reason


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


def _an_axis_that_there_is_not(graph: onnx.GraphProto) -> None:
    (made,) = [n for n in nodes(graph, "Transpose") if n.input[0] == _first_rows(graph)]
    made.attribute[0].ints[:] = [7, 0]


def _first_rows(graph: onnx.GraphProto) -> str:
    return str(nodes(graph, "NonZero")[0].output[0])


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
    "a malformed node": (_an_axis_that_there_is_not, "the node is malformed (IndexError"),
    "a weight is an input": (_a_weight_is_an_input, "is an input of the graph, not a constant"),
    "a weight is used elsewhere": (_a_weight_is_used_elsewhere, "which is shared with the layer"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone_and_explained(name: str, tmp_path: Path) -> None:
    edit, reason = NEAR[name]
    path = edited(unpack("olmoe-dynamo", tmp_path), tmp_path, edit)
    report = assert_left_alone(path, tmp_path, reason)
    assert not report.wrong_export


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


def test_deepseek_of_transformers_4_is_silently_wrong_and_refused(tmp_path: Path) -> None:
    """A condition on each expert's tokens was decided while tracing; the graph runs nonetheless."""
    path = unpack("deepseek-v3-torchscript-missing", tmp_path)
    inputs, logits = recorded("deepseek-v3-torchscript-missing")
    (computed,) = run_runtime(path, inputs)
    assert np.abs(computed - logits).max() > 100 * TOLERANCE
    report = refused(path, tmp_path)
    assert report.wrong_export
    assert all("holds 2 of 4 experts (missing: 0, 1)" in m.reason for m in report.near_misses)


def test_the_router_of_deepseek_of_transformers_4_is_explained(tmp_path: Path) -> None:
    """With all experts in the loop it computes what PyTorch does, which is not DeepSeek's routing:
    experts outside the chosen groups get 0 instead of minus infinity."""
    path = unpack("deepseek-v3-torchscript", tmp_path)
    inputs, logits = recorded("deepseek-v3-torchscript")
    np.testing.assert_allclose(run_runtime(path, inputs)[0], logits, rtol=0, atol=TOLERANCE)
    report = refused(path, tmp_path)
    assert "it must be minus infinity" in report.near_misses[0].reason
    assert "export with transformers 5" in report.near_misses[0].reason


# Switch Transformers: one expert a token, and capacities


def test_switch_is_rewritten_with_its_capacity(tmp_path: Path) -> None:
    """Of 12 tokens an expert serves 4; the others of its tokens get nothing from the block."""
    path = unpack("switch-torchscript", tmp_path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    (layer,) = report.layers
    config = layer.config
    assert (config.moe_variant, config.top_k) == ("softmax_topk", 1)
    assert config.expert_sublayer_type == "ReLU_FF"
    assert not report.near_misses
    assert not report.untyped_values
    assert report.model_path is not None
    inputs, states = recorded("switch-torchscript")
    (made,) = run_lowered(report.model_path, inputs)
    np.testing.assert_allclose(made, states, rtol=0, atol=TOLERANCE)
    check_same(path, report.model_path, [inputs])
    compared = moe_infer.verify(path, report.model_path, inputs=inputs)
    assert compared, str(compared)
    assert len(compared.layers) == 1
    # It matters: without the mask the outputs are others.
    model = onnx.load(report.model_path)
    (mask,) = [n for n in model.graph.node if n.name.endswith(".masked")]
    (layer_node,) = nodes(model.graph, "MoELayer")
    for node in model.graph.node:
        node.input[:] = [layer_node.output[0] if i == mask.output[0] else i for i in node.input]
    onnx.save(model, report.model_path.with_name("unmasked.onnx"))
    (unmasked,) = run_lowered(report.model_path.with_name("unmasked.onnx"), inputs)
    assert np.abs(unmasked - states).max() > 100 * TOLERANCE


def test_a_capacity_that_no_sequence_reaches_leaves_no_mask(tmp_path: Path) -> None:
    def fixed_length(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4

    path = edited(unpack("switch-torchscript", tmp_path), tmp_path, fixed_length)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == 1, str(report)
    assert report.model_path is not None
    left = {n.op_type for n in onnx.load(report.model_path).graph.node}
    assert not left & {"CumSum", "OneHot", "LessOrEqual"}


def _one(graph: onnx.GraphProto, op_type: str) -> onnx.NodeProto:
    (node,) = nodes(graph, op_type)
    return node


def _running_sum_over_experts(graph: onnx.GraphProto) -> None:
    _constant(graph, _one(graph, "CumSum"), 1, 2)


def _running_sum_exclusive(graph: onnx.GraphProto) -> None:
    _one(graph, "CumSum").attribute.append(helper.make_attribute("exclusive", 1))


def _capacity_of_each_expert(graph: onnx.GraphProto) -> None:
    _constant(graph, _one(graph, "LessOrEqual"), 1, [4, 4, 4, 5])


def _constant(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, value: Any) -> None:
    name = f"constant_{len(graph.initializer)}"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    node.input[position] = name


def _weight_of_another_expert(graph: onnx.GraphProto) -> None:
    """The weight is the smallest probability, which no router gives; it is made inside."""
    _one(graph, "ReduceMax").op_type = "ReduceMin"


NEAR_SWITCH: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "counted over experts": (
        _running_sum_over_experts,
        "a running sum that is not along the tokens",
    ),
    "counted without itself": (
        _running_sum_exclusive,
        "a running sum that does not count the tokens of each expert",
    ),
    "a capacity for each expert": (
        _capacity_of_each_expert,
        "a comparison that no known pattern uses",
    ),
    "another weight": (_weight_of_another_expert, "inside the layer, is also used by"),
}


@pytest.mark.parametrize("name", NEAR_SWITCH)
def test_near_misses_of_switch_are_left_alone_and_explained(name: str, tmp_path: Path) -> None:
    edit, reason = NEAR_SWITCH[name]
    path = edited(unpack("switch-torchscript", tmp_path), tmp_path, edit)
    assert_left_alone(path, tmp_path, reason)


def test_a_number_of_tokens_in_the_graph_is_refused(tmp_path: Path) -> None:
    report = refused(unpack("switch-torchscript-one-token", tmp_path), tmp_path)
    assert report.wrong_export
    (miss,) = report.near_misses
    assert "how many tokens of the sample input went to one of the experts" in miss.reason
    assert "Export again with" in miss.reason


# NLLB-MoE: wrong in both versions


def test_nllb_of_transformers_4_is_no_graph_and_refused(tmp_path: Path) -> None:
    path = unpack("nllb-moe-torchscript", tmp_path)
    with pytest.raises(Exception, match="Einsum"):
        run_runtime(path, recorded("nllb-moe-torchscript")[0])
    report = refused(path, tmp_path)
    assert report.wrong_export
    assert "an Einsum reads a boolean mask" in report.near_misses[0].reason
    assert "replace_moe" in report.near_misses[0].reason


def test_a_mask_of_a_mask_is_refused_and_a_mask_is_not(tmp_path: Path) -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (int64[n] chosen) => (float[n, 4, 4] y)
    <int64[1] depth = {4}, float[2] values = {0.0, 1.0}>
    {
      mask = OneHot <axis = -1> (chosen, depth, values)
      number = Cast <to = 7> (mask)
      y = OneHot <axis = -1> (number, depth, values)
    }
    """
    model = onnx.parser.parse_model(text)
    onnx.save(model, tmp_path / "model.onnx")
    report = refused(tmp_path / "model.onnx", tmp_path)
    assert report.wrong_export
    assert "only experts 0 and 1 are ever computed" in report.near_misses[0].reason
    model.graph.node[2].input[0] = "chosen"
    onnx.save(model, tmp_path / "model.onnx")
    assert not refused(tmp_path / "model.onnx", tmp_path).wrong_export


def test_a_loop_over_the_sample_inputs_experts_is_refused(tmp_path: Path) -> None:
    """One token chose two experts; the loop has two passes, whatever the input chooses."""
    report = refused(unpack("mixtral-torchscript-missing", tmp_path), tmp_path)
    assert report.wrong_export
    (miss,) = report.near_misses
    assert "holds 2 of 4 experts (missing: " in miss.reason
    assert "Export again with" in miss.reason
    assert str(report).startswith("the export is wrong; nothing was written")
