"""MoE layers whose experts do not all fit in GPU memory, against the speed of the bus.

    python benchmarks/streaming.py                       # everything
    python benchmarks/streaming.py --minutes 4           # the most important points first
    python benchmarks/streaming.py --append --parts B --modes device

Bare layers through the library's C entry, in one process: A, InfMoE's own example, cold and over
repeated calls; B, the 48 MoE layers of a Qwen3-30B-shaped decoder with slots for a part of the
experts, on skewed traces; C, four Mixtral layers and one token, beside accelerate's cpu_offload; D,
weights that are read from a file, by layers that stream and by layers that load them all; F, B's
layers with guesses of what the next layer needs, which the host fetches ahead. The host drives the
fetches, or the device does inside of a CUDA graph (--modes). The bus is measured in the same run;
the floor of a time is what the missed bytes take on it, or the time with all experts resident.
Results are compared with float64 or, bit by bit, with the layer whose experts all stay, before a
time counts. Writes streaming.json after every point, and streaming.png, into --out. Needs a GPU,
PyTorch and the built library; what else is missing costs only its rows.
benchmarks/results/README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_bench.budget import Budget
from moe_bench.machine import COMMIT_VARIABLE, describe, gpu_state
from moe_bench.point import message
from moe_bench.record_file import RecordFile
from moe_bench.report import number
from moe_bench.streaming import ahead, decoder, disk, example, offload, report
from moe_bench.streaming.bus import bus_speed
from moe_bench.streaming.chain import PINNED_VARIABLE
from moe_bench.streaming.context import Context, Points
from moe_bench.streaming.record import failed, open_record
from moe_bench.streaming.shapes import DEFAULT_MODES, MODES, PARTS

PINNED = "40G"
"""What may be pinned unless the environment says otherwise: the largest part's weights twice."""

SHARES = {"C": 0.35, "A": 0.25, "B": 0.35, "F": 0.2, "A32": 0.15, "D": 0.05}
"""Of the time, about; what a part leaves over goes to those after it."""

MAKERS: dict[str, Callable[[Context], Points]] = {
    "A": lambda context: example.points(context, "bfloat16", "A"),
    "A32": lambda context: example.points(context, "float32", "A32"),
    "B": decoder.points,
    "F": ahead.points,
    "C": offload.points,
    "D": disk.points,
}
PLANNED: dict[str, Callable[[int], int]] = {
    "A": example.planned,
    "A32": example.planned,
    "B": decoder.planned,
    "F": ahead.planned,
    "C": offload.planned,
    "D": disk.planned,
}


def main() -> int:
    options = parse()
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    os.environ.setdefault(PINNED_VARIABLE, PINNED)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_stream(torch.cuda.Stream())
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in os.environ.items() if k.startswith("MOE_INFER_")}
    machine = describe() | {"settings": settings}
    record = open_record(options.out / "streaming.json", machine, options.append)
    planned = {part: PLANNED[part](len(options.modes)) for part in options.parts}
    budget = Budget(60 * options.minutes, sum(planned.values()))
    context = Context(budget, options.dir, options.disk, tuple(options.modes))
    missed, waiting = 0, list(options.parts)
    try:
        while waiting:
            share = SHARES[waiting[0]] / sum(SHARES[part] for part in waiting)
            part = waiting.pop(0)
            seconds = max(0.0, share * (60 * options.minutes - budget.used))
            rest = planned[part]
            if not budget.spent:
                rest -= measure_part(part, context, record, seconds)
            missed += rest
            budget.left = sum(planned[other] for other in waiting)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept", file=sys.stderr)
    print(report.text(record.data))
    left = f"; {missed} planned points were not reached" if missed else ""
    print(f"{budget.used:.0f} s in all{left}")
    try:
        from moe_bench.streaming.plot import draw

        draw(record.data, options.out / "streaming.png")
    except ImportError as error:
        print(f"no plot: {error}")
    return int(failed(record))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_out = Path(__file__).resolve().parent / "results"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES))
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the results")
    parser.add_argument("--append", action="store_true", help="keep other points of the file")
    parser.add_argument("--minutes", type=float, default=12.0, help="time for all")
    parser.add_argument("--dir", default="/dev/shm", help="where weight files lie for a while")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="the same for part D")
    parser.add_argument("--commit", help="of the source, where there is no git")
    options = parser.parse_args(arguments)
    options.parts = [part for part in PARTS if part in options.parts]
    return options


def measure_part(part: str, context: Context, record: RecordFile, seconds: float) -> int:
    """Points of a part, the first ones in about so many seconds; returns their number."""
    count = 0
    begin = time.perf_counter()
    context.bus = bus_speed()
    state = {"part": part, "bytes_a_second": context.bus, "before": gpu_state()}
    record.run["bus"].append(state)
    print(f"{part}: bus {context.bus / 1e9:.1f} GB/s", flush=True)
    try:
        with contextlib.closing(MAKERS[part](context)) as points:
            for point in points:
                record.add(point)
                print(f"  {time.perf_counter() - begin:.0f} s {line(point)}", flush=True)
                count += 1
                if time.perf_counter() - begin > seconds:
                    break
    except Exception as error:  # the other parts may still be measured
        record.add_failure(part=part, reason=message(error))
        print(f"{part}: {message(error)}", file=sys.stderr, flush=True)
    state["after"] = gpu_state()
    record.write()
    gc.collect()
    torch.cuda.empty_cache()
    return count


def line(point: dict[str, object]) -> str:
    """A point while the program runs."""
    about = ("tokens", "slots", "routing", "state", "mode")
    said = " ".join(str(point[name]) for name in about) + report.guess(point)
    if "failed" in point:
        return f"{said}: {point['failed']}"
    values = ("ms", "floor_ms", "over_floor", "gb_a_second", "hit_rate", "gain")
    told = ", ".join(f"{name} {number(point[name])}" for name in values if point.get(name))
    return f"{said}: {told}"


if __name__ == "__main__":
    sys.exit(main())
