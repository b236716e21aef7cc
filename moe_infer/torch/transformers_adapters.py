"""MoE modules of transformers 5.

Nearly all are a router and a collection of experts, called one after the other by a block that also
adds shared experts. There only these two are exchanged: the router for one that gives its logits,
the experts for the MoELayer, which routes by them; the block stays as it is. Which routers compute
what is told by their classes' names; models that share a router are thus known together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_infer.torch.adapter import MoEAdapter, MoEDescription, Weight, separate, stacked
from moe_infer.torch.eager import gelu_tanh
from moe_infer.torch.layer import MoELayer

Attributes = dict[str, Any]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLU": functional.silu,
    "GELU": functional.gelu,
    "GELU_Tanh": gelu_tanh,
    "ReLU": functional.relu,
}


# --- Routers, by the names of their classes


def _softmax(router: Any) -> Attributes:
    return {
        "moe_variant": "softmax_topk",
        "normalize_routing_weights": int(router.norm_topk_prob),
    }


def _softmax_normalized(router: Any) -> Attributes:
    return {"moe_variant": "softmax_topk", "normalize_routing_weights": 1}


def _softmax_plain(router: Any) -> Attributes:
    return {"moe_variant": "softmax_topk"}


def _of_chosen(router: Any) -> Attributes:
    return {"moe_variant": "topk_softmax"}


def _sigmoid(router: Any) -> Attributes:
    bias = router.e_score_correction_bias.detach().float().cpu()
    return {
        "moe_variant": "sigmoid_topk",
        "normalize_routing_weights": int(router.norm_topk_prob),
        "routed_scaling_factor": float(router.routed_scaling_factor),
        "n_group": int(router.num_group),
        "topk_group": int(router.topk_group),
        **({"router_bias": tuple(bias.tolist())} if bias.any() else {}),
    }


def _sparse_mixer(router: Any) -> Attributes:
    return {"moe_variant": "sparse_mixer", "router_jitter": float(router.router_jitter_noise)}


def _names(text: str, suffix: str) -> list[str]:
    return [f"{name}{suffix}" for name in text.split()]


ROUTERS: dict[str, Callable[[Any], Attributes]] = {
    **dict.fromkeys(
        _names("Mixtral MiniMax Qwen3_5Moe Qwen3VLMoeText", "TopKRouter"), _softmax_normalized
    ),
    **dict.fromkeys(
        _names(
            "Qwen2Moe Qwen3Moe Olmoe FlexOlmo Mellum Qwen3Next Qwen3OmniMoeThinkerText"
            " Qwen3OmniMoeTalkerText Qwen4ExpText",
            "TopKRouter",
        ),
        _softmax,
    ),
    "JambaTopKRouter": _softmax_plain,
    **dict.fromkeys(
        _names(
            "GptOss GraniteMoe GraniteMoeSWA GraniteMoeHybrid GraniteMoeShared AriaText",
            "TopKRouter",
        ),
        _of_chosen,
    ),
    **dict.fromkeys(
        _names(
            "AXK1 BailingHybrid DeepseekV3 DeepseekV32 Dots1 Dots3NoteText ExaoneMoe Glm4Moe"
            " Glm4MoeLite Glm4vMoeText Glm5NextText GlmMoeDsa HYV4 HYV4VL KimiLinear MiMoV2Flash"
            " NemotronH SolarOpen",
            "TopkRouter",
        ),
        _sigmoid,
    ),
    "PhimoeTopKRouter": _sparse_mixer,
}


class _Logits(nn.Module):  # type: ignore[misc]
    """A router that gives its logits alone, in each place where the block expects something."""

    def __init__(self, router: nn.Module, float32: bool) -> None:
        super().__init__()
        self.weight, self.bias = router.weight, getattr(router, "bias", None)
        self.float32 = float32
        self.num_experts = self.weight.shape[0]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, bias = self.weight, self.bias
        if self.float32:
            x, weight = x.float(), weight.float()
            bias = None if bias is None else bias.float()
        else:
            x = x.to(weight.dtype)
        logits = functional.linear(x, weight, bias)
        return logits, logits, logits


class _Experts(nn.Module):  # type: ignore[misc]
    """Takes the experts' place: what comes as the chosen experts are the router's logits."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, logits: Tensor, _: Tensor) -> Tensor:
        experts = self.layer.config.expert_count
        output: Tensor = self.layer(hidden_states, logits.reshape(-1, experts))
        return output


