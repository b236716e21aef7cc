"""Shapes that graphs compute, as ONNX Runtime does; None where a dimension is not known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from moe_infer.graph.match import GraphView
from moe_infer.graph.shape_values import ShapeValues
from moe_infer.graph.shapes import infer_types

# Each computes `y` from the shape of x, which is (n, 6, 4).
CHAINS: dict[str, tuple[str, list[int | None]]] = {
    "shape": ("y = Shape (x)", [None, 6, 4]),
    "part of a shape": ("y = Shape <start = 1, end = -1> (x)", [6]),
    "half": (
        "s = Shape (x)\n i = Constant <value = int64[1] {-1}> ()\n g = Gather (s, i)\n"
        " two = Constant <value = int64[1] {2}> ()\n one = Constant <value = int64[1] {1}> ()\n"
        " a = Add (g, one)\n h = Div (a, two)\n y = Concat <axis = 0> (h, g)",
        [2, 4],
    ),
    "division of negative numbers": (
        "a = Constant <value = int64[4] {-7, 7, -7, 7}> ()\n"
        " b = Constant <value = int64[4] {2, -2, -2, 2}> ()\n y = Div (a, b)",
        [-3, -3, 3, 3],
    ),
    "slice and squeeze": (
        "s = Shape (x)\n b = Constant <value = int64[1] {-2}> ()\n"
        " e = Constant <value = int64[1] {9223372036854775807}> ()\n"
        " z = Constant <value = int64[1] {0}> ()\n c = Slice (s, b, e, z)\n"
        " f = Constant <value = int64[1] {1}> ()\n d = Slice (c, z, f, z)\n"
        " q = Squeeze (d, z)\n y = Unsqueeze (q, z)",
        [6],
    ),
    "one-hot of repetitions": (
        "s = Shape <start = 1, end = 2> (x)\n one = Constant <value = int64[1] {1}> ()\n"
        " v = Concat <axis = 0> (one, s)\n depth = Constant <value_int = 3> ()\n"
        " h = OneHot (one, depth, v)\n m = Constant <value = int64[1] {-1}> ()\n"
        " y = Reshape (h, m)",
        [1, 6, 1],
    ),
    "where a dimension is kept": (
        "c = Constant <value = int64[3] {-1, 6, 4}> ()\n n = Constant <value = int64[1] {3}> ()\n"
        " o = ConstantOfShape <value = int64[1] {1}> (n)\n"
        " m = Constant <value_int = -1> ()\n k = Mul (o, m)\n q = Equal (c, k)\n"
        " y = Where (q, o, c)",
        [1, 6, 4],
    ),
    "arithmetic with what is not known": (
        "s = Shape (x)\n t = Constant <value = int64[1] {2}> ()\n y = Mul (s, t)",
        [None, 12, 8],
    ),
    "cast and identity": ("s = Shape (x)\n c = Cast <to = 6> (s)\n y = Identity (c)", [None, 6, 4]),
}


def _model(body: str) -> onnx.ModelProto:
    head = '<ir_version: 9, opset_import: ["" : 20]>\n g (float[n, 6, 4] x) => (int64[m] y) {\n '
    return onnx.parser.parse_model(f"{head}{body}\n}}")


def _values(model: onnx.ModelProto) -> ShapeValues:
    types = infer_types(model)
    return ShapeValues(GraphView(model, types, Path(".")), types.shape)


@pytest.mark.parametrize(("body", "expected"), CHAINS.values(), ids=CHAINS.keys())
def test_values(body: str, expected: list[int | None]) -> None:
    model = _model(body)
    assert _values(model).ints("y") == expected
    ort = pytest.importorskip("onnxruntime")
    if "Cast" in body:
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (0, 1, 5):
        (actual,) = session.run(None, {"x": np.zeros((n, 6, 4), np.float32)})
        known = [int(a) if e is not None else None for a, e in zip(actual, expected, strict=True)]
        assert known == expected


UNKNOWN: dict[str, str] = {
    "not there": "y = Identity (nothing)",
    "floating point": "c = Constant <value = float[2] {1, 2}> ()\n y = Identity (c)",
    "computed from values": "y = NonZero (x)",
    "division by zero": (
        "a = Constant <value = int64[1] {1}> ()\n b = Constant <value = int64[1] {0}> ()\n"
        " y = Div (a, b)"
    ),
    "gather outside": (
        "s = Shape (x)\n i = Constant <value = int64[1] {9}> ()\n y = Gather (s, i)"
    ),
    "huge": ("n = Constant <value = int64[2] {1000000, 1000000}> ()\n y = ConstantOfShape (n)"),
    "shapes that do not fit": (
        "a = Constant <value = int64[2] {1, 2}> ()\n b = Constant <value = int64[3] {1, 2, 3}> ()\n"
        " y = Add (a, b)"
    ),
    "itself": "y = Identity (y)",
    "no inputs": "y = Concat <axis = 0> ()",
    "a missing input": "s = Shape (x)\n y = Gather (s)",
}


@pytest.mark.parametrize("body", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_cannot_be_evaluated_is_none(body: str) -> None:
    assert _values(_model(body)).ints("y") is None


def test_a_long_chain_ends() -> None:
    names = [f"v{i}" for i in range(5000)]
    lines = [f"{b} = Identity ({a})" for a, b in pairwise(names)]
    body = "\n ".join(["v0 = Shape (x)", *lines, f"y = Identity ({names[-1]})"])
    assert _values(_model(body)).ints("y") is None
