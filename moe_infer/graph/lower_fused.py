"""Experts through ONNX Runtime's fused operator ``com.microsoft.MoE``, where it computes the same.

What it does was found by experiment (docs/lowering.md): its routing input are logits, over which
it takes a softmax, but among equal logits it does not choose the lower index, and a NaN gives
zeros. So the routing is done before it: it gets the chosen experts' scores and minus infinity for
the others, which leaves it no choice, and its output is multiplied by the sum of the token's
weights (NaN for a token with a NaN among its scores).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from moe_infer.graph.lower_builder import MICROSOFT, Builder
from moe_infer.graph.lower_data import ExpertData
from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.graph.lower_router import Routing

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"

_CUDA_ALIGNMENT = 8
"""Elements by which both sizes of an expert must divide: 16 bytes of a 16-bit type."""

_ACTIVATIONS = {
    "Gated_SiLU": "swiglu",
    "Clamped_SwiGLU": "swiglu",
    "SiLU_FF": "silu",
    "ReLU_FF": "relu",
    "GELU_Tanh_FF": "gelu",
}
"""Its ``activation_type`` for a sub-layer that it has."""

_ELEMENT = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def why_not_fused(layer: LayerNode, provider: str) -> str:
    """Why ``com.microsoft.MoE`` cannot compute the layer on that provider; "" if it can."""
    config = layer.config
    if config.expert_sublayer_type not in _ACTIVATIONS:
        return f"com.microsoft.MoE has no {config.expert_sublayer_type}"
    stacked = [layer.weights.stacked(t.name) for t in config.tensors]
    if any(info is None or not info.stored for info in stacked):
        return "com.microsoft.MoE needs the experts stacked and uncompressed in the file"
    dtypes = {info.dtype for info in stacked if info is not None}
    if provider == CPU_PROVIDER:
        # Its float16 kernel converts the experts of a layer in every run.
        return "" if dtypes == {"float32"} else "com.microsoft.MoE on the CPU needs float32 weights"
    if layer.dtype == "float32" or dtypes != {layer.dtype}:
        return f"com.microsoft.MoE needs weights of the graph's type, one of {', '.join(_ELEMENT)}"
    if config.hidden_size % _CUDA_ALIGNMENT or layer.d_model % _CUDA_ALIGNMENT:
        return f"com.microsoft.MoE needs d_model and hidden_size divisible by {_CUDA_ALIGNMENT}"
    if config.expert_sublayer_type == "GELU_Tanh_FF":
        return "com.microsoft.MoE on CUDA does not say which GELU it has"
    softmax = config.moe_variant in ("softmax_topk", "topk_softmax")
    if config.top_k > 1 and not (softmax and layer.logits_dtype == layer.dtype):
        return "com.microsoft.MoE would round the scores to the graph's type"
    return ""


def lower_fused(
    b: Builder, layer: LayerNode, data: ExpertData, x: str, routing: Routing, provider: str
) -> str:
    """Adds the experts of one layer; see ``lower_experts`` for arguments and result."""
    on_cpu = provider == CPU_PROVIDER  # there in float32, and a Cast to the type that it is harms
    element = TensorProto.FLOAT if on_cpu else _ELEMENT[layer.dtype]
    weights = {t.name: data.stacked(layer, t.name).name for t in layer.config.tensors}
    first = "up" if "up" in weights else "gate_up"
    logits = _only_the_chosen(b, layer, routing)
    output = b.op(
        "MoE",
        x if on_cpu else b.cast(x, element),
        logits if on_cpu else b.cast(logits, element),
        weights[first],
        weights.get(f"{first}_bias", ""),
        weights["down"],
        weights.get("down_bias", ""),
        domain=MICROSOFT,
        k=layer.config.top_k,
        normalize_routing_weights=0,
        **_activation(layer),
    )
    if on_cpu:
        # Before 1.32 ONNX Runtime lets the output take the place of an input that nothing reads
        # afterwards, and its kernel clears the output first. So something does read it.
        output = b.op("Where", b.names.constant(np.array(False)), x, output)
    total = b.sum(routing.weights, 1, keep=True)
    return b.op("Mul", output if on_cpu else b.cast(output, TensorProto.FLOAT), total)


def _activation(layer: LayerNode) -> dict[str, Any]:
    """The attributes that say what an expert computes."""
    config = layer.config
    attributes: dict[str, Any] = {"activation_type": _ACTIVATIONS[config.expert_sublayer_type]}
    if attributes["activation_type"] != "swiglu":
        return attributes
    attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    if config.expert_sublayer_type == "Clamped_SwiGLU":
        attributes["activation_alpha"] = config.activation_alpha
        attributes["activation_beta"] = config.activation_beta
        if config.swiglu_limit > 0:  # there 0 is a limit
            attributes["swiglu_limit"] = config.swiglu_limit
    return attributes


def _only_the_chosen(b: Builder, layer: LayerNode, routing: Routing) -> str:
    """(tokens, expert_count): shares of the chosen experts, minus infinity for the others."""
    chosen = routing.shares
    if layer.config.top_k == 1:
        # One expert has the softmax's whole weight; its own score, which may be infinite, is not
        # needed.
        chosen = b.op("Expand", b.scalar(0.0), b.op("Shape", chosen))
    nothing = b.op("Expand", b.scalar(-np.inf), b.op("Shape", routing.scores))
    return b.op("ScatterElements", nothing, routing.experts, chosen, axis=1)
