"""Scatters of consecutive rows become concatenations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from moe_infer.graph.scatter_to_concat import concatenate_scatters
from moe_infer.graph.shapes import infer_types

ROWS, COLUMNS = 6, 3


def _model(indices: list[Any], constants: dict[str, Any], rows: int, **reduction: str) -> Any:
    """y = x with u, (rows, 3), scattered by what these nodes call "i"."""
    node = helper.make_node("ScatterND", ["x", "i", "u"], ["y"], "scatter", **reduction)
    tensors = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items()]
    shapes = {"x": [ROWS, "columns"], "u": [rows, "columns"], "y": [ROWS, "columns"]}
    x, u, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph([*indices, node], "g", [x, u], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _run(model: Any, rows: int) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {
        n: rng.standard_normal((r, COLUMNS), np.float32) for n, r in (("x", ROWS), ("u", rows))
    }
    return session.run(None, feeds)[0]


def _range(first: int, end: int, whole: int = ROWS) -> tuple[list[Any], dict[str, Any]]:
    """As PyTorch's exporter writes x[first:end]: a part of the range over all rows."""
    nodes = [
        helper.make_node("Range", ["zero", "whole", "one"], ["all"]),
        helper.make_node("Slice", ["all", "first", "end", "axis", "step"], ["part"]),
        helper.make_node("Unsqueeze", ["part", "last"], ["i"]),
    ]
    return nodes, {
        "zero": 0,
        "whole": whole,
        "one": 1,
        "first": [first],
        "end": [end],
        "axis": [0],
        "step": [1],
        "last": [-1],
    }


@pytest.mark.parametrize(
    ("first", "end", "parts"),
    [(0, 4, 1), (2, 2**63 - 1, 1), (1, 3, 2), (0, ROWS, 0), (-2, 2**63 - 1, 1)],
)
def test_a_range_is_concatenated(first: int, end: int, parts: int) -> None:
    rows = len(range(*slice(first, end).indices(ROWS)))
    model = _model(*_range(first, end), rows, reduction="none")
    before = _run(model, rows)
    types = infer_types(model)
    assert concatenate_scatters(model, types) == 1
    onnx.checker.check_model(model, full_check=True)
    made = [node.op_type for node in model.graph.node]  # the range is gone
    assert made == ["Slice"] * parts + ["Concat"]
    for node in model.graph.node[:-1]:
        assert len(types.shape(node.output[0])) == 2  # stated for TensorRT
    np.testing.assert_array_equal(_run(model, rows), before)
    assert concatenate_scatters(model, infer_types(model)) == 0


def test_constant_indices_are_too() -> None:
    model = _model([], {"i": [[2], [3], [4]]}, 3)
    before = _run(model, 3)
    assert concatenate_scatters(model, infer_types(model)) == 1
    np.testing.assert_array_equal(_run(model, 3), before)


@pytest.mark.parametrize(
    ("indices", "constants", "rows", "reduction"),
    [
        ([], {"i": [[2], [4]]}, 2, "none"),  # a gap
        ([], {"i": [[3], [2]]}, 2, "none"),  # backwards
        ([], {"i": [[-2], [-1]]}, 2, "none"),  # from the end
        ([], {"i": [[2], [3]]}, 2, "add"),
        ([*_range(0, 4)[0]], {**_range(0, 4)[1], "step": [2]}, 2, "none"),
    ],
)
def test_others_stay(indices: list[Any], constants: Any, rows: int, reduction: str) -> None:
    model = _model(indices, constants, rows, reduction=reduction)
    before = model.SerializeToString()
    assert concatenate_scatters(model, infer_types(model)) == 0
    assert model.SerializeToString() == before


def test_an_index_of_less_than_a_row_stays() -> None:
    scatter = helper.make_node("ScatterND", ["x", "i", "u"], ["y"])
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", [ROWS, COLUMNS]), ("u", [2]), ("y", [ROWS, COLUMNS]))
    ]
    index = numpy_helper.from_array(np.array([[0, 1], [1, 2]], np.int64), "i")
    graph = helper.make_graph([scatter], "g", values[:2], values[2:], [index])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert concatenate_scatters(model, infer_types(model)) == 0
