"""What it gives to fetch the next layer's experts ahead, on the guess of somebody.

One token a run. The device plans a layer's call when its router has chosen, and fetches the misses.
From their last byte until the next layer's plan the bus is idle; in that time the next layer's
guessed experts are fetched, those that it does not hold, most likely first, at most so many. At
that layer's plan

1. a guess that is chosen is there, or on its way: what is left of it comes with the misses;
2. a guess that is not chosen is stopped. What the copying blocks have begun still comes. The guess
   does not stay, whether it was complete or not, so decisions do not depend on times. (With
   ``keep`` a complete one stays, and they do.)

Where a guess lies until then: in the slot of the expert that the policy would evict when the guess
is made, which is then gone, and empty if the guess was wrong; or, with ``spare``, in memory beside
the slots that all layers share. There the policy evicts at the plan, as for any miss, and a wrong
guess costs no expert. Experts that are guessed and there are never evicted for another guess.

A layer takes max(its fetch, what runs beside it) and then ``idle_us``. That a copy slows down what
runs at the same time is not known here.

The policy is ``halved``, stated here once more because the replay of the library knows no guesses;
without any, plans equal the library's (tests/test_simulate_ahead.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_infer.simulate.timing import check_rates
from moe_infer.simulate.trace import Trace

Array = np.ndarray[Any, Any]

_NEEDED = np.iinfo(np.int64).max
_EMPTY = -1


@dataclass(frozen=True)
class Pace:
    """Measured times and rates.

    Attributes:
        expert_bytes: bytes of one expert.
        bus: GB/s (1e9 bytes a second) that the copies reach.
        idle_us: microseconds from the last byte of a layer's misses to the next layer's plan.
        beside_us: microseconds of a layer that run beside its fetch, before ``idle_us``.
        stop_bytes: at most so many bytes of a guess still come after it was stopped.
    """

    expert_bytes: float
    bus: float
    idle_us: float
    beside_us: float = 0.0
    stop_bytes: float = 0.0

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class Ahead:
    """What happened in each run and layer; all arrays are (runs, layers).

    Attributes:
        hits: needed experts that lay in a slot, guesses not counted.
        right: guesses that were needed.
        misses: needed experts that were neither.
        wrong: guesses that were not needed.
        useful_bytes: of right guesses, fetched before the plan.
        wasted_bytes: of wrong guesses, with what came after they were stopped.
        us: microseconds of the layer.
    """

    hits: Array
    right: Array
    misses: Array
    wrong: Array
    useful_bytes: Array
    wasted_bytes: Array
    us: Array

    @property
    def us_per_run(self) -> float:
        """Of all layers together, the mean over the runs."""
        return float(self.us.sum(axis=1).mean())

    @property
    def precision(self) -> float:
        """Right guesses over all guesses that took a place; 0 if there were none."""
        guesses = int(self.right.sum() + self.wrong.sum())
        return int(self.right.sum()) / guesses if guesses else 0.0

    @property
    def hit_rate(self) -> float:
        """Experts in slots over needed ones, guesses not counted."""
        return float(self.hits.sum() / (self.hits + self.right + self.misses).sum())

    def after(self, runs: int) -> Ahead:
        """Without the first ``runs`` runs, in which slots were filled."""
        return Ahead(**{name: value[runs:] for name, value in vars(self).items()})


def fetch_ahead(
    trace: Trace,
    guesses: Array | None,
    slots: int,
    pace: Pace,
    most: int,
    spare: bool = False,
    keep: bool = False,
    half_life: int = 128,
) -> Ahead:
    """Replays a trace, one token a run, sequence after sequence, fetching ahead.

    Args:
        trace: of all layers, in their order.
        guesses: (layers, sequences, tokens, any number) experts guessed for each layer, most likely
            first; those of layer 0 are not looked at, since no layer is before it. None: the
            policy's own, the absent expert that is worth most, then the next one.
        slots: of each layer, at least ``top_k``.
        pace: times and rates.
        most: guesses that are fetched for a layer at most; 0: none.
        spare: guesses lie beside the slots until the plan.
        keep: wrong guesses that are complete stay.
        half_life: of the policy ``halved``.

    Raises:
        ValueError: a number is out of its range, or the guesses have another shape.
    """
    shape = trace.choices.shape
    if slots < trace.top_k:
        raise ValueError(f"slots must be at least top_k, {trace.top_k}, got {slots}")
    if most < 0 or half_life < 1:
        raise ValueError(f"most must be at least 0 and half_life 1, got {most} and {half_life}")
    if guesses is not None and (guesses.ndim != 4 or guesses.shape[:3] != shape[:3]):
        raise ValueError(f"guesses must be {(*shape[:3], 'any')}, got {guesses.shape}")
    layers, runs = shape[0], shape[1] * shape[2]
    needed = np.sort(trace.choices.reshape(layers, runs, -1).astype(np.int64), axis=-1)
    ranked = None if guesses is None else guesses.reshape(layers, runs, -1).astype(np.int64)
    caches = [_Cache(trace.expert_count, slots, half_life, spare) for _ in range(layers)]
    # Bytes come one after another at this rate.
    rate = pace.bus * 1e3  # bytes a microsecond
    found = np.zeros((7, runs, layers))
    for run in range(runs):
        window = 0.0  # microseconds of idle bus before this layer's plan
        for layer, cache in enumerate(caches):
            ahead: list[int] = []
            if layer and most:
                ahead = cache.guess(None if ranked is None else ranked[layer, run], most)
            came = _share(window * rate, len(ahead), pace.expert_bytes)
            chosen = needed[layer, run]
            complete = [keep and part >= pace.expert_bytes for part in came]
            right, misses = cache.plan(chosen, ahead, complete)
            left = misses * pace.expert_bytes
            useful = wasted = 0.0
            for is_right, part in zip(right, came, strict=True):
                if is_right:
                    left += pace.expert_bytes - part
                    useful += part
                    continue
                wasted += part
                if 0 < part < pace.expert_bytes:
                    stopped = min(pace.stop_bytes, pace.expert_bytes - part)
                    left += stopped
                    wasted += stopped
            fetch = left / rate
            us = max(fetch, pace.beside_us) + pace.idle_us
            window = us - fetch
            hits = len(chosen) - misses - sum(right)
            wrong = len(right) - sum(right)
            found[:, run, layer] = hits, sum(right), misses, wrong, useful, wasted, us
    counts = found[:4].astype(np.int64)
    return Ahead(*counts, *found[4:])


def _share(budget: float, guesses: int, expert_bytes: float) -> list[float]:
    """Bytes of each guess that come, one guess after the other."""
    return [min(max(budget - i * expert_bytes, 0.0), expert_bytes) for i in range(guesses)]


class _Cache:
    """One layer's slots under the policy ``halved``; see ops/core/policy.h."""

    def __init__(self, experts: int, slots: int, half_life: int, spare: bool) -> None:
        self.half_life = half_life
        self.spare = spare
        self.clock = 0
        self.slot_of = np.full(experts, -1)
        self.expert_of = np.full(slots, -1)
        self.count = np.zeros(experts, np.int64)
        self.last = np.zeros(experts, np.int64)
        self.fetched = np.zeros(experts, np.int64)

    def worth(self, experts: Array) -> Array:
        halvings = self.clock // self.half_life - self.last[experts] // self.half_life
        count = self.count[experts] >> np.minimum(halvings, 63)
        found: Array = (count << 32) + (self.clock - self.fetched[experts])
        return found

    def guess(self, ranked: Array | None, most: int) -> list[int]:
        """Experts that are fetched ahead; without ``spare`` they have slots from now on."""
        if ranked is None:
            absent = np.flatnonzero(self.slot_of < 0)
            held = absent[:0]
            absent = absent[np.argsort(-self.worth(absent), kind="stable")]
        else:
            there = self.slot_of[ranked] >= 0
            absent, held = ranked[~there], ranked[there]
        ahead: list[int] = absent[:most].tolist()
        if self.spare:
            return ahead
        victims = self.victims(held, len(ahead))
        for expert, slot in zip(ahead, victims, strict=False):
            self.fill(expert, slot)
        return ahead[: len(victims)]

    def plan(self, needed: Array, ahead: list[int], stays: list[bool]) -> tuple[list[bool], int]:
        """Which guesses are right, and the number of misses; brings the tables to the end."""
        self.clock += 1
        halvings = self.clock // self.half_life - self.last[needed] // self.half_life
        self.count[needed] = (self.count[needed] >> np.minimum(halvings, 63)) + 1
        self.last[needed] = self.clock
        chosen = set(needed.tolist())
        right = [expert in chosen for expert in ahead]
        kept = []
        for expert, is_right, stay in zip(ahead, right, stays, strict=True):
            if is_right or stay:
                self.fetched[expert] = self.clock
            if stay and not is_right:
                kept.append(expert)
            elif not is_right and not self.spare:
                self.expert_of[self.slot_of[expert]] = -1
                self.slot_of[expert] = -1
        absent = needed[self.slot_of[needed] < 0]  # with ``spare`` right guesses, too
        self.fetched[absent] = self.clock
        for expert, slot in zip(absent, self.victims(needed, len(absent)), strict=True):
            self.fill(expert, slot)
        if self.spare:
            for expert, slot in zip(kept, self.victims(needed, len(kept)), strict=False):
                self.fill(expert, slot)
        return right, len(absent) - (sum(right) if self.spare else 0)

    def victims(self, stay: Array, count: int) -> list[int]:
        """Slots that are filled next, at most ``count``; none of an expert in ``stay``."""
        if not count:
            return []
        worth = np.where(self.expert_of < 0, _EMPTY, self.worth(self.expert_of))
        held = self.slot_of[stay]
        worth[held[held >= 0]] = _NEEDED
        order = np.argsort(worth, kind="stable")[:count]
        found: list[int] = order[worth[order] != _NEEDED].tolist()
        return found

    def fill(self, expert: int, slot: int) -> None:
        if self.expert_of[slot] >= 0:
            self.slot_of[self.expert_of[slot]] = -1
        self.expert_of[slot] = expert
        self.slot_of[expert] = slot
