"""Policies that are not in the library, as plainly as possible, and a cache that they drive.

A policy hears of every use and every fetch, and names a victim among those that may go. The cache
does what ops/core/policy.h states: hits run first; what a call needs is not evicted while anything
else is; with more experts than slots, the last two that were fetched stay for the moment.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Set
from typing import Any

import numpy as np

from moe_infer.simulate import Calls


class Policy:
    """What the cache below asks.

    Args:
        slots: of the cache.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.clock = 0

    def call(self) -> None:
        """A call begins."""
        self.clock += 1

    def used(self, expert: int, resident: bool) -> None:
        """A call needs the expert; once a call."""

    def victim(self, expert: int, allowed: Set[int]) -> int:
        """Who leaves so that ``expert`` comes in; from ``allowed``, which is not empty."""
        raise NotImplementedError

    def fetched(self, expert: int, evicted: int | None) -> None:
        """The expert came in, in the place of another or of nobody."""


class DecayedCount(Policy):
    """Remembers of each expert its uses, each of which counts half after ``half_life`` calls."""

    def __init__(self, slots: int, half_life: float) -> None:
        super().__init__(slots)
        self.half_life = half_life
        self.count: dict[int, float] = {}
        self.last: dict[int, int] = {}

    def _now(self, expert: int) -> float:
        age = self.clock - self.last.get(expert, self.clock)
        return self.count.get(expert, 0.0) * 0.5 ** (age / self.half_life)

    def used(self, expert: int, resident: bool) -> None:
        self.count[expert] = self._now(expert) + 1
        self.last[expert] = self.clock


class Steady(DecayedCount):
    """A decayed count; who is there has an advantage that grows with the calls since it came."""

    def __init__(
        self, slots: int, half_life: float = 128, calls: int = 32, advantage: float = 0.25
    ) -> None:
        super().__init__(slots, half_life)
        self.calls, self.advantage = calls, advantage
        self.since: dict[int, int] = {}

    def victim(self, expert: int, allowed: Set[int]) -> int:
        def worth(e: int) -> tuple[float, int]:
            stayed = min(self.clock - self.since[e], self.calls) / self.calls
            return self._now(e) * (1 + self.advantage * stayed), e

        return min(allowed, key=worth)

    def fetched(self, expert: int, evicted: int | None) -> None:
        self.since[expert] = self.clock


class CountAndRecency(DecayedCount):
    """A decayed count, and for a short time after each use a share of a constant use."""

    def __init__(
        self, slots: int, half_life: float = 512, share: float = 0.1, short: float = 2
    ) -> None:
        super().__init__(slots, half_life)
        self.short = short
        # What an expert that is used in every call would have.
        self.share = share / (1 - 0.5 ** (1 / half_life))

    def victim(self, expert: int, allowed: Set[int]) -> int:
        def worth(e: int) -> tuple[float, int]:
            recent = 0.5 ** ((self.clock - self.last[e]) / self.short)
            return self._now(e) + self.share * recent, e

        return min(allowed, key=worth)


