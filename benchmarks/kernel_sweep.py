"""The bare kernels at a glance, for tuning: milliseconds, floor and ratio of each point.

    python benchmarks/kernel_sweep.py
    python benchmarks/kernel_sweep.py --case qwen3 --tokens 1 16 --kernels
    ncu --profile-from-start off ... python benchmarks/kernel_sweep.py --profile mixtral 128

Each time is the median over CUDA graphs of several runs with other inputs, checked against float64
before it counts. Needs a GPU, PyTorch, the built library and room for one case's weights in --dir
(3 GB). The whole comparison is ``benchmarks/resident.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_bench.cases import CASES, DTYPES, TOKENS, Case
from moe_bench.check import Error, WrongResultError, compare, expect, judge
from moe_bench.floor import Rates, floor_ms, target_verdict
from moe_bench.inputs import InputSet, make_inputs, mean_active
from moe_bench.machine import state_under_load
from moe_bench.peers.bare import BareLayer
from moe_bench.rates import measure_rates
from moe_bench.routing import ROUTINGS
from moe_bench.timing import Contender, capture, measure
from moe_bench.weights import Experts, folder_with_room, make_experts


def main() -> int:
    options = parse()
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.profile:
        name, tokens = options.profile
        options.case, options.tokens, options.dtype = [name], [int(tokens)], options.dtype[:1]
    begin = time.perf_counter()
    rates = None if options.profile else measure_rates(options.dtype)
    card = torch.cuda.get_device_name()
    if rates is not None:
        dense = ", ".join(
            f"{d} {r / 1e12:.0f} TFLOP/s ({rates.sustained[d] / 1e12:.0f} after a second)"
            for d, r in rates.dense.items()
        )
        print(f"{card}: read {rates.read / 1e12:.2f} TB/s, dense {dense}")
        print(
            f"{'case':10} {'dtype':9} {'tokens':>6} {'ms':>8} {'p10':>8} {'p90':>8} {'floor':>8}"
            f" {'ratio':>6} {'active':>6} {'target':>16} {'error':>8}"
        )
    records, failed = [], False
    place = folder_with_room(options.dir, max(CASES[name].file_bytes for name in options.case))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for name in options.case:
            for dtype in options.dtype:
                path = Path(folder) / f"{name}.safetensors"
                experts = make_experts(CASES[name], dtype, path)
                layer = BareLayer(CASES[name], dtype, path)
                for tokens in options.tokens:
                    point = (CASES[name], dtype, tokens)
                    if rates is None:
                        profile(layer, *point, options.routing)
                        continue
                    record = sweep(layer, experts, *point, rates, card, options)
                    failed |= "wrong" in record
                    records.append(record)
                layer.close()
                path.unlink()
                del experts, layer
                torch.cuda.empty_cache()
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"card": card, "points": records}, indent=1) + "\n")
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tuned = [case.name for case in CASES.values() if case.tuned]
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=tuned)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--dir", default="/dev/shm", help="where the weight file lies for a while")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a run")
    parser.add_argument("--clocks", action="store_true", help="clock and power at each point")
    parser.add_argument(
        "--profile",
        nargs=2,
        metavar=("CASE", "TOKENS"),
        help="only run this point a few times between cudaProfilerStart and cudaProfilerStop",
    )
    options = parser.parse_args()
    if options.profile and options.profile[0] not in CASES:
        parser.error(f"--profile: the case must be one of {', '.join(CASES)}")
    return options


def sweep(
    layer: BareLayer,
    experts: Experts,
    case: Case,
    dtype: str,
    tokens: int,
    rates: Rates,
    card: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Checks and times one point, and prints its line."""
    sets = make_inputs(case, dtype, tokens, options.routing)
    runs = layer.bind(sets)
    graph = capture(runs.run)
    line = f"{case.name:10} {dtype:9} {tokens:6}"
    record: dict[str, Any] = {"case": case.name, "dtype": dtype, "tokens": tokens}
    try:
        error = check(case, dtype, experts, sets, runs, graph)
    except WrongResultError as wrong:
        print(f"{line} {wrong}", flush=True)
        return {**record, "wrong": str(wrong)}
    result = measure({"bare": Contender(graph.replay, len(sets), on_device=True)}, budget_s=2.0)[
        "bare"
    ]
    if isinstance(result, Exception):
        raise result
    active = mean_active(sets)
    floor = floor_ms(case, tokens, active, rates.read, rates.dense[dtype])
    record |= {"ms": result.median, "p10": result.p10, "p90": result.p90}
    record |= {"floor_ms": floor, "active": active, "error": error.largest}
    target = ""
    if options.routing == "uniform":
        verdict = target_verdict(case, tokens, result.median, floor, card)
        if verdict is not None:
            sign = "met" if verdict.met else "MISSED"
            target = f"{verdict.limit:.3f} {'ms' if verdict.basis == 'ms' else 'x'} {sign}"
    print(
        f"{line} {result.median:8.4f} {result.p10:8.4f} {result.p90:8.4f} {floor:8.4f}"
        f" {result.median / floor:6.3f} {active:6.1f} {target:>16} {error.largest:8.2g}",
        flush=True,
    )
    if options.clocks:
        record["under_load"] = state_under_load(graph.replay)
        print(f"    {', '.join(record['under_load'].values())}", flush=True)
    if options.kernels:
        print_kernels(layer, sets)
    return record


def check(
    case: Case,
    dtype: str,
    experts: Experts,
    sets: list[InputSet],
    runs: Any,
    graph: torch.cuda.CUDAGraph,
) -> Error:
    """The largest error over all sets.

    Raises:
        WrongResultError: one of them is wrong.
    """
    runs.poison()
    graph.replay()
    errors = []
    for given, output in zip(sets, runs.outputs, strict=True):
        errors.append(compare(output, expect(case, experts, given), dtype))
        judge(errors[-1], dtype, peer=False)
    return max(errors, key=lambda error: error.largest)


def print_kernels(layer: BareLayer, sets: list[InputSet]) -> None:
    """The kernels of one run in their order, with their own times."""
    runs = layer.bind(sets[:1])
    runs.run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        runs.run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(events, key=lambda e: e.time_range.start):
        print(f"    {event.time_range.elapsed_us():9.1f} us  {event.name[:110]}")


def profile(layer: BareLayer, case: Case, dtype: str, tokens: int, routing: str) -> None:
    """A few runs without a graph, for a profiler that starts when it is told to."""
    runs = layer.bind(make_inputs(case, dtype, tokens, routing, count=3))
    runs.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    runs.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main())
