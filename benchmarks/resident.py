"""An MoE layer whose experts are all in GPU memory, against everything else that runs one.

    python benchmarks/resident.py                        # everything
    python benchmarks/resident.py --minutes 9 --case mixtral qwen3 --dtype bfloat16
    python benchmarks/resident.py --append --case deepseek --minutes 9

One process measures, in turn: the bare kernels through the library's C entry, with and without a
CUDA graph; MoELayer and com.microsoft.MoE through ONNX Runtime, with IO binding, with and without
a CUDA graph, and as a layer's share of a graph of several; torch._grouped_mm in a CUDA graph; a
module of yours (--peer-module); and what the chip can do at most. The same weights and inputs for
all; a result is compared with float64 before its time counts. Writes resident.json after every
point, and resident.png, into --out. Needs a GPU, PyTorch and the built library; what else is
missing costs only its columns. benchmarks/results/README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_bench import report
from moe_bench.budget import Budget
from moe_bench.cases import CASES, DTYPES, TOKENS
from moe_bench.machine import COMMIT_VARIABLE, describe, gpu_state
from moe_bench.peers.peer import Problem
from moe_bench.point import Contest, message
from moe_bench.rates import measure_rates
from moe_bench.record import Record
from moe_bench.routing import ROUTINGS
from moe_bench.weights import folder_with_room, make_experts

PEERS = ("bare", "tensorrt", "ort_moe", "torch", "module")


def main() -> int:
    options = parse()
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)  # ONNX Runtime takes no default stream
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "resident.json", describe(), options.append)
    plan = list(problems(options))
    budget = Budget(60 * options.minutes, len(plan) * len(options.tokens) * len(options.routing))
    try:
        for name, dtype in plan:
            if budget.spent:
                break
            try:
                measure_layer(name, dtype, stream, record, budget, options)
            except Exception as error:  # the others may still be measured
                record.add_failure(name, dtype, message(error))
                print(f"{name}, {dtype}: {message(error)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept", file=sys.stderr)
    print(report.text(record.data))
    left = f"; {budget.left} planned points were not measured" if budget.left else ""
    print(f"{budget.used:.0f} s in all{left}")
    try:
        from moe_bench.plot import draw

        draw(record.data, options.out / "resident.png")
    except ImportError as error:
        print(f"no plot: {error}")
    return int(record.failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_out = Path(__file__).resolve().parent / "results"
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peer-module", type=Path, help="a file with make(case) -> callable")
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the results")
    parser.add_argument("--append", action="store_true", help="keep other points of resident.json")
    parser.add_argument("--minutes", type=float, default=60.0, help="time for all")
    parser.add_argument("--quick", action="store_true", help="tuned shapes, bfloat16, uniform")
    parser.add_argument("--dir", default="/dev/shm", help="where the weight file lies for a while")
    parser.add_argument("--commit", help="of the source, where there is no git")
    options = parser.parse_args()
    if options.quick:
        options.case = [name for name in options.case if CASES[name].tuned]
        options.dtype, options.routing = ["bfloat16"], ["uniform"]
    options.tokens = sorted(set(options.tokens))
    return options


def problems(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(case, dtype): the tuned shapes in all types, then the others."""
    for tuned in (True, False):
        for dtype in options.dtype:
            yield from ((n, dtype) for n in options.case if CASES[n].tuned == tuned)


def measure_layer(
    name: str,
    dtype: str,
    stream: torch.cuda.Stream,
    record: Record,
    budget: Budget,
    options: argparse.Namespace,
) -> None:
    """All points of one layer in one type."""
    case = CASES[name]
    begin = time.perf_counter()
    rates = measure_rates([dtype])
    before = gpu_state()
    place = folder_with_room(options.dir, case.file_bytes)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        experts = make_experts(case, dtype, Path(folder) / f"{name}.safetensors")
        problem = Problem(case, dtype, experts, tuple(options.tokens), stream)
        contest = Contest(problem, rates, make_peers(options), l2_bytes())
        print(
            f"{case.title}, {dtype}: set up in {time.perf_counter() - begin:.0f} s; read"
            f" {rates.read / 1e12:.2f} TB/s, dense {rates.dense[dtype] / 1e12:.0f} TFLOP/s",
            flush=True,
        )
        try:
            for tokens in options.tokens:
                contest.open(tokens)
                for routing in options.routing:
                    if budget.spent:
                        return
                    point = contest.measure(routing, budget.share())
                    record.add(point)
                    times = {n: report.number(c.get("ms")) for n, c in point["contenders"].items()}
                    print(f"  {tokens} {routing}: {json.dumps(times)}", flush=True)
        finally:
            record.add_state(name, dtype, before, gpu_state(), rates)
            contest.close()
            del contest, problem, experts
            gc.collect()
            torch.cuda.empty_cache()


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def make_peers(options: argparse.Namespace) -> list[Any]:
    """The peers that were asked for; an import that fails makes one that says so."""
    from moe_bench.peers.missing import load_peer

    names = [n for n in options.peers if n != "module" or options.peer_module]
    return [load_peer(name, options.peer_module) for name in names]


if __name__ == "__main__":
    sys.exit(main())
