"""The MoELayer operator: attributes, defaults, checks and the shape rule.

This is the only definition on the Python side. The rewriter, the lowering, the reference, the
documentation's tables and the tests read it; ``ops/core/layer_config.cpp`` checks the same rules in
C++ with the same messages, and ``tests/test_native_check.py`` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

DOMAIN = "trt.plugins"
"""The only ONNX domain in which ONNX Runtime's TensorRT provider looks for plugins."""

OP_TYPE = "MoELayer"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"

MAX_EXPERTS = 1024
"""Most experts of one layer: the router keeps one row of scores in shared memory."""

MAX_HIDDEN_SIZE = 2**30 - 1
"""Largest intermediate size: the kernels count gate and up columns together in 32 bits."""

RMS_NORM_EPSILON = 1e-6
"""Epsilon of the RMS normalisation in ``T5_FF`` and in the ``cpm_2`` router."""

DTYPES = ("float32", "float16", "bfloat16")
"""Types of ``hidden_states``, and of the weights in the file (the two are independent)."""


@dataclass(frozen=True)
class Attribute:
    """One attribute of the operator, as the documentation's table shows it."""

    name: str
    kind: Literal["int", "floats", "string"]
    default: int | str | None
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
        "1: the chosen experts' weights are divided by their sum",
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
        "embedding_size",
        "int",
        0,
        False,
        "accepted from InfMoE graphs; 0 or d_model",
    ),
)


@dataclass(frozen=True)
class Router:
    """How a token's experts and their weights follow from its scores."""

    name: str
    single_expert: bool
    """True: only ``top_k`` 1 is meaningful."""
    meaning: str


