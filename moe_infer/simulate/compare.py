"""Policies beside each other on one trace, with Belady's optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_infer.simulate.belady import optimal_hits
from moe_infer.simulate.replay import policy_text, replay
from moe_infer.simulate.timing import Machine
from moe_infer.simulate.trace import Calls, Trace

OPTIMUM = "belady"
"""In the place of a policy: the fewest misses that are possible."""


@dataclass(frozen=True)
class Point:
    """One policy with one budget on all layers of a trace.

    Attributes:
        policy: with all its numbers, or ``belady``.
        slots: of a layer; with ``shared``, of all layers together.
        calls: of all layers.
        tokens: tokens of the trace that were run.
        needed: experts that all calls needed.
        misses: experts that had to be fetched.
        decode_needed, decode_misses: the same without the calls of prompts.
        ms_per_token: estimated; None without a machine.
        floor_ms_per_token: the larger of missed bytes at the bus's rate and resident time.
        shared: all layers share the slots.
    """

    policy: str
    slots: int
    calls: int
    tokens: int
    needed: int
    misses: int
    decode_needed: int
    decode_misses: int
    ms_per_token: float | None = None
    floor_ms_per_token: float | None = None
    shared: bool = False

    @property
    def hit_rate(self) -> float:
        """Hits over needed experts; 1 if nothing was needed."""
        return 1 - self.misses / self.needed if self.needed else 1.0

    @property
    def decode_hit_rate(self) -> float:
        """The same without the calls of prompts."""
        return 1 - self.decode_misses / self.decode_needed if self.decode_needed else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rates = {"hit_rate": self.hit_rate, "decode_hit_rate": self.decode_hit_rate}
        return {**asdict(self), **rates}


def compare(
    trace: Trace,
    slots: Sequence[int],
    policies: Sequence[str | None],
    batch: int = 1,
    prefill: int = 0,
    machine: Machine | None = None,
    shared: bool = False,
) -> list[Point]:
    """Replays a trace with every policy and number of slots.

    Args:
        trace: all its layers are replayed, each on its own cache.
        slots: of each layer.
        policies: as :func:`moe_infer.simulate.policy_text` takes them; ``belady`` is the optimum.
        batch: see :meth:`Trace.calls`.
        prefill: see :meth:`Trace.calls`.
        machine: to estimate times with.
        shared: one cache for all layers, with ``slots`` times the number of layers.

    Raises:
        ValueError: a number is out of its range, or there is no such policy.
        moe_infer.errors.PluginError: there is no library.
    """
    # Before anything is computed.
    names = [policy if policy == OPTIMUM else policy_text(policy) for policy in policies]
    if shared:
        caches = [trace.shared_calls(batch, prefill)]
    else:
        caches = [trace.calls(layer, batch, prefill) for layer in range(len(trace.layers))]
    factor = len(trace.layers) if shared else 1
    return [
        _point(name, count * factor, caches, trace, batch, prefill, machine, shared)
        for count in slots
        for name in names
    ]


def _point(
    policy: str,
    slots: int,
    caches: Sequence[Calls],
    trace: Trace,
    batch: int,
    prefill: int,
    machine: Machine | None,
    shared: bool,
) -> Point:
    needed = np.concatenate([np.diff(calls.offsets) for calls in caches])
    misses = needed - np.concatenate([_hits(calls, slots, policy) for calls in caches])
    decoding = np.concatenate([_decodes(calls, trace, batch, prefill, shared) for calls in caches])
    tokens = trace.sequences * trace.tokens
    times: dict[str, float] = {}
    if machine is not None:
        times["ms_per_token"] = float(machine.call_us(needed, misses).sum()) / tokens * 1e-3
        times["floor_ms_per_token"] = machine.floor_us(needed, misses) / tokens * 1e-3
    return Point(
        policy,
        slots,
        len(needed),
        tokens,
        int(needed.sum()),
        int(misses.sum()),
        int(needed[decoding].sum()),
        int(misses[decoding].sum()),
        shared=shared,
        **times,
    )


def _hits(calls: Calls, slots: int, policy: str) -> np.ndarray[Any, Any]:
    if policy == OPTIMUM:
        return optimal_hits(calls, slots)
    return replay(calls.offsets, calls.experts, calls.expert_count, slots, policy).hits


def _decodes(
    calls: Calls, trace: Trace, batch: int, prefill: int, shared: bool
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(calls): True where the call is not a prompt's."""
    group = np.ones(trace.tokens - prefill + (prefill > 0), bool)
    group[0] = prefill == 0
    groups = -(-trace.sequences // batch)
    found = np.tile(group, groups)
    found = np.repeat(found, len(trace.layers)) if shared else found
    assert len(found) == len(calls)
    return found
