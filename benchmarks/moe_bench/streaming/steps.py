"""Times of runs that follow one another."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_bench.timing import spread


def time_steps(step: Callable[[int], Any], most: int, seconds: float, fewest: int) -> list[float]:
    """Milliseconds of step(0), step(1), ... by CUDA events, one after the other without a pause.

    Args:
        step: enqueues the i-th run on the current stream.
        most: runs at most.
        seconds: after so many no further run begins.
        fewest: runs at least.
    """
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    begin = time.perf_counter()
    for i in range(most):
        if i >= fewest and time.perf_counter() - begin > seconds:
            break
        step(i)
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        if i % 8 == 7:
            events[-1].synchronize()  # what only enqueues must not run ahead of the clock
    torch.cuda.synchronize()
    return [float(a.elapsed_time(b)) for a, b in itertools.pairwise(events)]


def times(found: list[float], alike: bool) -> dict[str, Any]:
    """Fields of a point.

    Args:
        found: milliseconds of the runs.
        alike: every run does the same: their median counts; otherwise their mean does, as the
            bytes that they are compared with are a mean too.
    """
    told = spread(found)
    return {
        "ms": told.median if alike else statistics.fmean(found),
        "ms_is": "median" if alike else "mean",
        "median_ms": told.median,
        "p10": told.p10,
        "p90": told.p90,
        "samples": told.samples,
    }


def against_floor(
    ms: float, bytes_a_run: float, bus: float, resident_ms: float | None
) -> dict[str, Any]:
    """The floor of a run, and what the time is of it.

    Args:
        ms: of a run.
        bytes_a_run: that were fetched.
        bus: bytes a second.
        resident_ms: of the same run with all experts resident; None: not known.
    """
    bus_ms = 1e3 * bytes_a_run / bus
    floor = max(bus_ms, resident_ms or 0.0)
    return {
        "bytes_a_run": bytes_a_run,
        "bus_ms": bus_ms,
        "resident_ms": resident_ms,
        "floor_ms": floor,
        "bound": "bus" if bus_ms >= (resident_ms or 0.0) else "compute",
        "over_floor": ms / floor if floor else None,
        "gb_a_second": bytes_a_run / (ms * 1e6),
        "bus_share": bus_ms / ms,
    }