class RouterAndExperts(MoEAdapter):
    """A block with a known router, named ``gate`` or ``router``, and ``experts``."""

    def takes(self, module: nn.Module) -> bool:
        """True when the block has both."""
        return getattr(module, "experts", None) is not None and _router(module) is not None

    def describe(self, module: nn.Module) -> MoEDescription:
        """The router by its class, the experts by the flags that transformers gives them."""
        name = _router(module)
        assert name is not None
        router, experts = getattr(module, name), module.experts
        told = _describe_experts(experts)
        routing = {"top_k": int(router.top_k), **ROUTERS[type(router).__name__](router)}
        return MoEDescription(told.d_model, {**told.attributes, **routing}, told.weights)

    def install(self, module: nn.Module, layer: MoELayer) -> nn.Module:
        """Exchanges router and experts inside the block."""
        name = _router(module)
        assert name is not None
        router = getattr(module, name)
        # These compute their logits in float32 whatever the model's type.
        float32 = layer.config.moe_variant == "sigmoid_topk"
        setattr(module, name, _Logits(router, float32))
        module.experts = _Experts(layer)
        return module


def _router(module: nn.Module) -> str | None:
    for name in ("gate", "router"):
        if type(getattr(module, name, None)).__name__ in ROUTERS:
            return name
    return None


def _describe_experts(experts: Any) -> MoEDescription:
    what = type(experts).__name__
    if not hasattr(experts, "down_proj"):
        raise ValueError(f"{what} has no stacked 'down_proj': transformers 5 is needed")
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(f"{what} holds a part of the experts; load the model without parallelism")
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"{what} has a norm after each expert, which MoELayer has not")
    gated = getattr(experts, "has_gate", True)
    biased = hasattr(experts, "down_proj_bias") and experts.down_proj_bias is not None
    clamped = hasattr(experts, "limit") and hasattr(experts, "alpha")
    transposed = getattr(experts, "is_transposed", clamped)
    concatenated = getattr(experts, "is_concatenated", not clamped)
    if not clamped and not _plain_gate(experts):
        raise ValueError(f"{what} combines gate and up in a way that MoELayer does not know")
    down = experts.down_proj
    count = int(down.shape[0])
    d_model, hidden = (down.shape[2], down.shape[1]) if transposed else down.shape[1:]
    attributes: Attributes = {
        "expert_count": count,
        "hidden_size": int(hidden),
        "expert_bias": int(biased),
    }
    if clamped:
        attributes.update(
            expert_sublayer_type="Clamped_SwiGLU",
            activation_alpha=float(experts.alpha),
            swiglu_limit=float(experts.limit),
        )
    else:
        kind = activation(experts.act_fn, what)
        attributes["expert_sublayer_type"] = f"Gated_{kind}" if gated else f"{kind}_FF"
    weights = {"down_weight": stacked(down, None, transposed)}
    if biased:
        weights["down_bias"] = stacked(experts.down_proj_bias)
    if gated:
        rows = _gate_and_up(int(hidden), concatenated)
        for name, part in rows.items():
            weights[f"{name}_weight"] = stacked(experts.gate_up_proj, part, transposed)
            if biased:
                weights[f"{name}_bias"] = stacked(experts.gate_up_proj_bias, part)
    else:
        weights["up_weight"] = stacked(experts.up_proj, None, transposed)
        if biased:
            weights["up_bias"] = stacked(experts.up_proj_bias)
    return MoEDescription(int(d_model), attributes, weights)


