"""Sizes that a graph computes although they are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from moe_infer.graph.known_sizes import fold_known_sizes
from moe_infer.graph.shapes import infer_types


def model_of(nodes: list[Any], constants: dict[str, Any], outputs: list[Any]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 16])
    tensors = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def ran(model: onnx.ModelProto) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 4, 16), dtype=np.float32)
    return list(session.run(None, {"x": x}))


def test_indices_of_a_known_size_become_constants() -> None:
    """As DeepSeek-V3's export makes them: Range over a dimension, cut, and used as indices."""
    model = model_of(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "last"], ["size"], axis=0),
            helper.make_node("Gather", ["shape", "first"], ["batch"], axis=0),
            helper.make_node("Gather", ["shape", "both"], ["sizes"], axis=0),
            helper.make_node("Range", ["zero", "size", "two"], ["even"]),
            helper.make_node("Gather", ["x", "even"], ["y"], axis=2),
        ],
        {"last": 2, "first": 0, "both": [1, -1], "zero": 0, "two": 2},
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8]),
            helper.make_tensor_value_info("batch", TensorProto.INT64, []),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [2]),
        ],
    )
    before = ran(model)
    assert fold_known_sizes(model, infer_types(model)) == 1
    assert [node.op_type for node in model.graph.node] == [
        "Shape",  # the batch is not known
        "Gather",
        "Gather",  # an output of the graph keeps its node
        "Range",
        "Gather",
    ]
    onnx.checker.check_model(model)
    for a, b in zip(before, ran(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_shape_that_is_known_leaves_nothing_behind() -> None:
    model = model_of(
        [
            helper.make_node("Shape", ["x"], ["inner"], start=1),
            helper.make_node("Shape", ["x"], ["outer"], end=-1),
            helper.make_node("Gather", ["outer", "last"], ["rows"], axis=0),
            helper.make_node("Mul", ["inner", "rows"], ["y"]),
        ],
        {"last": 1},
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2])],
    )
    before = ran(model)
    assert fold_known_sizes(model, infer_types(model)) == 2
    assert [node.op_type for node in model.graph.node] == ["Mul"]
    np.testing.assert_array_equal(ran(model)[0], before[0])


def test_an_index_outside_of_the_shape_is_left_to_the_runtime() -> None:
    model = model_of(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "far"], ["y"], axis=0),
        ],
        {"far": 7},
        [helper.make_tensor_value_info("y", TensorProto.INT64, [])],
    )
    assert fold_known_sizes(model, infer_types(model)) == 0
    assert len(model.graph.node) == 2
