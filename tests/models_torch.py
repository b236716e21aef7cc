"""Tiny PyTorch MoE modules, written in the ways in which authors write them.

They are exported by the tests with ``torch.onnx.export(dynamo=True)`` and must be found by the
rewriter. Every module takes ``x`` (batch, seq, d_model) and returns the same shape. The axes of
variation are independent, and :func:`variants` lists the combinations under test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

EXPERTS, D_MODEL, HIDDEN = 6, 16, 24


@dataclass(frozen=True)
class Style:
    """How a module is written; the defaults are the most common form."""

    sublayer: str = "gated"
    """``gated`` or ``t5``."""
    router: str = "softmax_topk"
    """``softmax_topk``, ``topk_softmax``, ``default`` (arg max, weight 1) or ``base_layer``."""
    top_k: int = 2
    normalize: bool = True
    layout: str = "separate"
    """``separate`` gate and up (E, I, d); ``chunk``: (E, 2I, d), gate rows first; ``interleaved``:
    (E, 2I, d), rows alternate; ``transposed``: (E, d, I) and (E, I, d)."""
    product: str = "bmm"
    """``bmm`` or ``einsum`` of gathered weights; or all experts: ``dense`` by einsum, weighted by a
    one-hot mask, ``scatter`` the same with weights scattered into zeros, ``matmul`` by MatMul."""
    linear_router: bool = False
    half: bool = False
    """Weights stored in float16 and cast to float32 where they are used."""

    @property
    def name(self) -> str:
        """For test ids."""
        flags = [self.sublayer, self.router, f"k{self.top_k}", self.layout, self.product]
        flags += ["normalize"] * self.normalize + ["linear"] * self.linear_router
        return "-".join(flags + ["half"] * self.half)


def variants() -> Iterator[Style]:
    """The styles under test: each axis away from the default, and the pairs that interact."""
    base = Style()
    yield base
    yield replace(base, normalize=False)
    yield replace(base, top_k=1, normalize=False)
    yield replace(base, top_k=3)
    yield replace(base, router="topk_softmax", normalize=False)
    for router in ("default", "base_layer"):
        yield replace(base, router=router, top_k=1, normalize=False)
        yield replace(base, sublayer="t5", router=router, top_k=1, normalize=False)
    yield replace(base, sublayer="t5")
    yield replace(base, sublayer="t5", router="topk_softmax", normalize=False)
    for layout in ("chunk", "interleaved", "transposed"):
        yield replace(base, layout=layout)
        yield replace(base, layout=layout, product="einsum")
    yield replace(base, product="einsum")
    yield replace(base, sublayer="t5", product="einsum", router="default", top_k=1, normalize=False)
    yield replace(base, linear_router=True)
    yield replace(base, half=True)
    yield replace(base, half=True, sublayer="t5", router="default", top_k=1, normalize=False)
    for layout in ("separate", "chunk", "transposed"):
        yield replace(base, layout=layout, product="dense")
    yield replace(base, product="scatter")
    yield replace(base, product="matmul")
    yield replace(base, product="dense", router="topk_softmax", normalize=False)
    yield replace(base, product="dense", router="default", top_k=1, normalize=False)


class Moe(nn.Module):
    """One MoE layer in the given style."""

    def __init__(self, style: Style, d: int = D_MODEL, i: int = HIDDEN, e: int = EXPERTS) -> None:
        super().__init__()
        self.style = style
        self.experts = e
        if style.linear_router:
            self.router: nn.Linear | nn.Parameter = nn.Linear(d, e, bias=False)
        else:
            self.router = self._weight(d, e)
        if style.layout in ("chunk", "interleaved"):
            self.gate_up = self._weight(e, 2 * i, d)
        elif style.layout == "transposed":
            self.gate, self.up = self._weight(e, d, i), self._weight(e, d, i)
        else:
            self.gate, self.up = self._weight(e, i, d), self._weight(e, i, d)
        self.down = self._weight(*((e, i, d) if style.layout == "transposed" else (e, d, i)))
        if style.sublayer == "t5":
            self.norm = nn.Parameter(self._half(torch.rand(e, d) + 0.5))

    def _weight(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(self._half(torch.randn(*shape) / shape[-1] ** 0.5))

    def _half(self, value: Tensor) -> Tensor:
        return value.half() if self.style.half else value

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, d_model) to the same."""
        batch, seq, d = x.shape
        x = x.reshape(-1, d)
        scores = self.router(x) if self.style.linear_router else x @ self.router.float()
        weights, chosen = self.route(scores)
        run = self.gathered if self.style.product in ("bmm", "einsum") else self.dense
        out = run(x, weights, chosen)
        if self.style.router == "base_layer":
            assert weights is not None
            out = weights * out + (1 - weights) * x
        return out.view(batch, seq, d)

    def route(self, scores: Tensor) -> tuple[Tensor | None, Tensor]:
        """Weights (tokens, k) and experts (tokens, k)."""
        kind = self.style.router
        if kind == "default":
            return None, scores.argmax(-1, keepdim=True)
        if kind == "base_layer":
            best, chosen = scores.max(-1, keepdim=True)
            return torch.sigmoid(best), chosen
        if kind == "topk_softmax":
            best, chosen = scores.topk(self.style.top_k, -1)
            return torch.softmax(best, -1), chosen
        weights, chosen = torch.softmax(scores, -1).topk(self.style.top_k, -1)
        if self.style.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def gathered(self, x: Tensor, weights: Tensor | None, chosen: Tensor) -> Tensor:
        """The chosen experts' weights are gathered for every (token, expert) pair."""
        tokens, k = chosen.shape
        pair_token = torch.arange(tokens, device=x.device).repeat_interleave(k)
        pair_expert = chosen.reshape(-1)
        xs = x[pair_token]
        out = self.expert(xs, pair_expert)
        if weights is None or self.style.router == "base_layer":
            return out
        return (out * weights.reshape(-1, 1)).view(tokens, k, -1).sum(1)

    def expert(self, x: Tensor, expert: Tensor) -> Tensor:
        """(pairs, d_model) through the experts (pairs)."""
        n = x
        if self.style.sublayer == "t5":
            n = self.norm.float()[expert] * (
                x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            )
        if self.style.layout in ("chunk", "interleaved"):
            both = self.product(self.gate_up, expert, n)
            gate, up = self.split(both)
        else:
            gate, up = self.product(self.gate, expert, n), self.product(self.up, expert, n)
        out = self.product(self.down, expert, self.activate(gate) * up)
        return x + out if self.style.sublayer == "t5" else out

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of their fused projection (..., 2I)."""
        if self.style.layout == "chunk":
            gate, up = both.chunk(2, -1)
            return gate, up
        return both[..., ::2], both[..., 1::2]

    def product(self, weight: Tensor, expert: Tensor, x: Tensor) -> Tensor:
        """x (pairs, columns) through the gathered weight."""
        chosen = weight.float()[expert]
        transposed = self.style.layout == "transposed"
        if self.style.product == "einsum":
            return torch.einsum("ni,nio->no" if transposed else "ni,noi->no", x, chosen)
        if transposed:
            return torch.bmm(x.unsqueeze(1), chosen).squeeze(1)
        return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)

    def activate(self, gate: Tensor) -> Tensor:
        """The sub-layer's activation."""
        if self.style.sublayer == "t5":
            return functional.gelu(gate, approximate="tanh")
        return functional.silu(gate)

    def dense(self, x: Tensor, weights: Tensor | None, chosen: Tensor) -> Tensor:
        """Every expert on every token, weighted by a one-hot mask."""
        if self.style.product == "scatter":
            assert weights is not None
            weight = torch.zeros(x.shape[0], self.experts).scatter(1, chosen, weights)
        else:
            mask = functional.one_hot(chosen, self.experts).to(x.dtype)  # (tokens, k, experts)
            weight = mask.sum(1) if weights is None else (mask * weights.unsqueeze(-1)).sum(1)
        if self.style.product == "matmul":
            return self.dense_matmul(x, weight)
        if self.style.layout == "chunk":
            gate, up = self.split(torch.einsum("td,eid->tei", x, self.gate_up.float()))
        else:
            spec = "td,edi->tei" if self.style.layout == "transposed" else "td,eid->tei"
            gate = torch.einsum(spec, x, self.gate.float())
            up = torch.einsum(spec, x, self.up.float())
        hidden = self.activate(gate) * up
        spec = "tei,eid->ted" if self.style.layout == "transposed" else "tei,edi->ted"
        out = torch.einsum(spec, hidden, self.down.float())
        return (out * weight.unsqueeze(-1)).sum(1)

    def dense_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Every expert by batched MatMul, experts first."""
        gate = torch.matmul(x, self.gate.float().transpose(1, 2))  # (experts, tokens, hidden)
        up = torch.matmul(x, self.up.float().transpose(1, 2))
        out = torch.matmul(self.activate(gate) * up, self.down.float().transpose(1, 2))
        return (out * weight.T.unsqueeze(-1)).sum(0)


class Stack(nn.Module):
    """Layers with a residual around each, and an ordinary projection after them."""

    def __init__(self, style: Style, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Moe(style) for _ in range(layers))
        self.norm = nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, d_model) to (batch, seq, 5)."""
        for block in self.blocks:
            x = self.norm(x + block(x))
        return self.head(x)


def export(
    model: nn.Module,
    path: os.PathLike[str] | str,
    arguments: tuple[Tensor, ...] | None = None,
    opset: int | None = None,
    external: bool = False,
    dynamic: bool = True,
) -> onnx.ModelProto:
    """Exports as a user does; returns the model without its external data.

    Args:
        model: takes ``arguments``, all with (batch, seq) leading.
        path: where the ONNX file goes.
        arguments: example inputs; by default x (2, 5, d_model).
        opset: None is the exporter's default.
        external: weights go to a file beside the model.
        dynamic: batch and seq are symbolic.
    """
    arguments = arguments or (torch.randn(2, 5, D_MODEL),)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    program = torch.onnx.export(
        model.eval(),
        arguments,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=tuple(dims for _ in arguments) if dynamic else None,
        verbose=False,
    )
    assert program is not None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    program.save(os.fspath(path), external_data=external)
    return onnx.load(path, load_external_data=False)
