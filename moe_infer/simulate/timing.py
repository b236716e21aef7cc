"""How long calls take, from measured rates and the number of misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def check_rates(measured: object) -> None:
    """Checks the numbers of a dataclass: ``expert_bytes`` and ``bus`` are above 0, none is below.

    Raises:
        ValueError: one is not.
    """
    for name, value in vars(measured).items():
        least_open = name in ("expert_bytes", "bus")
        if not np.isfinite(value) or value < 0 or (least_open and value == 0):
            raise ValueError(
                f"{name} must be a number {'above' if least_open else 'of at least'} 0, got {value}"
            )


@dataclass(frozen=True)
class Machine:
    """Measured rates, and the sizes of a layer.

    Attributes:
        expert_bytes: bytes of one expert, as they go over the bus.
        bus: GB/s (1e9 bytes a second) from host to device.
        other_us: microseconds of a layer and call without its experts (attention, router, ...).
        expert_us: microseconds that one needed expert runs once it is there.
        fetch_us: microseconds that a fetch takes beside its bytes (a kernel's start, an event).
    """

    expert_bytes: float
    bus: float = 55.5
    other_us: float = 0.0
    expert_us: float = 0.0
    fetch_us: float = 0.0

    def __post_init__(self) -> None:
        check_rates(self)

    def call_us(self, needed: Array, misses: Array) -> Array:
        """Microseconds of each call of a layer.

        Fetches follow each other on the bus; needed experts run while others are fetched, but the
        one that comes last only when it is there:
        other + max(needed * expert, misses * fetch + expert if there are misses).

        Args:
            needed: (calls) experts that each call needs.
            misses: (calls) how many of them are fetched.
        """
        fetch = self.fetch_us + self.expert_bytes / self.bus * 1e-3
        arriving = misses * fetch + (misses > 0) * self.expert_us
        return self.other_us + np.maximum(needed * self.expert_us, arriving)

    def floor_us(self, needed: Array, misses: Array) -> float:
        """The larger of all missed bytes at the bus's rate and all calls without a miss."""
        bus = float(misses.sum()) * self.expert_bytes / self.bus * 1e-3
        return max(bus, float(self.call_us(needed, np.zeros_like(misses)).sum()))
