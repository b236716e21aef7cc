"""Experts written from a graph's weights, biases included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from moe_infer.graph.experts_file import open_constants, write_experts
from moe_infer.graph.match import GraphView, Match, Part
from moe_infer.graph.shapes import infer_types
from moe_infer.op import LayerConfig
from moe_infer.weights import open_expert_weights, open_weight_file

E, D, H = 3, 4, 6


def gpt_oss() -> tuple[Match, dict[str, np.ndarray]]:
    """As its modules keep them: transposed, gate and up in turn, a bias for each product."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (E, D, 2 * H), "b1": (E, 2 * H), "w2": (E, H, D), "b2": (E, D)}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    arrays["b2"] = arrays["b2"].astype(np.float16)  # each tensor has a type of its own
    match = Match(
        family="test",
        hidden_states="x",
        router_logits="l",
        output="y",
        expert_count=E,
        d_model=D,
        hidden_size=H,
        sublayer="Clamped_SwiGLU",
        router="topk_softmax",
        top_k=2,
        normalize=False,
        parts={
            "gate_weight": Part("w1", True, 0, 2),
            "up_weight": Part("w1", True, 1, 2),
            "down_weight": Part("w2", True),
            "gate_bias": Part("b1", False, 0, 2),
            "up_bias": Part("b1", False, 1, 2),
            "down_bias": Part("b2"),
        },
        anchor="y",
    )
    return match, arrays


def view_of(arrays: dict[str, np.ndarray], folder: Path) -> GraphView:
    graph = helper.make_graph(
        [], "g", [], [], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return GraphView(model, infer_types(model), folder)


def test_biases_are_written(tmp_path: Path) -> None:
    match, arrays = gpt_oss()
    assert match.expert_bias
    constants = open_constants(view_of(arrays, tmp_path), match)
    written: list[int] = []
    path = tmp_path / "w.safetensors"
    write_experts(path, [(match, constants)], written.append)
    config = LayerConfig.from_attributes(
        {
            "expert_count": E,
            "hidden_size": H,
            "expert_sublayer_type": "Clamped_SwiGLU",
            "expert_weight_file": str(path),
            "expert_weight_prefix": "layers.0.",
            "expert_bias": 1,
        }
    )
    weights = open_expert_weights(config, D)
    assert weights.dtypes == dict.fromkeys(("gate_up", "down", "gate_up_bias"), "float32") | {
        "down_bias": "float16"
    }
    for e in range(E):
        expert = weights.expert(e)
        np.testing.assert_array_equal(expert["gate_up"], arrays["w1"][e].T)
        np.testing.assert_array_equal(expert["gate_up_bias"], arrays["b1"][e])
        np.testing.assert_array_equal(expert["down"], arrays["w2"][e].T)
        np.testing.assert_array_equal(expert["down_bias"], arrays["b2"][e])
    assert sum(written) == weights.nbytes == sum(a.nbytes for a in arrays.values())


def test_a_bias_of_another_size_is_refused(tmp_path: Path) -> None:
    match, arrays = gpt_oss()
    arrays["b1"] = arrays["b1"][:, :-2]
    with pytest.raises(ValueError, match=r"weight 'b1' has shape \(3, 10\); for gate_bias of 3"):
        open_constants(view_of(arrays, tmp_path), match)


def test_a_match_without_biases(tmp_path: Path) -> None:
    match, arrays = gpt_oss()
    for part in ("gate_bias", "up_bias", "down_bias"):
        del match.parts[part]
    assert not match.expert_bias
    path = tmp_path / "w.safetensors"
    write_experts(path, [(match, open_constants(view_of(arrays, tmp_path), match))], lambda _: None)
    assert set(open_weight_file(path).tensors) == {"layers.0.gate_up", "layers.0.down"}
