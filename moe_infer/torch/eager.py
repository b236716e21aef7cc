"""The operator in PyTorch, with the experts read from their mapped file; see ``reference``.

Routing is in float32; an expert computes in the hidden states' type, as the models do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moe_infer.op import LayerConfig
from moe_infer.weights import ExpertWeights

Expert = dict[str, Tensor]


def moe_layer(
    hidden_states: Tensor, router_logits: Tensor, config: LayerConfig, weights: ExpertWeights
) -> Tensor:
    """The whole operator; (..., d_model) and (..., expert_count) to the former's shape and type."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores = router_logits.reshape(-1, config.expert_count)
    experts, shares = route(scores, config)
    output = torch.zeros_like(x)
    run = _SUBLAYERS[config.expert_sublayer_type]
    for e in experts.unique().tolist():
        tokens, choices = torch.nonzero(experts == e, as_tuple=True)
        tensors = _expert(weights, e, x)
        y = run(x[tokens], tensors, config) * shares[tokens, choices, None]
        output.index_add_(0, tokens, y.to(output.dtype))
    return output.reshape(hidden_states.shape)


def route(scores: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Experts (tokens, top_k) and their weights in float32.

    Raises:
        ValueError: the router is one of those that no PyTorch model here has.
    """
    scores = scores.float()
    if config.moe_variant == "softmax_topk":
        shares, experts = _largest(torch.softmax(scores, -1), config.top_k)
    elif config.moe_variant == "topk_softmax":
        shares, experts = _largest(scores, config.top_k)
        shares = torch.softmax(shares, -1)
    elif config.moe_variant == "sigmoid_topk":
        probabilities = torch.sigmoid(scores)
        _, experts = _largest(_ranking(probabilities, config), config.top_k)
        shares = probabilities.gather(-1, experts)
    elif config.moe_variant == "sparse_mixer":
        experts, shares = _sparse_mixer(scores, config)
    else:
        raise ValueError(
            f"router '{config.moe_variant}' is not computed in PyTorch; there are softmax_topk,"
            " topk_softmax, sigmoid_topk and sparse_mixer"
        )
    if config.normalize_routing_weights:
        epsilon = 1e-20 if config.moe_variant == "sigmoid_topk" else 0.0
        shares = shares / (shares.sum(-1, keepdim=True) + epsilon)
    return experts, shares * config.routed_scaling_factor


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # Stable, so that the lower index comes first among equals; torch.topk promises no order.
    order = torch.sort(values, dim=-1, descending=True, stable=True)
    return order.values[..., :count], order.indices[..., :count]


def _ranking(probabilities: Tensor, config: LayerConfig) -> Tensor:
    """Values by which DeepSeek-V3's router chooses."""
    ranking = probabilities
    if config.router_bias is not None:
        ranking = ranking + torch.tensor(config.router_bias, device=ranking.device)
    if config.chosen_groups >= config.n_group:
        return ranking
    groups = ranking.reshape(ranking.shape[0], config.n_group, -1)
    best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
    _, chosen = _largest(best, config.chosen_groups)
    is_open = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
    limited = groups.masked_fill(~is_open.unsqueeze(-1), float("-inf"))
    return limited.reshape(ranking.shape)


def _sparse_mixer(scores: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Phi-3.5-MoE's router in evaluation (https://arxiv.org/abs/2409.12136)."""
    left = scores
    experts, shares = [], []
    for _ in range(config.top_k):
        best, expert = _largest(left, 1)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * config.router_jitter
        share = torch.softmax(left.masked_fill(far, float("-inf")), -1)
        experts.append(expert)
        shares.append(share.gather(-1, expert))
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(experts, -1), torch.cat(shares, -1)


def _expert(weights: ExpertWeights, e: int, like: Tensor) -> Expert:
    """An expert's packed tensors in the type and on the device of ``like``."""
    tensors = {}
    for name, array in weights.expert(e).items():
        if array.dtype.name == "bfloat16":
            array = array.view("u2")
        if not array.flags.aligned:
            array = array.copy()
        with warnings.catch_warnings():
            # The mapped file is read-only, and nothing here writes.
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array)
        if tensor.dtype == torch.uint16:
            tensor = tensor.view(torch.bfloat16)
        tensors[name] = tensor.to(like.device, like.dtype)
    return tensors


def _product(x: Tensor, tensors: Expert, name: str) -> Tensor:
    return functional.linear(x, tensors[name], tensors.get(f"{name}_bias"))


SubLayerFunction = Callable[[Tensor, Expert, LayerConfig], Tensor]
Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """Gelu by its tanh approximation."""
    return functional.gelu(x, approximate="tanh")


def _gated(activation: Activation) -> SubLayerFunction:
    def compute(x: Tensor, tensors: Expert, config: LayerConfig) -> Tensor:
        both = _product(x, tensors, "gate_up")
        return _product(activation(both[:, 0::2]) * both[:, 1::2], tensors, "down")

    return compute


def _plain(activation: Activation) -> SubLayerFunction:
    def compute(x: Tensor, tensors: Expert, config: LayerConfig) -> Tensor:
        return _product(activation(_product(x, tensors, "up")), tensors, "down")

    return compute


def _clamped_swiglu(x: Tensor, tensors: Expert, config: LayerConfig) -> Tensor:
    both = _product(x, tensors, "gate_up")
    limit = config.swiglu_limit or float("inf")
    gate, up = both[:, 0::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
    inner = gate * torch.sigmoid(config.activation_alpha * gate) * (up + config.activation_beta)
    return _product(inner, tensors, "down")


def _t5_ff(x: Tensor, tensors: Expert, config: LayerConfig) -> Tensor:
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    both = _product(tensors["layer_norm"] * normed.to(x.dtype), tensors, "gate_up")
    return x + _product(gelu_tanh(both[:, 0::2]) * both[:, 1::2], tensors, "down")


def _identity(x: Tensor, tensors: Expert, config: LayerConfig) -> Tensor:
    return x


_SUBLAYERS: dict[str, SubLayerFunction] = {
    "T5_FF": _t5_ff,
    "Gated_SiLU": _gated(functional.silu),
    "Gated_GELU": _gated(functional.gelu),
    "Gated_GELU_Tanh": _gated(gelu_tanh),
    "Gated_ReLU": _gated(functional.relu),
    "Clamped_SwiGLU": _clamped_swiglu,
    "SiLU_FF": _plain(functional.silu),
    "ReLU_FF": _plain(functional.relu),
    "GELU_FF": _plain(functional.gelu),
    "GELU_Tanh_FF": _plain(gelu_tanh),
    "Identity": _identity,
}
