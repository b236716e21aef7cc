"""Times by CUDA events: contenders in turn, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

SAMPLES = 50
FEWEST = 5
LONG_MS = 20.0
"""A layer whose run takes longer is sampled less often."""
ROUNDS = 5
_LEAD_CYCLES = 200_000
_LONG_CYCLES = 20_000_000


@dataclass
class Contender:
    """Something that is timed.

    Attributes:
        run: what is timed; enqueues on the current stream.
        runs: how many runs of the layer that is.
        before: what precedes each sample and is not timed.
        on_device: leaves the host's part of a launch out; otherwise a sample begins while the GPU
            is idle, when the host begins to launch.
    """

    run: Callable[[], Any]
    runs: int = 1
    before: Callable[[], Any] | None = None
    on_device: bool = False
    times: list[float] = field(default_factory=list)

    def sample(self) -> float:
        """Milliseconds for one run of the layer."""
        if self.before is not None:
            self.before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.on_device:
            torch.cuda._sleep(_LEAD_CYCLES)  # the GPU waits until all is enqueued
        else:
            torch.cuda.synchronize()
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / self.runs


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one run.

    Attributes:
        median: of all samples.
        p10: a tenth of the samples is shorter.
        p90: a tenth is longer.
        samples: their number.
    """

    median: float
    p10: float
    p90: float
    samples: int


def spread(times: list[float]) -> Spread:
    """Median and deciles of samples.

    Raises:
        ValueError: there is none.
    """
    if not times:
        raise ValueError("no samples")
    ordered = sorted(times)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Spread(statistics.median(ordered), quantile(0.1), quantile(0.9), len(ordered))


def sample_count(run_ms: float, sample_ms: float, budget_ms: float) -> int:
    """How often a sample is taken: 50 times, less often where runs are long or time is short.

    Args:
        run_ms: one run of the layer.
        sample_ms: one sample, which may be several runs.
        budget_ms: for all samples.
    """
    most = SAMPLES if run_ms <= LONG_MS else int(SAMPLES * LONG_MS / run_ms)
    return max(FEWEST, min(most, int(budget_ms / max(sample_ms, 1e-3))))


def measure(contenders: Mapping[str, Contender], budget_s: float = 60.0) -> dict[str, Any]:
    """Times contenders in turn; one that fails gets its exception instead of a spread.

    Args:
        contenders: by name.
        budget_s: seconds that all samples together should take; it only lowers their number.
    """
    results: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, contender in contenders.items():
        try:
            for _ in range(2):
                contender.sample()
            begin = time.perf_counter()
            run_ms = contender.sample()
            took = 1e3 * (time.perf_counter() - begin)
            counts[name] = sample_count(run_ms, took, 1e3 * budget_s / len(contenders))
        except Exception as error:
            results[name] = error
    for turn in range(ROUNDS):
        for name, count in counts.items():
            if name in results:
                continue
            try:
                contenders[name].sample()  # settles caches and clocks after the one before
                for _ in range(count * turn // ROUNDS, count * (turn + 1) // ROUNDS):
                    contenders[name].times.append(contenders[name].sample())
            except Exception as error:
                results[name] = error
    for name in counts:
        if name not in results:
            results[name] = spread(contenders[name].times)
    return {name: results[name] for name in contenders}


def cycles_a_us() -> float:
    """Cycles of ``torch.cuda._sleep`` a microsecond, at the clock that the GPU has when it works.

    The launch is in it, which is little of so long a sleep.
    """
    found = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(_LONG_CYCLES)
        end.record()
        end.synchronize()
        found.append(1e3 * float(start.elapsed_time(end)))
    return _LONG_CYCLES / statistics.median(found)


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``run``, after one run outside of it.

    The graph keeps ``run`` alive: what ``run`` holds was allocated outside of the graph, which
    reads it in every replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.captured = run
    return graph