ROUTERS: dict[str, Router] = {
    r.name: r
    for r in (
        Router("default", True, "expert with the highest score; out = expert(x)"),
        Router(
            "cpm_2",
            True,
            "`default`, but scores come from the RMS-normalised x (weight `layernorm_weight`)",
        ),
        Router(
            "base_layer",
            True,
            "expert with the highest score; out = s * expert(x) + (1 - s) * x, s = sigmoid(score)",
        ),
        Router(
            "softmax_topk",
            False,
            "softmax over all experts, then the `top_k` largest (Mixtral, Qwen, OLMoE)",
        ),
        Router("topk_softmax", False, "the `top_k` largest scores, softmax over these (gpt-oss)"),
    )
}


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert, in the layout in which the kernels read it.

    A file holds it either stacked over the experts, under ``name`` with shape
    (expert_count, *shape), or for each expert ``e`` as the parts ``e/PART``. With two parts the
    rows of the packed tensor alternate: row 2i is row i of the first part, row 2i+1 of the second.
    """

    name: str
    parts: tuple[str, ...]
    part_shape: tuple[Literal["hidden_size", "d_model"], ...]
    """Shape of each part; the packed tensor has len(parts) times as many rows."""

    def shape(self, d_model: int, hidden_size: int) -> tuple[int, ...]:
        """Packed shape for one expert."""
        rows, *rest = self.resolve_part_shape(d_model, hidden_size)
        return (rows * len(self.parts), *rest)

    def resolve_part_shape(self, d_model: int, hidden_size: int) -> tuple[int, ...]:
        """Shape of one part as a file with separate experts holds it."""
        sizes = {"d_model": d_model, "hidden_size": hidden_size}
        return tuple(sizes[s] for s in self.part_shape)


@dataclass(frozen=True)
class SubLayer:
    """What one expert computes."""

    name: str
    tensors: tuple[ExpertTensor, ...]
    meaning: str


SUBLAYERS: dict[str, SubLayer] = {
    s.name: s
    for s in (
        SubLayer(
            "T5_FF",
            (
                ExpertTensor("layer_norm", ("layer_norm_weight",), ("d_model",)),
                ExpertTensor("gate_up", ("wi_0_weight", "wi_1_weight"), ("hidden_size", "d_model")),
                ExpertTensor("down", ("wo_weight",), ("d_model", "hidden_size")),
            ),
            "x + down(gelu_tanh(gate(n)) * up(n)), n = layer_norm * x / sqrt(mean(x^2) + 1e-6)",
        ),
        SubLayer(
            "Gated_SiLU",
            (
                ExpertTensor("gate_up", ("gate_weight", "up_weight"), ("hidden_size", "d_model")),
                ExpertTensor("down", ("down_weight",), ("d_model", "hidden_size")),
            ),
            "down(silu(gate(x)) * up(x)) (Mixtral, Qwen, DeepSeek, OLMoE)",
        ),
        SubLayer("Identity", (), "x"),
    )
}


@dataclass(frozen=True)
class LayerConfig:
    """The attributes of one MoELayer node, checked.

    Construct it through :meth:`from_attributes`; the fields are the operator's attributes.
    """

    expert_count: int
    hidden_size: int
    expert_sublayer_type: str
    expert_weight_file: str = ""
    expert_weight_prefix: str = ""
    expert_weight_digest: str = ""
    max_concurrency: int = 2
    top_k: int = 1
    moe_variant: str = "default"
    normalize_routing_weights: int = 0
    expert_centroids: tuple[float, ...] | None = field(default=None, repr=False)
    layernorm_weight: tuple[float, ...] | None = field(default=None, repr=False)
    embedding_size: int = 0

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> LayerConfig:
        """Builds a configuration and checks all that does not need the inputs.

        Raises:
            ValueError: an attribute is unknown, missing, of the wrong kind or out of range; the
                message names it, what was found and what was expected.
        """
        known = {a.name: a for a in ATTRIBUTES}
        values: dict[str, Any] = {}
        for name, value in attributes.items():
            if name not in known:
                raise ValueError(
                    f"MoELayer: unknown attribute '{name}'; known are {', '.join(sorted(known))}"
                )
            values[name] = _coerce(known[name], value)
        for attribute in ATTRIBUTES:
            if attribute.required and attribute.name not in values:
                raise ValueError(f"MoELayer: attribute '{attribute.name}' is missing")
        config = cls(**values)
        config._check()
        return config

    @property
    def sublayer(self) -> SubLayer:
        """The definition behind ``expert_sublayer_type``."""
        return SUBLAYERS[self.expert_sublayer_type]

    @property
    def router(self) -> Router:
        """The definition behind ``moe_variant``."""
        return ROUTERS[self.moe_variant]

    @property
    def resident(self) -> bool:
        """True when all experts stay on the GPU."""
        return self.max_concurrency >= self.expert_count

    def to_attributes(self) -> dict[str, Any]:
        """The attributes that differ from their defaults or have none, for an ONNX node."""
        defaults = {a.name: a.default for a in ATTRIBUTES}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def _check(self) -> None:
        # The order of the checks and their texts are those of LayerConfig::check in C++.
        _range("expert_count", self.expert_count, 1, MAX_EXPERTS)
        _range("max_concurrency", self.max_concurrency, 1, None)
        _range("top_k", self.top_k, 1, None)
        if self.top_k > self.expert_count:
            raise ValueError(
                f"MoELayer: attribute 'top_k' is {self.top_k}, but there are only"
                f" {self.expert_count} experts"
            )
        _one_of("expert_sublayer_type", self.expert_sublayer_type, SUBLAYERS)
        _one_of("moe_variant", self.moe_variant, ROUTERS)
        if self.sublayer.tensors:
            _range("hidden_size", self.hidden_size, 1, MAX_HIDDEN_SIZE)
            if not self.expert_weight_file:
                raise ValueError(
                    "MoELayer: attribute 'expert_weight_file' is missing; sub-layer"
                    f" '{self.expert_sublayer_type}' has weights"
                )
        else:
            _range("hidden_size", self.hidden_size, 0, MAX_HIDDEN_SIZE)
        _range("embedding_size", self.embedding_size, 0, None)
        _range("normalize_routing_weights", self.normalize_routing_weights, 0, 1)
        if self.router.single_expert and self.top_k != 1:
            raise ValueError(
                f"MoELayer: router '{self.moe_variant}' takes one expert a token, but attribute"
                f" 'top_k' is {self.top_k}"
            )
        if self.moe_variant == "cpm_2":
            if self.layernorm_weight is None:
                raise ValueError(
                    "MoELayer: attribute 'layernorm_weight' is missing; router 'cpm_2' needs it"
                )
        elif self.layernorm_weight is not None:
            raise ValueError(
                "MoELayer: attribute 'layernorm_weight' is only for router 'cpm_2', but"
                f" 'moe_variant' is '{self.moe_variant}'"
            )
        if (
            self.expert_centroids is not None
            and len(self.expert_centroids) % self.expert_count != 0
        ):
            raise ValueError(
                f"MoELayer: attribute 'expert_centroids' has {len(self.expert_centroids)} values,"
                f" which is no multiple of the {self.expert_count} experts"
            )
        _finite("expert_centroids", self.expert_centroids)
        _finite("layernorm_weight", self.layernorm_weight)

    def check_inputs(self, d_model: int, has_router_logits: bool) -> None:
        """Checks what depends on the inputs: d_model and whether input 1 is there.

        Raises:
            ValueError: an attribute does not fit the inputs.
        """
        if d_model < 1:
            raise ValueError(
                f"MoELayer: the last dimension of hidden_states must be at least 1, got {d_model}"
            )
        if self.embedding_size not in (0, d_model):
            raise ValueError(
                f"MoELayer: attribute 'embedding_size' is {self.embedding_size}, but the last"
                f" dimension of hidden_states is {d_model}"
            )
        if has_router_logits:
            if self.expert_centroids is not None:
                raise ValueError(
                    "MoELayer: both input 1 (router_logits) and attribute 'expert_centroids' are"
                    " given; give one of them"
                )
            if self.moe_variant == "cpm_2":
                raise ValueError(
                    "MoELayer: router 'cpm_2' computes its own scores; remove input 1"
                    " (router_logits) and give attribute 'expert_centroids'"
                )
        else:
            if self.expert_centroids is None:
                raise ValueError(
                    "MoELayer: without input 1 (router_logits) attribute 'expert_centroids' is"
                    " needed"
                )
            if len(self.expert_centroids) != d_model * self.expert_count:
                raise ValueError(
                    f"MoELayer: attribute 'expert_centroids' must have d_model * expert_count ="
                    f" {d_model} * {self.expert_count} = {d_model * self.expert_count} values,"
                    f" got {len(self.expert_centroids)}"
                )
        if self.layernorm_weight is not None and len(self.layernorm_weight) != d_model:
            raise ValueError(
                f"MoELayer: attribute 'layernorm_weight' must have d_model = {d_model} values,"
                f" got {len(self.layernorm_weight)}"
            )


def output_shape(hidden_states: Sequence[int | str | None]) -> tuple[int | str | None, ...]:
    """Shape of the output: that of ``hidden_states``.

    Raises:
        ValueError: the rank is not 2 or 3.
    """
    if len(hidden_states) not in (2, 3):
        raise ValueError(
            "MoELayer: hidden_states must have shape (tokens, d_model) or (batch, seq, d_model),"
            f" got rank {len(hidden_states)}"
        )
    return tuple(hidden_states)


def _coerce(attribute: Attribute, value: Any) -> int | str | tuple[float, ...]:
    if attribute.kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if attribute.kind == "string" and isinstance(value, str):
        return value
    if attribute.kind == "string" and isinstance(value, bytes):
        return value.decode()
    if attribute.kind == "floats" and not isinstance(value, str | bytes | int | float):
        return tuple(float(v) for v in value)
    raise ValueError(
        f"MoELayer: attribute '{attribute.name}' must be of type {attribute.kind}, got"
        f" {type(value).__name__}"
    )


def _range(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"MoELayer: attribute '{name}' must be {expected}, got {value}")


def _one_of(name: str, value: str, known: Mapping[str, object]) -> None:
    if value not in known:
        raise ValueError(
            f"MoELayer: attribute '{name}' is '{value}'; known are {', '.join(sorted(known))}"
        )


def _finite(name: str, values: Sequence[float] | None) -> None:
    for i, value in enumerate(values or ()):
        if not math.isfinite(value):
            text = "NaN" if math.isnan(value) else "infinity"
            raise ValueError(f"MoELayer: attribute '{name}' has {text} at position {i}")
