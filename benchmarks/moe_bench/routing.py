"""Router logits with a wanted spread over the experts."""

from __future__ import annotations

from typing import Any

import numpy as np

ROUTINGS = ("uniform", "zipf", "one")
"""``uniform``: every expert is as likely. ``zipf``: the n-th is 1/n as likely, in an order that is
drawn anew for each set. ``one``: one expert is the first choice of every token; with top-k above 1
the others are uniform, since a token cannot choose an expert twice."""

STEP = 1 / 32
LARGEST = 4.0

_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Ints = np.ndarray[Any, np.dtype[np.int64]]


def make_logits(
    routing: str, tokens: int, experts: int, top_k: int, rng: np.random.Generator
) -> _Floats:
    """Logits (tokens, experts) float32 whose ``top_k`` largest are drawn without replacement.

    Logarithms of the experts' shares plus Gumbel noise: the largest k are then such a draw. Values
    are multiples of 1/32 from -4.03 to 4, which float16 and bfloat16 hold exactly, and the last
    chosen value leads all others: every implementation chooses the same experts, whatever it does
    with ties.

    Raises:
        ValueError: an unknown routing, or more choices than experts.
    """
    if top_k > experts:
        raise ValueError(f"top_k is {top_k}, but there are only {experts} experts")
    shares = np.ones(experts)
    if routing == "zipf":
        shares = 1 / (1 + rng.permutation(experts))
    elif routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    noise = -np.log(rng.exponential(size=(tokens, experts)))
    scores = np.log(shares) + noise
    if routing == "one":
        scores[:, rng.integers(experts)] = scores.max(axis=1, initial=0) + 1
    scores += LARGEST - scores.max(axis=1, keepdims=True, initial=-np.inf) if tokens else 0
    scores = np.clip(np.round(scores / STEP) * STEP, -LARGEST, LARGEST)
    chosen = choose(scores, top_k)
    last = np.take_along_axis(scores, chosen[:, -1:], axis=1)
    tied = scores == last
    np.put_along_axis(tied, chosen, False, axis=1)
    return np.where(tied, scores - STEP, scores).astype(np.float32)


def choose(logits: np.ndarray[Any, Any], top_k: int) -> _Ints:
    """The experts of each token, (tokens, top_k), highest first; ties go to the lower index."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def make_sets(
    routing: str, count: int, tokens: int, experts: int, top_k: int, seed: int
) -> list[_Floats]:
    """Logits for ``count`` runs that follow one another.

    Where the experts suffice, a run chooses none that the run before it chose, so that it does not
    find its weights in the L2 cache.
    """
    rng = np.random.default_rng([seed, tokens, experts])
    sets: list[_Floats] = []
    before: set[int] = set()
    for _ in range(count):
        for _ in range(1000 if 4 * tokens * top_k <= experts else 1):
            logits = make_logits(routing, tokens, experts, top_k, rng)
            active = set(np.unique(choose(logits, top_k)).tolist())
            if not active & before:
                break
        sets.append(logits)
        before = active
    return sets
