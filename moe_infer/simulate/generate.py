"""Generated traces with stated statistics.

A token's score of expert e is ``w[e] + z[e]``; it chooses the ``top_k`` highest. The weights ``w``
are fitted so that the experts' shares of the choices follow the given coverage; each layer has
them in another order. The noise ``z`` is normal and, from one token of a sequence to the next,
correlated by ``locality``: z' = locality * z + sqrt(1 - locality^2) * fresh. So ``locality``
changes how soon an expert comes back, and not how often it is chosen.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_infer.simulate.trace import Trace

COVERAGE = (0.69, 0.90, 0.98)
"""Part of the choices that the hottest quarter, half and three quarters of the experts get."""

NOISE = 1.28
"""Standard deviation of z, in units in which the weights are near the logarithm of the shares."""
_FIT_TOKENS = 4096
_FIT_STEPS = 60

Array = np.ndarray[Any, Any]


def generate(
    expert_count: int,
    top_k: int,
    layers: int,
    tokens: int,
    sequences: int = 1,
    locality: float = 0.0,
    coverage: Sequence[float] = COVERAGE,
    seed: int = 0,
) -> Trace:
    """A trace with a given skew and locality; see the module's text.

    Args:
        expert_count: experts of each layer, at least 4.
        top_k: experts of each token.
        layers: number of layers.
        tokens: tokens of each sequence.
        sequences: independent of each other, with the same hot experts.
        locality: correlation of an expert's score between neighbouring tokens, 0 to below 1.
        coverage: what the hottest 1/4, 2/4 and 3/4 of the experts get of the choices; ascending.
        seed: of everything random.

    Raises:
        ValueError: a number is out of its range, or the coverage cannot be reached: an expert would
            have to be chosen more than once by a token.
    """
    if not 0 <= locality < 1:
        raise ValueError(f"locality must be from 0 to below 1, got {locality}")
    for name, value in (("layers", layers), ("tokens", tokens), ("sequences", sequences)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    shares = target_shares(expert_count, top_k, tuple(coverage))
    weights = fitted_weights(expert_count, top_k, tuple(coverage))
    choices = np.empty((layers, sequences, tokens, top_k), np.uint16)
    scored = token_scores(weights, layers, sequences, locality, seed)
    for token, scores in enumerate(itertools.islice(scored, tokens)):
        choices[:, :, token] = np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k]
    covered = ", ".join(f"{share:.2f}" for share in coverage)
    source = (
        f"generated: {expert_count} experts, top {top_k}, quarters cover {covered}, hottest share"
        f" {shares[0]:.3f} of a token's choices, locality {locality:g}, seed {seed}"
    )
    return Trace(expert_count, choices, tuple(f"layer {i}" for i in range(layers)), source)


def token_scores(
    weights: Array, layers: int, sequences: int, locality: float, seed: int
) -> Iterator[Array]:
    """Of one token after the other, without an end: (layers, sequences, experts) scores."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(len(weights)) for _ in range(layers)])
    ordered = weights[order][:, None, :]
    noise = rng.standard_normal((layers, sequences, len(weights)))
    fresh = math.sqrt(1 - locality**2)
    while True:
        yield ordered + NOISE * noise
        noise = locality * noise + fresh * rng.standard_normal(noise.shape)


def target_shares(expert_count: int, top_k: int, coverage: tuple[float, ...] = COVERAGE) -> Array:
    """Share of the choices of each expert, hottest first: (expert_count) float64 with sum 1.

    Inside a quarter the shares fall exponentially, as the quarters do from one to the next; between
    two falls the slower one.

    Raises:
        ValueError: see :func:`generate`.
    """
    if expert_count < 4 or not 0 < top_k <= expert_count:
        raise ValueError(
            f"expert_count must be at least 4 and top_k 1 to expert_count, got {expert_count} and"
            f" {top_k}"
        )
    masses = np.diff([0.0, *coverage, 1.0])
    if len(masses) != 4 or np.any(masses <= 0) or np.any(np.diff(masses) > 0):
        raise ValueError(
            "coverage must be three ascending shares of the hottest 1/4, 2/4 and 3/4 of the"
            f" experts, each quarter with no more than the one before, got {list(coverage)}"
        )
    falls = np.log(masses[:-1] / masses[1:])
    slopes = np.minimum(falls[[0, 0, 1, 2]], falls[[0, 1, 2, 2]]).clip(1e-9)
    at = 4 * np.arange(expert_count + 1) / expert_count
    quarter = np.minimum(at.astype(int), 3)
    inside = -np.expm1(-slopes[quarter] * (at - quarter)) / -np.expm1(-slopes[quarter])
    shares: Array = np.diff(np.array([0.0, *coverage])[quarter] + masses[quarter] * inside)
    if shares[0] * top_k >= 1:
        raise ValueError(
            f"the hottest of {expert_count} experts would get {shares[0] * top_k:.2f} choices of a"
            f" token with top_k {top_k}; lower the coverage or top_k"
        )
    return shares


@functools.lru_cache(maxsize=8)
def fitted_weights(expert_count: int, top_k: int, coverage: tuple[float, ...]) -> Array:
    """Weights whose choices have the target's shares; by repeated correction, always the same."""
    target = target_shares(expert_count, top_k, coverage)
    rng = np.random.default_rng(20)
    weights = np.log(target)
    for step in range(_FIT_STEPS):
        scores = weights + NOISE * rng.standard_normal((_FIT_TOKENS, expert_count))
        chosen = np.argpartition(-scores, top_k - 1, axis=-1)[:, :top_k]
        counts = np.bincount(chosen.reshape(-1), minlength=expert_count) + 0.5
        correction = np.log(target) - np.log(counts / (_FIT_TOKENS * top_k))
        weights += (0.6 if step < _FIT_STEPS // 2 else 0.15) * correction
    return weights
