"""Which experts the tokens choose, step by step and layer by layer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from moe_bench.cases import Case
from moe_bench.weights import TORCH_DTYPES
from moe_infer.simulate import COVERAGE, generate
from moe_infer.simulate.generate import fitted_weights, token_scores

Array = np.ndarray[Any, Any]

LARGEST = 2.0
STEP = 1 / 8
REST = -4.0
_TOKENS_OF_ALL_LAYERS = 1 << 15


def skewed(
    case: Case,
    layers: int,
    steps: int,
    tokens: int,
    locality: float,
    seed: int,
    device: str = "cuda",
) -> torch.Tensor:
    """Choices (steps, layers, tokens, top_k), int64, of ``moe_infer.simulate.generate``.

    Each step's tokens continue sequences of their own, whose scores are correlated from step to
    step by ``locality``; see there for the skew. Where a step has thousands of tokens, layers take
    the choices of fewer in turn: making them takes long, and nearly all experts are needed.
    """
    distinct = min(layers, max(1, _TOKENS_OF_ALL_LAYERS // tokens))
    trace = generate(
        case.experts, case.top_k, distinct, steps, sequences=tokens, locality=locality, seed=seed
    )
    choices = torch.from_numpy(trace.choices.astype(np.int64))
    turns = torch.arange(layers) % distinct
    return choices[turns].permute(2, 0, 1, 3).contiguous().to(device)


def scores(case: Case, layers: int, steps: int, locality: float, seed: int) -> Array:
    """(layers, 1, steps, experts), of which ``skewed`` with one token chooses the highest."""
    weights = fitted_weights(case.experts, case.top_k, COVERAGE)
    made = token_scores(weights, layers, 1, locality, seed)
    return np.stack(list(itertools.islice(made, steps)), axis=2)


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
        for part in (0.25, 0.5, 0.75)
    }
