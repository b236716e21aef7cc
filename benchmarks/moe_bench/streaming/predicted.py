"""Hit rates that a trace allows: the replay of the library's policy, and the optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moe_infer.simulate import Calls, optimal_hits, policy_text, replay


def hit_rates(needed: torch.Tensor, slots: int, skip: int) -> dict[str, Any]:
    """Of the steps from ``skip`` on, over all layers; each layer's cache is empty before the first.

    Args:
        needed: (steps, layers, experts) bool.
        slots: of each layer.
        skip: steps before those that count.
    """
    wanted = int(needed[skip:].sum())
    replayed = best = 0
    for layer in range(needed.shape[1]):
        calls = calls_of(needed[:, layer].cpu().numpy())
        found = replay(calls.offsets, calls.experts, calls.expert_count, slots)
        replayed += int(found.hits[skip:].sum())
        best += int(optimal_hits(calls, slots)[skip:].sum())
    return {
        "policy": policy_text(),
        "replay_hit_rate": replayed / wanted,
        "belady_hit_rate": best / wanted,
    }


def calls_of(needed: np.ndarray[Any, np.dtype[np.bool_]]) -> Calls:
    """The calls of one layer, from (steps, experts)."""
    steps, experts = needed.nonzero()
    counts = np.bincount(steps, minlength=len(needed))
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    return Calls(needed.shape[1], offsets, experts.astype(np.int32), np.ones(len(needed), np.int64))
