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

import numpy as np

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


@dataclass(frozen=True)
class Router:
    """How a token's experts and their weights follow from its scores."""

    name: str
    most_experts: int | None
    """Largest ``top_k``; None: all experts."""
    meaning: str

    @property
    def single_expert(self) -> bool:
        """True: only ``top_k`` 1 is meaningful."""
        return self.most_experts == 1


ROUTERS: dict[str, Router] = {
    r.name: r
    for r in (
        Router("default", 1, "expert with the highest score; out = expert(x)"),
        Router(
            "cpm_2",
            1,
            "`default`, but scores come from the RMS-normalised x (weight `layernorm_weight`)",
        ),
        Router(
            "base_layer",
            1,
            "expert with the highest score; out = s * expert(x) + (1 - s) * x, s = sigmoid(score)",
        ),
        Router(
            "softmax_topk",
            None,
            "softmax over all experts, then the `top_k` largest (Mixtral, Qwen, OLMoE; with"
            " `top_k` 1 Switch)",
        ),
        Router("topk_softmax", None, "the `top_k` largest scores, softmax over these (gpt-oss)"),
        Router(
            "sigmoid_topk",
            None,
            "p = sigmoid(scores); the `top_k` largest p + `router_bias` in the `topk_group` best of"
            " `n_group` groups; weights are p (DeepSeek-V3)",
        ),
        Router(
            "sparse_mixer",
            2,
            "expert with the highest score, then that of the others; each one's weight is its share"
            " of a softmax over those not yet chosen, without the scores s for which"
            " (best - s) / max(abs(s), best) > 2 * `router_jitter` (Phi-3.5-MoE, evaluation)",
        ),
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
    biases: tuple[ExpertTensor, ...] = ()
    """Tensors that an expert has beside ``tensors`` when ``expert_bias`` is 1."""
    activation_parameters: bool = False
    """True: it reads ``activation_alpha``, ``activation_beta`` and ``swiglu_limit``."""


_GATED = (
    ExpertTensor("gate_up", ("gate_weight", "up_weight"), ("hidden_size", "d_model")),
    ExpertTensor("down", ("down_weight",), ("d_model", "hidden_size")),
)
_GATED_BIASES = (
    ExpertTensor("gate_up_bias", ("gate_bias", "up_bias"), ("hidden_size",)),
    ExpertTensor("down_bias", ("down_bias",), ("d_model",)),
)
_PLAIN = (
    ExpertTensor("up", ("up_weight",), ("hidden_size", "d_model")),
    ExpertTensor("down", ("down_weight",), ("d_model", "hidden_size")),
)
_PLAIN_BIASES = (
    ExpertTensor("up_bias", ("up_bias",), ("hidden_size",)),
    ExpertTensor("down_bias", ("down_bias",), ("d_model",)),
)


def _gated(name: str, meaning: str, activation_parameters: bool = False) -> SubLayer:
    return SubLayer(name, _GATED, meaning, _GATED_BIASES, activation_parameters)


def _plain(name: str, meaning: str) -> SubLayer:
    return SubLayer(name, _PLAIN, meaning, _PLAIN_BIASES)


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
        _gated("Gated_SiLU", "down(silu(gate(x)) * up(x)) (Mixtral, Qwen, DeepSeek, OLMoE)"),
        _gated("Gated_GELU", "down(gelu(gate(x)) * up(x))"),
        _gated("Gated_GELU_Tanh", "down(gelu_tanh(gate(x)) * up(x))"),
        _gated("Gated_ReLU", "down(relu(gate(x)) * up(x))"),
        _gated(
            "Clamped_SwiGLU",
            "down(g * sigmoid(`activation_alpha` * g) * (u + `activation_beta`)), g = min(gate(x),"
            " `swiglu_limit`), u = up(x) between minus and plus `swiglu_limit` (gpt-oss)",
            activation_parameters=True,
        ),
        _plain("SiLU_FF", "down(silu(up(x)))"),
        _plain("ReLU_FF", "down(relu(up(x))) (Switch)"),
        _plain("GELU_FF", "down(gelu(up(x)))"),
        _plain("GELU_Tanh_FF", "down(gelu_tanh(up(x)))"),
        SubLayer("Identity", (), "x"),
    )
}

