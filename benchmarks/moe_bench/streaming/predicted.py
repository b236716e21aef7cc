"""Hit rates that a trace allows: the replay of the library's policy, and Belady's optimum."""

from __future__ import annotations

from typing import Any

import torch


def hit_rates(needed: torch.Tensor, slots: int, skip: int) -> dict[str, Any]:
    """Of the steps from ``skip`` on, over all layers, each layer with an empty cache at first.

    Args:
        needed: (steps, layers, experts) bool.
        slots: of each layer.
        skip: steps before those that count.
    """
    return {}
