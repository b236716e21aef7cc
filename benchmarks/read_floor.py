"""What a kernel that does nothing but read needs for the bytes of a layer's chosen experts.

    python benchmarks/read_floor.py --json benchmarks/results/read_floor.json

In one launch, and in two, for the weights of the first product and for those of the second, as a
layer has to: runs on other memory follow one another in one CUDA graph, as in kernel_sweep.py. The
floor of the other benchmarks is the speed of a long read, which a short one does not reach. Needs a
GPU, PyTorch with Triton and 12 GiB of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_bench.cases import CASES, Case
from moe_bench.inputs import make_inputs, mean_active
from moe_bench.read_kernel import BLOCK, STEPS, read_kernel
from moe_bench.timing import Contender, capture, measure

MEMORY_BYTES = 12 << 30
PROGRAM_BYTES = BLOCK * STEPS * 4
TOKENS = (1, 16, 128)
"""With more, the products take longer than the reading."""
MOST_RUNS = 16
FIRST_PART = 2 / 3
"""Of an expert's bytes, gate and up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    memory = torch.zeros(MEMORY_BYTES // 4, dtype=torch.int32, device="cuda")
    points = []
    for case in (case for case in CASES.values() if case.tuned):
        for tokens in TOKENS:
            points.append(point(memory, case, tokens))
            print(json.dumps(points[-1]), flush=True)
    if options.json:
        record = {"card": torch.cuda.get_device_name(), "points": points}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def point(memory: torch.Tensor, case: Case, tokens: int) -> dict[str, Any]:
    """Times the reads of one layer and number of tokens, in milliseconds a run."""
    active = mean_active(make_inputs(case, "bfloat16", tokens, "uniform"))
    programs = round(active * case.expert_bytes / PROGRAM_BYTES)
    first = round(programs * FIRST_PART)
    runs = min(MOST_RUNS, MEMORY_BYTES // (programs * PROGRAM_BYTES))

    def contender(launches: Sequence[int]) -> Contender:
        return Contender(capture(reads(memory, launches, runs)).replay, runs, on_device=True)

    times = measure(
        {"one": contender([programs]), "two": contender([first, programs - first])}, budget_s=0.8
    )
    for found in times.values():
        if isinstance(found, Exception):
            raise found
    return {
        "case": case.name,
        "tokens": tokens,
        "bytes": programs * PROGRAM_BYTES,
        "one_launch_ms": times["one"].median,
        "two_launches_ms": times["two"].median,
    }


def reads(memory: torch.Tensor, launches: Sequence[int], runs: int) -> Callable[[], None]:
    """``runs`` times these launches, of so many programs each, all on other memory."""
    sums = torch.zeros(max(launches), dtype=torch.int32, device=memory.device)

    def run() -> None:
        at = 0
        for _ in range(runs):
            for programs in launches:
                source = memory[at * (PROGRAM_BYTES // 4) :]
                read_kernel[(programs,)](source, sums, BLOCK, STEPS, num_warps=4)
                at += programs

    return run


if __name__ == "__main__":
    sys.exit(main())