_ONLY_FOR_ROUTERS: dict[str, tuple[str, ...]] = {
    "layernorm_weight": ("cpm_2",),
    "router_bias": ("sigmoid_topk",),
    "n_group": ("sigmoid_topk",),
    "topk_group": ("sigmoid_topk",),
    "routed_scaling_factor": tuple(r.name for r in ROUTERS.values() if not r.single_expert),
    "router_jitter": ("sparse_mixer",),
}
"""Attributes that other routers would ignore; there they must be left at their defaults."""


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
    router_bias: tuple[float, ...] | None = field(default=None, repr=False)
    n_group: int = 1
    topk_group: int = 0
    routed_scaling_factor: float = 1.0
    router_jitter: float = 0.01
    expert_centroids: tuple[float, ...] | None = field(default=None, repr=False)
    layernorm_weight: tuple[float, ...] | None = field(default=None, repr=False)
    expert_bias: int = 0
    activation_alpha: float = 1.702
    activation_beta: float = 1.0
    swiglu_limit: float = 7.0
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
    def tensors(self) -> tuple[ExpertTensor, ...]:
        """The tensors of an expert in the order of its slot, biases last."""
        return self.sublayer.tensors + (self.sublayer.biases if self.expert_bias else ())

    @property
    def router(self) -> Router:
        """The definition behind ``moe_variant``."""
        return ROUTERS[self.moe_variant]

    @property
    def chosen_groups(self) -> int:
        """Groups from which a token chooses its experts."""
        return self.topk_group or self.n_group

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
        _range("expert_bias", self.expert_bias, 0, 1)
        most = self.router.most_experts
        if most is not None and self.top_k > most:
            takes = "one expert a token" if most == 1 else f"at most {most} experts a token"
            raise ValueError(
                f"MoELayer: router '{self.moe_variant}' takes {takes}, but attribute 'top_k' is"
                f" {self.top_k}"
            )
        if self.moe_variant == "cpm_2" and self.layernorm_weight is None:
            raise ValueError(
                "MoELayer: attribute 'layernorm_weight' is missing; router 'cpm_2' needs it"
            )
        defaults = {a.name: a.default for a in ATTRIBUTES}
        for name, routers in _ONLY_FOR_ROUTERS.items():
            if self.moe_variant not in routers and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"MoELayer: attribute '{name}' is only for router"
                    f" {' or '.join(map(repr, routers))}, but 'moe_variant' is '{self.moe_variant}'"
                )
        self._check_groups()
        self._check_router_bias()
        self._check_sublayer_attributes()
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
        _finite("router_bias", self.router_bias)
        _number("routed_scaling_factor", self.routed_scaling_factor)
        _number("router_jitter", self.router_jitter, 0.0)
        _number("activation_alpha", self.activation_alpha)
        _number("activation_beta", self.activation_beta)
        _number("swiglu_limit", self.swiglu_limit, 0.0)

    def _check_groups(self) -> None:
        _range("n_group", self.n_group, 1, None)
        _range("topk_group", self.topk_group, 0, None)
        if self.expert_count % self.n_group != 0:
            raise ValueError(
                f"MoELayer: attribute 'n_group' is {self.n_group}, which does not divide the"
                f" {self.expert_count} experts"
            )
        size = self.expert_count // self.n_group
        if self.n_group > 1 and size < 2:
            raise ValueError(
                f"MoELayer: attribute 'n_group' is {self.n_group}, but a group needs at least 2"
                f" experts and there are only {self.expert_count} experts"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"MoELayer: attribute 'topk_group' is {self.topk_group}, but 'n_group' is"
                f" {self.n_group}"
            )
        if self.top_k > self.chosen_groups * size:
            raise ValueError(
                f"MoELayer: attribute 'top_k' is {self.top_k}, but {self.chosen_groups} of"
                f" {self.n_group} groups hold only {self.chosen_groups * size} experts"
            )

    def _check_router_bias(self) -> None:
        if self.router_bias is not None and len(self.router_bias) != self.expert_count:
            raise ValueError(
                f"MoELayer: attribute 'router_bias' must have expert_count = {self.expert_count}"
                f" values, got {len(self.router_bias)}"
            )

    def _check_sublayer_attributes(self) -> None:
        if self.expert_bias and not self.sublayer.biases:
            raise ValueError(
                f"MoELayer: attribute 'expert_bias' is 1, but sub-layer"
                f" '{self.expert_sublayer_type}' has no biases"
            )
        if self.sublayer.activation_parameters:
            return
        defaults = {a.name: a.default for a in ATTRIBUTES}
        for name in ("activation_alpha", "activation_beta", "swiglu_limit"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"MoELayer: attribute '{name}' is not for sub-layer"
                    f" '{self.expert_sublayer_type}', which does not read it"
                )

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


def _coerce(attribute: Attribute, value: Any) -> int | float | str | tuple[float, ...]:
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


def _range(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"MoELayer: attribute '{name}' must be {expected}, got {value}")


def _number(name: str, value: float, low: float | None = None) -> None:
    if not math.isfinite(value):
        text = "NaN" if math.isnan(value) else "infinity"
        raise ValueError(f"MoELayer: attribute '{name}' must be a finite number, got {text}")
    if low is not None and value < low:
        raise ValueError(f"MoELayer: attribute '{name}' must be at least {low:g}, got {value:g}")


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
