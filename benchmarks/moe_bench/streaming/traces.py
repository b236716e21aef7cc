"""Which experts the tokens choose, step by step and layer by layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from moe_bench.cases import Case
from moe_bench.streaming.shapes import COVERAGE
from moe_bench.weights import TORCH_DTYPES

LARGEST = 2.0
STEP = 1 / 8
REST = -4.0


def skewed(
    case: Case,
    layers: int,
    steps: int,
    tokens: int,
    locality: float,
    seed: int,
    device: str = "cuda",
) -> torch.Tensor:
    """Choices (steps, layers, tokens, top_k), int64, each token's highest first.

    In each layer the experts have an order of their own and shares that fall off exponentially, so
    steep that the hottest quarter gets 69 % of the choices; half then get about 90 %, three
    quarters 98 %. A token's choices are its top k of the shares' logarithms plus Gumbel noise. From
    a step to the next each expert's noise stays with the probability ``locality`` and is drawn anew
    otherwise, which leaves the shares as they are.
    """
    generator = torch.Generator(device).manual_seed(seed)
    steepness = _steepness(case.experts, case.top_k)
    ranks = torch.stack(
        [torch.randperm(case.experts, generator=generator, device=device) for _ in range(layers)]
    )
    shares = (-steepness / case.experts) * ranks[:, None, :].float()

    def noise() -> torch.Tensor:
        uniform = torch.rand(
            (layers, tokens, case.experts), generator=generator, device=device
        ).clamp_(1e-30, 1 - 1e-7)
        return -(-uniform.log()).log()

    kept = noise()
    chosen = []
    for _ in range(steps):
        chosen.append((shares + kept).topk(case.top_k, dim=-1).indices)
        fresh = noise()
        stays = torch.rand(kept.shape, generator=generator, device=device) < locality
        kept = torch.where(stays, kept, fresh)
    return torch.stack(chosen)


def few(case: Case, layers: int, steps: int, experts: int, seed: int, device: str) -> torch.Tensor:
    """One token a step that chooses uniformly among the first ``experts`` of each layer."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand((steps, layers, 1, experts), generator=generator, device=device)
    return scores.topk(case.top_k, dim=-1).indices


def changing(case: Case, layers: int, steps: int, seed: int, device: str) -> torch.Tensor:
    """One token a step that takes the next experts of a random order: no step meets the last one's.

    With ``experts / top_k`` steps a round, whatever holds fewer than all experts and evicts the
    least recently used meets none of them again in time.
    """
    generator = torch.Generator(device).manual_seed(seed)
    groups = case.experts // case.top_k
    orders = torch.stack(
        [torch.randperm(case.experts, generator=generator, device=device) for _ in range(layers)]
    )
    cut = orders[:, : groups * case.top_k].view(layers, groups, 1, case.top_k)
    return torch.stack([cut[:, step % groups] for step in range(steps)])


def logits_of(chosen: torch.Tensor, case: Case, dtype: str) -> torch.Tensor:
    """Router logits (..., tokens, experts) that leave no other choice, exact in 16-bit types."""
    logits = torch.full(
        (*chosen.shape[:-1], case.experts), REST, dtype=TORCH_DTYPES[dtype], device=chosen.device
    )
    values = LARGEST - STEP * torch.arange(chosen.shape[-1], device=chosen.device)
    return logits.scatter_(-1, chosen, values.to(logits.dtype).expand(chosen.shape))


def needed(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """(steps, layers, experts) bool: at least one token of the step chose the expert."""
    flat = chosen.flatten(2)
    found = torch.zeros((*flat.shape[:2], experts), dtype=torch.bool, device=chosen.device)
    return found.scatter_(2, flat, True)


def coverage(chosen: torch.Tensor, experts: int) -> dict[str, float]:
    """Part of the choices that go to each layer's hottest quarter, half and three quarters."""
    counts = torch.stack(
        [torch.bincount(layer.flatten(), minlength=experts) for layer in chosen.transpose(0, 1)]
    ).double()
    ordered = counts.sort(dim=-1, descending=True).values.cumsum(-1)
    return {
        f"{part:g}": float((ordered[:, round(part * experts) - 1] / ordered[:, -1]).mean())
        for part in COVERAGE
    }


@functools.cache
def _steepness(experts: int, top_k: int) -> float:
    """How steeply shares must fall for the wanted coverage of the hottest quarter.

    Choices without replacement flatten what the shares say: an expert of share s is among a token's
    with a probability of about 1 - exp(-s t), where t makes the sum top_k.
    """
    quarter = min(COVERAGE)

    def covered(steepness: float) -> float:
        shares = [math.exp(-steepness * rank / experts) for rank in range(experts)]
        t = _root(lambda t: sum(-math.expm1(-s * t) for s in shares) - top_k, 0.0, 1e12)
        chances = [-math.expm1(-s * t) for s in shares]
        return sum(chances[: max(1, round(quarter * experts))]) / sum(chances)

    return _root(lambda a: covered(a) - COVERAGE[quarter], 0.0, 60.0)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a growing function crosses zero."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
