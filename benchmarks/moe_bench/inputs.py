"""The inputs of one point: several sets, which runs take in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_bench.cases import Case
from moe_bench.routing import choose, make_sets
from moe_bench.weights import TORCH_DTYPES

SETS = {1: 16, 16: 8, 128: 8, 1024: 4, 8192: 3}


@dataclass(frozen=True)
class InputSet:
    """What one run gets.

    Attributes:
        hidden_states: (tokens, d_model), unit variance.
        logits: (tokens, experts), same type.
        chosen: (tokens, top_k) int64, the experts of each token, highest first.
        active: number of experts that at least one token chose.
    """

    hidden_states: torch.Tensor
    logits: torch.Tensor
    chosen: torch.Tensor
    active: int


def make_inputs(
    case: Case,
    dtype: str,
    tokens: int,
    routing: str,
    count: int | None = None,
    seed: int = 1,
    device: str = "cuda",
) -> list[InputSet]:
    """Sets for one point.

    Args:
        case: the layer.
        dtype: of hidden states and logits.
        tokens: in each set.
        routing: one of ``routing.ROUTINGS``.
        count: number of sets; None: enough that a run does not find its weights in the L2 cache.
        seed: the same seed gives the same sets.
        device: where they lie.
    """
    count = count or set_count(tokens)
    generator = torch.Generator(device).manual_seed(seed)
    sets = []
    for logits in make_sets(routing, count, tokens, case.experts, case.top_k, seed):
        chosen = choose(logits, case.top_k)
        x = torch.randn((tokens, case.d_model), device=device, generator=generator)
        sets.append(
            InputSet(
                x.to(TORCH_DTYPES[dtype]),
                torch.from_numpy(logits).to(device, TORCH_DTYPES[dtype]),
                torch.from_numpy(np.ascontiguousarray(chosen)).to(device),
                len(np.unique(chosen)),
            )
        )
    return sets


def set_count(tokens: int) -> int:
    """Sets for a point: more for few tokens, which read few experts."""
    return next((count for most, count in SETS.items() if tokens <= most), 2)


def mean_active(sets: list[InputSet]) -> float:
    """Experts that a run reads, averaged over the sets."""
    return sum(s.active for s in sets) / len(sets)
