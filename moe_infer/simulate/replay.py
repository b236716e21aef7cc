"""The library's replay of one layer's trace (``moe_infer_simulate`` of the C entry)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_infer.errors import PluginError
from moe_infer.runtime import plugin

_TEXT_BYTES = 64
_PLANNED = np.dtype([(name, np.int32) for name in ("expert", "slot", "evicted", "hit")])

Array = np.ndarray[Any, Any]


class _Trace(ctypes.Structure):
    _fields_ = (
        ("expert_count", ctypes.c_int32),
        ("calls", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
    )


_SIGNATURES: dict[str, list[Any]] = {
    "moe_infer_policy": [ctypes.c_char_p, ctypes.c_char_p],
    "moe_infer_simulate": [
        ctypes.c_char_p,  # policy
        ctypes.POINTER(_Trace),
        ctypes.c_int32,  # slots
        ctypes.c_void_p,  # hits
        ctypes.c_void_p,  # plan
    ],
}


@dataclass(frozen=True)
class Replay:
    """What one cache decides on a trace.

    Attributes:
        policy: with all its numbers, such as ``lfu:256``.
        slots: of the cache.
        needed: (calls) int64, experts that each call needs.
        hits: (calls) int32, how many of them lay in a slot when the call began.
        plan: (experts of all calls) with the fields ``expert``, ``slot``, ``evicted`` (-1: nobody)
            and ``hit``, in the order in which the cache treats them: of each call hits first, then
            misses.
    """

    policy: str
    slots: int
    needed: Array
    hits: Array
    plan: Array

    @property
    def misses(self) -> Array:
        """(calls) int64: experts that each call has to fetch."""
        return self.needed - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits over needed experts in all calls; 1 if nothing was needed."""
        needed = int(self.needed.sum())
        return int(self.hits.sum()) / needed if needed else 1.0


def policy_text(policy: str | None = None) -> str:
    """A policy with all its numbers.

    Args:
        policy: such as ``lru``, ``lfu:256`` or ``halved``; None: what the environment variable
            MOE_INFER_POLICY says, else the default.

    Raises:
        ValueError: there is no such policy, or a number is out of its range.
        moe_infer.errors.PluginError: there is no library.
    """
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    _call("moe_infer_policy", _encoded(policy), text)
    return text.value.decode()


def replay(
    offsets: Array, experts: Array, expert_count: int, slots: int, policy: str | None = None
) -> Replay:
    """Replays a trace on an empty cache.

    Args:
        offsets: (calls + 1) integers from 0 on; call c needs
            ``experts[offsets[c]:offsets[c + 1]]``.
        experts: expert numbers, in each call ascending and each once.
        expert_count: experts that there are.
        slots: experts that the cache holds.
        policy: as :func:`policy_text` takes it.

    Raises:
        ValueError: a number is out of its range, or there is no such policy.
        moe_infer.errors.PluginError: there is no library.
    """
    offsets = np.ascontiguousarray(offsets, np.int64)
    experts = np.ascontiguousarray(experts, np.int32)
    if offsets.ndim != 1 or experts.ndim != 1 or not len(offsets):
        raise ValueError(
            f"offsets must have shape (calls + 1) and experts one dimension, got {offsets.shape}"
            f" and {experts.shape}"
        )
    if np.any(np.diff(offsets) < 0) or offsets[0] != 0 or offsets[-1] != len(experts):
        raise ValueError(
            f"offsets must not decrease and lead from 0 to the number of experts, {len(experts)};"
            f" they lead from {offsets[0]} to {offsets[-1]}"
        )
    for name, value in (("expert_count", expert_count), ("slots", slots)):
        if not 0 < value < 2**31:
            raise ValueError(f"{name} must be a number from 1 to 2147483647, got {value}")
    text = policy_text(policy)
    hits = np.empty(len(offsets) - 1, np.int32)
    plan = np.empty(len(experts), _PLANNED)
    # An empty array may have no address.
    some = experts if len(experts) else np.zeros(1, np.int32)
    trace = _Trace(expert_count, len(hits), offsets.ctypes.data, some.ctypes.data)
    _call(
        "moe_infer_simulate",
        text.encode(),
        ctypes.byref(trace),
        slots,
        hits.ctypes.data,
        plan.ctypes.data,
    )
    return Replay(text, slots, np.diff(offsets), hits, plan)


def _encoded(policy: str | None) -> bytes | None:
    return None if policy is None else policy.encode(errors="replace")


@functools.cache
def _function(name: str) -> Any:
    function = getattr(plugin.load(), name, None)
    if function is None:
        raise PluginError(
            f"{plugin.find_library()} is older than this package and has no {name};"
            f" {plugin.BUILD_HINT}"
        )
    function.argtypes = _SIGNATURES[name]
    function.restype = ctypes.c_int
    return function


def _call(name: str, *arguments: Any) -> None:
    if _function(name)(*arguments) != 0:
        raise ValueError(plugin.load().moe_infer_last_error().decode(errors="replace"))
