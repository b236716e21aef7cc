"""The operator's attributes: kinds, defaults, meanings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_infer.op.names import MAX_EXPERTS


@dataclass(frozen=True)
class Attribute:
    """One attribute of the operator, as the documentation's table shows it."""

    name: str
    kind: Literal["int", "float", "floats", "string"]
    default: int | float | str | None
    """None: there is no default; the attribute is required or depends on others (see meaning)."""
    required: bool
    meaning: str


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("expert_count", "int", None, True, f"number of experts, 1 to {MAX_EXPERTS}"),
    Attribute(
        "hidden_size",
        "int",
        None,
        True,
        "intermediate size of an expert; 0 for a sub-layer that has none",
    ),
    Attribute(
        "expert_sublayer_type", "string", None, True, "what an expert computes: a sub-layer's name"
    ),
    Attribute(
        "expert_weight_file",
        "string",
        "",
        False,
        "the experts' weights, `.npz` or `.safetensors`; required if the sub-layer has weights",
    ),
    Attribute(
        "expert_weight_prefix",
        "string",
        "",
        False,
        "prepended to the names in the file, so that one file can hold every layer",
    ),
    Attribute(
        "expert_weight_digest",
        "string",
        "",
        False,
        "digest of the weight file for which the graph was made; empty: not checked",
    ),
    Attribute(
        "max_concurrency",
        "int",
        2,
        False,
        "most experts of this layer in GPU memory at once; from `expert_count` on they all stay",
    ),
    Attribute("top_k", "int", 1, False, "experts for each token"),
    Attribute("moe_variant", "string", "default", False, "how tokens are routed: a router's name"),
    Attribute(
        "normalize_routing_weights",
        "int",
        0,
        False,
        "1: the chosen experts' weights are divided by their sum (in `sigmoid_topk` + 1e-20)",
    ),
    Attribute(
        "router_bias",
        "floats",
        None,
        False,
        "(expert_count); `sigmoid_topk` adds it to the scores for choosing, not to the weights",
    ),
    Attribute(
        "n_group",
        "int",
        1,
        False,
        "`sigmoid_topk`: the experts form so many groups of equal size, and a token chooses from"
        " the best of them; a group is as good as its two best experts together",
    ),
    Attribute(
        "topk_group",
        "int",
        0,
        False,
        "`sigmoid_topk`: groups from which a token chooses; 0: all",
    ),
    Attribute(
        "routed_scaling_factor",
        "float",
        1.0,
        False,
        "top-k routers: the weights are multiplied by it, last",
    ),
    Attribute(
        "router_jitter",
        "float",
        0.01,
        False,
        "`sparse_mixer`: experts whose scores are farther than twice this below the best one's, in"
        " relation to the larger of the two magnitudes, have no part in its weight",
    ),
    Attribute(
        "expert_centroids",
        "floats",
        None,
        False,
        "router weight (d_model, expert_count), row-major; required without input 1",
    ),
    Attribute(
        "layernorm_weight",
        "floats",
        None,
        False,
        "(d_model); required by the `cpm_2` router, which normalises before it scores",
    ),
    Attribute(
        "expert_bias",
        "int",
        0,
        False,
        "1: the experts' products have biases, see the sub-layers' tensors",
    ),
    Attribute(
        "activation_alpha", "float", 1.702, False, "`Clamped_SwiGLU`: factor inside its sigmoid"
    ),
    Attribute("activation_beta", "float", 1.0, False, "`Clamped_SwiGLU`: is added to `up`"),
    Attribute(
        "swiglu_limit",
        "float",
        7.0,
        False,
        "`Clamped_SwiGLU`: `gate` is clamped to at most this, `up` to this and minus this; 0: not",
    ),
    Attribute(
        "embedding_size",
        "int",
        0,
        False,
        "accepted from InfMoE graphs; 0 or d_model",
    ),
)


def coerce(attribute: Attribute, value: Any) -> int | float | str | tuple[float, ...]:
    """A value in the attribute's kind.

    Raises:
        ValueError: it is of another kind; names the attribute and both.
    """
    if attribute.kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if attribute.kind == "string" and isinstance(value, str):
        return value
    if attribute.kind == "string" and isinstance(value, bytes):
        return value.decode()
    if attribute.kind == "float" and isinstance(value, float | np.floating):
        # ONNX and TensorRT keep 32 bits: 1.702 comes back as 1.7020000219345093. The shortest
        # number that rounds to the same 32 bits is the same before and after.
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))
    if attribute.kind == "floats" and not isinstance(value, str | bytes | int | float):
        return tuple(float(v) for v in value)
    raise ValueError(
        f"MoELayer: attribute '{attribute.name}' must be of type {attribute.kind}, got"
        f" {type(value).__name__}"
    )