def _plain_gate(experts: Any) -> bool:
    """True where the gate is transformers' default: act(gate) * up."""
    function = getattr(type(experts), "_apply_gate", None)
    return function is None or function.__name__ == "_default_apply_gate"


def _gate_and_up(hidden: int, concatenated: bool) -> dict[str, slice]:
    if concatenated:
        return {"gate": slice(0, hidden), "up": slice(hidden, 2 * hidden)}
    return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}


def activation(function: Callable[[Tensor], Tensor], what: str) -> str:
    """Name of an activation, by what it computes: libraries have many classes for each.

    Raises:
        ValueError: it is none that a sub-layer has.
    """
    x = torch.linspace(-6, 6, 193, dtype=torch.float64)
    with torch.no_grad():
        y = function(x.clone())
        for name, known in _ACTIVATIONS.items():
            if torch.allclose(y, known(x), rtol=0, atol=1e-9):
                return name
    raise ValueError(
        f"{what} has activation {function!r}; sub-layers have {', '.join(_ACTIVATIONS)}"
    )


# --- Models with modules of their own


class Switch(MoEAdapter):
    """Switch Transformers: one expert a token, weighted by its probability.

    transformers drops the tokens of a sequence beyond an expert's ``expert_capacity``; MoELayer
    computes all of them.
    """

    classes = ("SwitchTransformersSparseMLP",)

    def describe(self, module: nn.Module) -> MoEDescription:
        """Plain feed-forward experts, each with tensors of its own."""
        count = module.router.num_experts
        experts = [module.experts[f"expert_{e}"] for e in range(count)]
        hidden, d_model = experts[0].wi.weight.shape
        kind = activation(experts[0].act, type(experts[0]).__name__)
        weights: dict[str, Weight] = {
            "up_weight": separate([e.wi.weight for e in experts]),
            "down_weight": separate([e.wo.weight for e in experts]),
        }
        attributes = {
            "expert_count": count,
            "hidden_size": int(hidden),
            "expert_sublayer_type": f"{kind}_FF",
            "moe_variant": "softmax_topk",
            "top_k": 1,
        }
        return MoEDescription(int(d_model), attributes, weights)

    def install(self, module: nn.Module, layer: MoELayer) -> nn.Module:
        """Exchanges router and experts inside the block."""
        module.router = _Logits(module.router.classifier, True)
        module.experts = _Experts(layer)
        return module


class JetMoe(MoEAdapter):
    """JetMoE's feed-forward experts; its mixture of attention heads is no MoELayer and stays."""

    classes = ("JetMoeMoE",)

    def describe(self, module: nn.Module) -> MoEDescription:
        """Gate rows first, as in most models, under names of its own."""
        gate_up, down = module.input_linear.weight, module.output_linear.weight
        rows = _gate_and_up(int(down.shape[2]), concatenated=True)
        attributes = {
            "expert_count": int(down.shape[0]),
            "hidden_size": int(down.shape[2]),
            "expert_sublayer_type": f"Gated_{activation(module.activation, 'JetMoeMoE')}",
            "moe_variant": "topk_softmax",
            "top_k": int(module.router.top_k),
        }
        weights = {
            "gate_weight": stacked(gate_up, rows["gate"]),
            "up_weight": stacked(gate_up, rows["up"]),
            "down_weight": stacked(down),
        }
        return MoEDescription(int(down.shape[1]), attributes, weights)

    def install(self, module: nn.Module, layer: MoELayer) -> nn.Module:
        """The same with the block's bias, which is added to the weighted sum."""
        return _JetMoeBlock(module.router.layer, layer, module.bias)


class _JetMoeBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, router: nn.Module, layer: MoELayer, bias: nn.Parameter) -> None:
        super().__init__()
        self.router, self.layer, self.bias = router, layer, bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: Tensor = self.layer(x, self.router(x)).reshape(hidden_states.shape) + self.bias
        return output


ADAPTERS: tuple[MoEAdapter, ...] = (RouterAndExperts(), Switch(), JetMoe())
