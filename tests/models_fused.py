"""Graphs with ``com.microsoft.MoE`` as onnxruntime-genai's builder writes them, made by hand.

A decoder layer's second half: a norm, the router (MatMul, Add and a Reshape to two dimensions), the
MoE node on the three-dimensional hidden states with all of its eight inputs, "" for what is not
there, and the residual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "com.microsoft"
EXPERTS, D_MODEL, HIDDEN = 6, 16, 24

GPT_OSS: dict[str, Any] = {
    "activation_type": "swiglu",
    "activation_alpha": 1.702,
    "activation_beta": 1.0,
    "swiglu_limit": 7.0,
    "swiglu_fusion": 1,
    "normalize_routing_weights": 1,
    "use_sparse_mixer": 0,
    "k": 2,
}
QWEN: dict[str, Any] = {
    "activation_type": "swiglu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_fusion": 1,
    "normalize_routing_weights": 1,
    "use_sparse_mixer": 0,
    "k": 2,
}
PHI: dict[str, Any] = {
    "activation_type": "silu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_fusion": 0,
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 1,
    "k": 2,
}


@dataclass
class Weights:
    """Of one layer: (experts, rows, columns), gate and up apart, and biases (experts, rows)."""

    experts: int = EXPERTS
    d_model: int = D_MODEL
    hidden: int = HIDDEN
    biases: bool = False
    seed: int = 3
    zero_biases: bool = False
    arrays: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        e, d, i = self.experts, self.d_model, self.hidden
        shapes = {
            "router": (d, e),
            "router_bias": (e,),
            "gate": (e, i, d),
            "up": (e, i, d),
            "down": (e, d, i),
        }
        self.arrays = {
            n: (generator.standard_normal(s) / s[-1] ** 0.5).astype(np.float32)
            for n, s in shapes.items()
        }
        self.arrays["router"] *= 4
        for name, size in (("gate", i), ("up", i), ("down", d)) if self.biases else ():
            bias = generator.standard_normal((e, size)).astype(np.float32)
            self.arrays[f"{name}_bias"] = bias * (not self.zero_biases)

    def both(self, kind: str, fusion: int) -> np.ndarray | None:
        """Gate and up in one array: rows alternating (1), or one behind the other (2)."""
        if f"gate{kind}" not in self.arrays:
            return None
        gate, up = self.arrays[f"gate{kind}"], self.arrays[f"up{kind}"]
        if fusion == 2:
            return np.concatenate([gate, up], 1)
        return np.stack([gate, up], 2).reshape(gate.shape[0], -1, *gate.shape[2:])


def layer(
    weights: Weights,
    attributes: dict[str, Any],
    third: bool = False,
    rank: int = 3,
    plain: bool = False,
    op_type: str = "MoE",
) -> onnx.ModelProto:
    """The graph: x (batch, seq, d_model) or (tokens, d_model) to y, of the same shape.

    Args:
        weights: of the layer.
        attributes: of the MoE node.
        third: gate in the first weight and up in the third, not both in the first.
        rank: of x.
        plain: the gate's weights alone, for experts without a gate.
        op_type: of the node.
    """
    base, fusion = "/model/layers.0/moe", attributes.get("swiglu_fusion", 0)
    a = weights.arrays
    weight, bias = (f"model.layers.0.moe.router.{n}" for n in ("MatMul.weight", "Add.bias"))
    scale, shape = "model.layers.0.norm.weight", f"/model/constants/INT64/[-1, {weights.experts}]"
    constants: dict[str, np.ndarray] = {
        weight: a["router"],
        bias: a["router_bias"],
        scale: np.float32([1.5]),
        shape: np.int64([-1, weights.experts]),
    }
    router, norm = f"{base}/router", "/model/layers.0/norm/output_0"
    moe_inputs = [norm, f"{router}/{'Reshape' if rank == 3 else 'Add'}/output_0"]
    for part in ("gate_up", "down", "up"):
        for kind, end in (("", "weight"), ("_bias", "bias")):
            name = f"model.layers.0.moe.experts.{part}_proj.{end}"
            if part == "gate_up":
                apart = third or plain
                array = a.get(f"gate{kind}") if apart else weights.both(kind, fusion)
            else:
                array = a.get(f"{part}{kind}") if part == "down" or third else None
            moe_inputs.append(name if array is not None else "")
            if array is not None:
                constants[name] = array
    make = helper.make_node
    nodes = [
        make("Mul", ["x", scale], [norm], "/model/layers.0/norm"),
        make("MatMul", [norm, weight], [f"{router}/MatMul/output_0"], f"{router}/MatMul"),
        make(
            "Add", [f"{router}/MatMul/output_0", bias], [f"{router}/Add/output_0"], f"{router}/Add"
        ),
        make(
            "Reshape",
            [f"{router}/Add/output_0", shape],
            [f"{router}/Reshape/output_0"],
            f"{router}/Reshape",
        ),
        make(
            op_type,
            moe_inputs,
            [f"{base}/{op_type}/output_0"],
            f"{base}/{op_type}",
            domain=DOMAIN,
            **attributes,
        ),
        make("Add", ["x", f"{base}/{op_type}/output_0"], ["y"], "/model/layers.0/residual"),
    ]
    if rank == 2:
        del nodes[3], constants[shape]
    dims = ["batch", "seq", weights.d_model] if rank == 3 else ["tokens", weights.d_model]
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name in ("x", "y", f"{base}/{op_type}/output_0")
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        info[:1],
        info[1:2],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=info[2:],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def inputs(rank: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """x for the graph."""
    shape = (2, 5, D_MODEL) if rank == 3 else (10, D_MODEL)
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
