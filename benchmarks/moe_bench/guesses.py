"""Guesses of the experts that tokens choose, of a stated quality."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def best(scores: Array, count: int) -> Array:
    """The largest ``count`` of the last axis, largest first, ties to the lower index."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


def recall(guess: Array, chosen: Array) -> float:
    """Part of the chosen experts that is among those guessed for the token."""
    return float((chosen[..., :, None] == guess[..., None, :]).any(-1).mean())


def by_recall(
    scores: Array, top_k: int, recalls: Iterable[float], length: int
) -> dict[float, Array]:
    """Guesses whose scores are the true ones plus normal noise, as much as gives each recall.

    Args:
        scores: (layers, sequences, tokens, experts), whose ``top_k`` highest are chosen.
        top_k: experts a token, and as many guesses are what the recall is of.
        recalls: wanted, 0 to 1.
        length: guesses a token.

    Returns:
        By recall, (layers, sequences, tokens, length), most likely first; the noise differs in
        nothing but its size.
    """
    chosen = best(scores, top_k)
    noise = np.random.default_rng(1).standard_normal(scores.shape, np.float32)
    return {
        wanted: best(scores + _fitted(scores, noise, chosen, wanted) * noise, length)
        for wanted in recalls
    }


def _fitted(scores: Array, noise: Array, chosen: Array, wanted: float) -> float:
    """How much noise gives the recall; by halving."""
    some = (slice(None), slice(None), slice(100))
    low, high = 0.0, 20.0
    for _ in range(16):
        middle = (low + high) / 2
        guess = best(scores[some] + middle * noise[some], chosen.shape[-1])
        low, high = (middle, high) if recall(guess, chosen[some]) > wanted else (low, middle)
    return low
