"""What every part of the benchmark gets, and how one point is guarded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_bench.budget import Budget
from moe_bench.check import WrongResultError
from moe_bench.peers.peer import UnavailableError
from moe_bench.point import message


@dataclass
class Context:
    """One run of the program.

    Attributes:
        budget: of time.
        folder: where weight files lie for a while.
        disk: the same, on a disk.
        modes: what drives the fetches, in order.
        bus: bytes a second of the bus, measured in this run before the part.
        device: "cuda"; tests run on "cpu".
    """

    budget: Budget
    folder: str
    disk: str
    modes: tuple[str, ...]
    bus: float = 0.0
    device: str = "cuda"

    def measure(
        self, fields: dict[str, Any], work: Callable[[float], dict[str, Any]]
    ) -> dict[str, Any]:
        """A point: its fields and what ``work`` finds in about so many seconds, or why nothing.

        Args:
            fields: what the point is about.
            work: gets its seconds.
        """
        seconds = self.budget.share()
        try:
            return {**fields, "bus_bytes_a_second": self.bus, **work(seconds)}
        except UnavailableError as error:
            return {**fields, "failed": message(error)}
        except WrongResultError as error:
            return {**fields, "failed": message(error), "wrong": True}
        except Exception as error:  # the others may still be measured
            print(f"{fields}: {message(error)}", file=sys.stderr, flush=True)
            return {**fields, "failed": message(error)}


Points = Iterator[dict[str, Any]]
