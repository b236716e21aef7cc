"""How well a policy can do that knows how a generated trace is made, but not what comes.

It knows each expert's weight and the noise of the last token, hence the probability that an expert
is chosen one, two, ... tokens later, and keeps those with the largest sum, later tokens counting
less. No policy that sees the choices alone can be expected to do better; Belady's optimum can.
"""

from __future__ import annotations

import math

import numpy as np

from moe_infer.simulate import Calls
from moe_infer.simulate.generate import COVERAGE, NOISE, fitted_weights

DISCOUNTS = (0.8, 0.9, 0.95)


def trace_and_noise(
    experts: int, top_k: int, tokens: int, locality: float, seed: int
) -> tuple[Calls, np.ndarray, np.ndarray]:
    """One layer's calls as generate() makes them, the weights, and each token's noise."""
    weights = fitted_weights(experts, top_k, COVERAGE)
    rng = np.random.default_rng(seed)
    noise = np.empty((tokens, experts))
    noise[0] = rng.standard_normal(experts)
    for t in range(1, tokens):
        fresh = math.sqrt(1 - locality**2) * rng.standard_normal(experts)
        noise[t] = locality * noise[t - 1] + fresh
    scores = weights + NOISE * noise
    chosen = np.sort(np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k], axis=1)
    offsets = np.arange(0, tokens * top_k + 1, top_k)
    calls = Calls(experts, offsets, chosen.reshape(-1).astype(np.int32), np.ones(tokens, np.int64))
    return calls, weights, noise


def informed_hit_rate(
    calls: Calls, weights: np.ndarray, noise: np.ndarray, locality: float, slots: int
) -> float:
    """The best of some discounts."""
    scores = weights + NOISE * noise
    top_k = int(calls.offsets[1])
    # A score above it is usually chosen.
    threshold = float(np.mean(np.partition(scores, -top_k, axis=1)[:, -top_k]))
    return max(
        _hit_rate(calls, weights, noise, locality, slots, threshold, discount)
        for discount in DISCOUNTS
    )


def _hit_rate(
    calls: Calls,
    weights: np.ndarray,
    noise: np.ndarray,
    locality: float,
    slots: int,
    threshold: float,
    discount: float,
) -> float:
    ahead = np.arange(1, math.ceil(3 / (1 - discount)) + 1)
    remains = locality**ahead
    spread = NOISE * np.sqrt(1 - remains**2)
    there: set[int] = set()
    hits = 0
    for t, stays in enumerate(noise):
        needed = set(calls.experts[calls.offsets[t] : calls.offsets[t + 1]].tolist())
        hits += len(needed & there)
        there |= needed
        if len(there) > slots:
            mean = weights[:, None] + NOISE * stays[:, None] * remains
            worth = _above((mean - threshold) / spread) @ discount**ahead
            # What a call needs stays until its end.
            order = sorted(there, key=lambda e: (e not in needed, -worth[e]))
            there = set(order[:slots])
    return hits / len(calls.experts)


_GRID = np.linspace(-8, 8, 4001)
_NORMAL = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in _GRID])


def _above(x: np.ndarray) -> np.ndarray:
    """The normal distribution's probability up to x."""
    return np.interp(x, _GRID, _NORMAL)
