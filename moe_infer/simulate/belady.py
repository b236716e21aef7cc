"""The fewest misses that any policy can have on a trace.

What is optimal: calls come in a given order. A call runs the experts that it needs and that lie in
slots, then fetches the others, one after another, each into a slot, from which it runs. When a call
ends, any of the experts that were there or were fetched may lie in the slots, as many as there are
slots. Among all ways to choose them, with the whole future known, the one below has the fewest
misses: it keeps those whose next call comes first (Belady's rule, with calls in the place of single
requests).

One freedom is more than a real cache has: there, the expert that a call fetched last is still in
its slot when the call ends, while here it may already be given up. So no real policy misses less,
and one that knows the future and has one slot more would not miss more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_infer.simulate.trace import Calls

_NEVER = np.iinfo(np.int64).max


def optimal_hits(calls: Calls, slots: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Hits of each call, (calls) int64, when the future is known.

    Args:
        calls: of one cache, which is empty at first.
        slots: of the cache, at least 1.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    next_use = _next_uses(calls)
    # Of an expert that is there: its next call. Else, and if there is none: never.
    coming = np.full(calls.expert_count, _NEVER)
    resident = np.zeros(calls.expert_count, bool)
    hits = np.zeros(len(calls), np.int64)
    for call in range(len(calls)):
        span = slice(calls.offsets[call], calls.offsets[call + 1])
        needed = calls.experts[span]
        hits[call] = np.count_nonzero(resident[needed])
        coming[needed] = next_use[span]
        resident[needed] = True
        there = np.flatnonzero(resident)
        if len(there) > slots:
            order = np.argpartition(coming[there], slots - 1)
            resident[there[order[slots:]]] = False
    return hits


def _next_uses(calls: Calls) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each needed expert of each call, the next call that needs it."""
    found = np.full(len(calls.experts), _NEVER)
    coming = np.full(calls.expert_count, _NEVER)
    for call in range(len(calls) - 1, -1, -1):
        span = slice(calls.offsets[call], calls.offsets[call + 1])
        found[span] = coming[calls.experts[span]]
        coming[calls.experts[span]] = call
    return found
