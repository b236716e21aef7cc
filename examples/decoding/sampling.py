"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it.
        top_k: only so many of the likeliest tokens; 0: all.
        top_p: the fewest of the likeliest tokens whose probabilities add up to this; 1: all.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


class Sampler:
    """Chooses tokens; two with the same settings choose the same from the same logits."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """One token from the logits (vocabulary).

        Raises:
            ValueError: the logits hold NaN.
        """
        values = np.asarray(logits, np.float64)
        if np.isnan(values).any():
            raise ValueError("the logits hold NaN; the graph or its weights are damaged")
        if not self.sampling.temperature:
            return int(values.argmax())
        # Stable: among equals the lower token comes first, whatever the platform's sort.
        order = np.argsort(-values, kind="stable")
        scaled = (values[order] - values[order[0]]) / self.sampling.temperature
        probabilities = np.exp(scaled)
        if self.sampling.top_k:
            probabilities[self.sampling.top_k :] = 0
        probabilities /= probabilities.sum()
        if self.sampling.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            probabilities[before >= self.sampling.top_p] = 0
            probabilities /= probabilities.sum()
        return int(order[self._random.choice(len(order), p=probabilities)])
