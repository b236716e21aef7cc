"""Attributes that say what holds without them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from moe_infer.graph.default_attributes import drop_default_attributes


def _model() -> onnx.ModelProto:
    """Scatters zeros over x, and x over ones by adding; the first inside of an If."""
    branch = helper.make_graph(
        [helper.make_node("ScatterND", ["x", "i", "zeros"], ["a"], reduction="none")],
        "branch",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [4])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "other",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
        helper.make_node("ScatterND", ["ones", "i", "x2"], ["z"], reduction="add"),
        helper.make_node("ScatterElements", ["x", "j", "zeros"], ["w"], reduction="none", axis=0),
        helper.make_node(
            "ScatterND", ["x"], ["other_domain"], domain="somewhere", reduction="none"
        ),
    ]
    constants = {
        "i": np.array([[1], [3]], np.int64),
        "j": np.array([0, 2], np.int64),
        "zeros": np.zeros(2, np.float32),
        "x2": np.full(2, 2, np.float32),
        "ones": np.ones(4, np.float32),
        "yes": np.array(True),
    }
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("x", "y", "z", "w")
    ]
    graph = helper.make_graph(
        nodes[:3],
        "g",
        values[:1],
        values[1:],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.graph.node.append(nodes[3])
    return model


def test_only_defaults_go_and_results_stay() -> None:
    model = _model()
    foreign = model.graph.node.pop()
    x = np.arange(4, dtype=np.float32)

    def run() -> list[np.ndarray]:
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return [np.asarray(value) for value in session.run(None, {"x": x})]

    before = run()
    assert drop_default_attributes(model) == 2
    for a, b in zip(before, run(), strict=True):
        np.testing.assert_array_equal(a, b)
    left = {n.output[0]: [a.name for a in n.attribute] for n in model.graph.node}
    assert left["z"] == ["reduction"]
    assert left["w"] == ["axis"]
    model.graph.node.append(foreign)
    assert drop_default_attributes(model) == 0