class S3Fifo(Policy):
    """A small queue for what is new, the main one, and ghosts of what left the small one."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.small_size = max(slots // 10, 1)
        self.small: OrderedDict[int, None] = OrderedDict()  # first: in for longest
        self.main: OrderedDict[int, None] = OrderedDict()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.uses: dict[int, int] = {}

    def used(self, expert: int, resident: bool) -> None:
        if resident:
            self.uses[expert] = min(self.uses.get(expert, 0) + 1, 3)

    def victim(self, expert: int, allowed: Set[int]) -> int:
        while True:
            small = [e for e in self.small if e in allowed]
            main = [e for e in self.main if e in allowed]
            if small and (len(self.small) >= self.small_size or not main):
                oldest = small[0]
                del self.small[oldest]
                if self.uses.get(oldest, 0) > 1:
                    self.main[oldest] = None
                    continue
                self.ghosts[oldest] = None
                while len(self.ghosts) > self.slots:
                    self.ghosts.popitem(last=False)
                return oldest
            oldest = main[0]
            del self.main[oldest]
            if self.uses.get(oldest, 0) == 0:
                return oldest
            self.uses[oldest] -= 1
            self.main[oldest] = None

    def fetched(self, expert: int, evicted: int | None) -> None:
        self.uses[expert] = 0
        if self.ghosts.pop(expert, 0) is None:
            self.main[expert] = None
        else:
            self.small[expert] = None


class WindowTinyLfu(Policy):
    """New experts in a small LRU window; from there into the main part only if used more often.

    The main part is a segmented LRU; counts are exact and halved every 10 uses a slot.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.window_size = max(slots // 10, 1)
        self.protected_size = max((slots - self.window_size) * 4 // 5, 1)
        self.window: OrderedDict[int, None] = OrderedDict()
        self.probation: OrderedDict[int, None] = OrderedDict()
        self.protected: OrderedDict[int, None] = OrderedDict()
        self.count: dict[int, int] = {}
        self.counted = 0

    def used(self, expert: int, resident: bool) -> None:
        self.count[expert] = self.count.get(expert, 0) + 1
        self.counted += 1
        if self.counted >= 10 * self.slots:
            self.count = {e: count >> 1 for e, count in self.count.items()}
            self.counted //= 2
        for part in (self.window, self.protected):
            if expert in part:
                part.move_to_end(expert)
        if expert in self.probation:
            del self.probation[expert]
            self.protected[expert] = None
            if len(self.protected) > self.protected_size:
                self.probation[self.protected.popitem(last=False)[0]] = None

    def victim(self, expert: int, allowed: Set[int]) -> int:
        def oldest(*parts: OrderedDict[int, None]) -> int | None:
            return next((e for part in parts for e in part if e in allowed), None)

        main = oldest(self.probation, self.protected)
        candidate = oldest(self.window) if len(self.window) >= self.window_size else None
        if candidate is None:
            leaving = main if main is not None else oldest(self.window)
        elif main is None or self.count.get(candidate, 0) <= self.count.get(main, 0):
            leaving = candidate
        else:
            del self.window[candidate]
            self.probation[candidate] = None
            leaving = main
        assert leaving is not None
        return leaving

    def fetched(self, expert: int, evicted: int | None) -> None:
        if evicted is not None:
            for part in (self.window, self.probation, self.protected):
                part.pop(evicted, None)
        self.window[expert] = None
        # While the cache fills up, the window hands on what is too much for it.
        if len(self.window) > self.window_size:
            self.probation[self.window.popitem(last=False)[0]] = None


OTHERS: dict[str, Callable[[int], Policy]] = {
    "staying counts": Steady,
    "count and recency": CountAndRecency,
    "S3-FIFO": S3Fifo,
    "W-TinyLFU": WindowTinyLfu,
}


def hits(calls: Calls, slots: int, policy: Policy) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Hits of each call of a cache that is empty at first, (calls) int64."""
    there: set[int] = set()
    found = np.zeros(len(calls), np.int64)
    for call in range(len(calls)):
        needed = calls.experts[calls.offsets[call] : calls.offsets[call + 1]].tolist()
        misses = [expert for expert in needed if expert not in there]
        found[call] = len(needed) - len(misses)
        policy.call()
        for expert in needed:
            policy.used(expert, expert in there)
        pinned = set(needed)
        last: list[int] = []
        for expert in misses:
            evicted = None
            if len(there) >= slots:
                allowed = (there - pinned) or (there - set(last[-min(2, slots - 1) :])) or there
                evicted = policy.victim(expert, allowed)
                there.remove(evicted)
            there.add(expert)
            policy.fetched(expert, evicted)
            last.append(expert)
    return found


def hit_rate(calls: Calls, slots: int, name: str) -> float:
    """Hits over needed experts of one of ``OTHERS``."""
    needed = int(calls.offsets[-1])
    found = int(hits(calls, slots, OTHERS[name](slots)).sum())
    return found / needed if needed else math.nan
