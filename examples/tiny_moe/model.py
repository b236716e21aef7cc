"""A small decoder-only language model with Mixture-of-Experts layers, in PyTorch.

Two variants, one for each kind of MoE layer:

* ``t5_top1``: experts ``T5_FF`` (the norm and the residual are the expert's own), one a token, the
  one with the highest score (router ``default``).
* ``gated_top2``: experts ``Gated_SiLU``, two a token, softmax over all scores, the two largest,
  their weights divided by their sum (router ``softmax_topk``).

Training computes every expert on every token, which is fast for eight small ones and
differentiable; evaluation computes the chosen ones from stacked weights, which is the form that is
exported. ``tests/test_example.py`` asserts that both agree.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-6
"""Of every RMS norm, and the one that ``T5_FF`` fixes."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model."""

    variant: str
    vocabulary: int = 512
    d_model: int = 160
    layers: int = 4
    heads: int = 5
    experts: int = 8
    hidden: int = 128
    context: int = 256
    dropout: float = 0.15

    @property
    def top_k(self) -> int:
        """Experts a token."""
        return {"t5_top1": 1, "gated_top2": 2}[self.variant]

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + 1e-6), in float32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.float() * _rms_normalise(x)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, in operators that every runtime has."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads, self.size = config.d_model, config.heads, config.d_model // config.heads
        self.qkv = nn.Parameter(torch.randn(d, 3 * d) / math.sqrt(d))
        self.out = nn.Parameter(torch.randn(d, d) / math.sqrt(d * 2 * config.layers))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` (batch, seq, d_model); ``cos`` and ``sin`` (seq, head size / 2)."""
        batch, seq, d = x.shape
        qkv = (x @ self.qkv.float()).view(batch, seq, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (
            _rotate(q, cos, sin) @ _rotate(k, cos, sin).transpose(-1, -2) / math.sqrt(self.size)
        )
        place = torch.arange(seq, device=x.device)
        visible = place[None, :] <= place[:, None]
        scores = torch.where(visible, scores.float(), -1e9)
        mixed = self.dropout(torch.softmax(scores, -1)) @ v
        return mixed.transpose(1, 2).reshape(batch, seq, d) @ self.out.float()


class T5Experts(nn.Module):
    """Experts ``T5_FF``, one a token: x + wo(gelu_tanh(wi_0 n) * (wi_1 n)).

    n = norm * x / sqrt(mean(x^2) + 1e-6), with a norm weight for every expert.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, i = config.experts, config.d_model, config.hidden
        self.router = nn.Parameter(torch.randn(d, e) / math.sqrt(d))
        self.norm = nn.Parameter(torch.ones(e, d))
        self.wi_0 = nn.Parameter(torch.randn(e, i, d) / math.sqrt(d))
        self.wi_1 = nn.Parameter(torch.randn(e, i, d) / math.sqrt(d))
        self.wo = nn.Parameter(torch.randn(e, d, i) / math.sqrt(i * 2 * config.layers))
        self.dropout = nn.Dropout(config.dropout)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d_model) to the same, residual included."""
        scores = _router_scores(x, self.router)
        if self.training:
            return self.forward_dense(x, scores)
        expert_index = scores.argmax(-1)
        n = self.norm.float()[expert_index] * _rms_normalise(x)
        n = n.unsqueeze(-1)
        gate = torch.bmm(self.wi_0.float()[expert_index], n).squeeze(-1)
        up = torch.bmm(self.wi_1.float()[expert_index], n).squeeze(-1)
        hidden = functional.gelu(gate, approximate="tanh") * up
        return x + torch.bmm(self.wo.float()[expert_index], hidden.unsqueeze(-1)).squeeze(-1)

    def forward_dense(self, x: Tensor, scores: Tensor) -> Tensor:
        """The same by computing every expert; gives the router its gradient."""
        probability = torch.softmax(scores, -1)
        chosen = functional.one_hot(scores.argmax(-1), scores.shape[-1])
        self.balance_loss = _balance_loss(probability, chosen)
        # 1 in value: the operator does not scale the expert, but the router must learn from it.
        highest = probability.max(-1, keepdim=True).values
        weight = chosen * (highest / highest.detach())
        n = _rms_normalise(x)
        gate = n @ (self.wi_0 * self.norm[:, None, :]).flatten(0, 1).T
        up = n @ (self.wi_1 * self.norm[:, None, :]).flatten(0, 1).T
        hidden = functional.gelu(gate, approximate="tanh") * up
        return x + self.dropout(_combine(hidden, weight, self.wo))


class GatedExperts(nn.Module):
    """Experts ``Gated_SiLU``, two a token: the weighted sum of down(silu(gate x) * (up x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, i = config.experts, config.d_model, config.hidden
        self.top_k = config.top_k
        self.router = nn.Parameter(torch.randn(d, e) / math.sqrt(d))
        self.gate = nn.Parameter(torch.randn(e, i, d) / math.sqrt(d))
        self.up = nn.Parameter(torch.randn(e, i, d) / math.sqrt(d))
        self.down = nn.Parameter(torch.randn(e, d, i) / math.sqrt(i * 2 * config.layers))
        self.dropout = nn.Dropout(config.dropout)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d_model) to the same."""
        tokens, d = x.shape
        scores = _router_scores(x, self.router)
        probabilities = torch.softmax(scores, -1)
        top_w, top_i = probabilities.topk(self.top_k, -1)
        top_w = top_w / top_w.sum(-1, keepdim=True)
        if self.training:
            return self.forward_dense(x, probabilities, top_w, top_i)
        token_index = torch.arange(tokens, device=x.device).repeat_interleave(self.top_k)
        expert_index = top_i.reshape(-1)
        xs = x[token_index].unsqueeze(-1)
        gate = torch.bmm(self.gate.float()[expert_index], xs).squeeze(-1)
        up = torch.bmm(self.up.float()[expert_index], xs).squeeze(-1)
        hidden = functional.silu(gate) * up
        y = torch.bmm(self.down.float()[expert_index], hidden.unsqueeze(-1)).squeeze(-1)
        return (y * top_w.reshape(-1, 1)).view(tokens, self.top_k, d).sum(1)

    def forward_dense(
        self, x: Tensor, probabilities: Tensor, top_w: Tensor, top_i: Tensor
    ) -> Tensor:
        """The same by computing every expert."""
        chosen = functional.one_hot(top_i, probabilities.shape[-1]).sum(1)
        self.balance_loss = _balance_loss(probabilities, chosen)
        weight = torch.zeros_like(probabilities).scatter(1, top_i, top_w)
        hidden = functional.silu(x @ self.gate.flatten(0, 1).T) * (x @ self.up.flatten(0, 1).T)
        return self.dropout(_combine(hidden, weight, self.down))


class Block(nn.Module):
    """Attention and a MoE layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.variant == "t5_top1":
            self.moe: T5Experts | GatedExperts = T5Experts(config)
            self.moe_norm: RMSNorm | None = None
        else:
            self.moe = GatedExperts(config)
            self.moe_norm = RMSNorm(config.d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, d = x.shape
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        if self.moe_norm is None:
            return self.moe(x.view(-1, d)).view(batch, seq, d)
        return x + self.moe(self.moe_norm(x).view(-1, d)).view(batch, seq, d)


class LanguageModel(nn.Module):
    """``tokens`` (batch, seq) int64 to ``logits`` (batch, seq, vocabulary) float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, d) / math.sqrt(d))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(d)
        size = d // config.heads
        frequency = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
        angle = torch.arange(config.context).float()[:, None] * frequency
        self.register_buffer("cos", torch.cos(angle), persistent=False)
        self.register_buffer("sin", torch.sin(angle), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        embedding = self.embedding.float()
        x = self.dropout(embedding[tokens] * math.sqrt(self.config.d_model))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x) @ embedding.T

    def balance_loss(self) -> Tensor:
        """Mean over the layers; 1 when the experts are used evenly. Of the last training step."""
        return torch.stack([block.moe.balance_loss for block in self.blocks]).mean()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns each pair (x[i], x[i + size / 2]) by its angle."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def _router_scores(x: Tensor, router: Tensor) -> Tensor:
    # In float32 also while the rest trains in bfloat16: a score decides between experts.
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ router.float()


def _rms_normalise(x: Tensor) -> Tensor:
    x = x.float()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPSILON)


def _combine(hidden: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    """(tokens, experts * hidden) times the experts' weights, through all (experts, d, hidden)."""
    experts, d, size = down.shape
    weighted = hidden.view(-1, experts, size) * weight.to(hidden.dtype)[:, :, None]
    return weighted.flatten(1) @ down.transpose(1, 2).reshape(experts * size, d)


def _balance_loss(probability: Tensor, chosen: Tensor) -> Tensor:
    """Switch Transformer's: experts * sum over experts of share of tokens * mean probability."""
    share = chosen.float().mean(0) / chosen.sum(-1).float().mean()
    return probability.shape[-1] * (share * probability.mean(0)).sum()
