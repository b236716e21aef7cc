"""The attributes of one node, checked; the twin of ``ops/core/layer_config.cpp``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from moe_infer.op.attributes import ATTRIBUTES, coerce
from moe_infer.op.names import MAX_EXPERTS, MAX_HIDDEN_SIZE
from moe_infer.op.routers import ROUTERS, Router
from moe_infer.op.sublayers import SUBLAYERS, ExpertTensor, SubLayer

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
            values[name] = coerce(known[name], value)
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
