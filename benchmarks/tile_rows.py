"""Which tile of the Hopper kernel is fastest for how many rows an expert.

    python benchmarks/tile_rows.py --json benchmarks/results/tile_rows.json

For each shape and each number of rows an expert has on average, every tile is forced in turn
(MOE_INFER_TILE_ROWS) and timed, checked against float64. The thresholds in ``ops/gemm/hopper.cu``
are read off this table. Needs a Hopper GPU, PyTorch and the built library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernel_sweep import check
from moe_bench.cases import CASES
from moe_bench.inputs import make_inputs
from moe_bench.peers.bare import BareLayer
from moe_bench.timing import Contender, capture, measure
from moe_bench.weights import make_experts

TILES = (32, 64, 128, 288)
ROWS = (2, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
DTYPE = "bfloat16"


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=["mixtral", "qwen3"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dir", default="/dev/shm", help="where the weight file lies for a while")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    points = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for name in options.case:
            points += measure_case(name, options.rows, Path(folder))
    if options.json:
        record = {"card": torch.cuda.get_device_name(), "dtype": DTYPE, "points": points}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def measure_case(name: str, rows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of each tile, for one shape."""
    case = CASES[name]
    path = folder / f"{name}.safetensors"
    experts = make_experts(case, DTYPE, path)
    layer = BareLayer(case, DTYPE, path)
    points = []
    print(
        f"{name}: milliseconds by tile\n{'rows':>6} {'tokens':>7}"
        + "".join(f"{t:>9}" for t in TILES)
    )
    for average in rows:
        tokens = max(2, average * case.experts // case.top_k)
        sets = make_inputs(case, DTYPE, tokens, "uniform")
        contenders = {}
        for tile in TILES:
            os.environ["MOE_INFER_TILE_ROWS"] = str(tile)
            runs = layer.bind(sets)
            graph = capture(runs.run)
            check(case, DTYPE, experts, sets, runs, graph)
            contenders[str(tile)] = Contender(graph.replay, len(sets), on_device=True)
        del os.environ["MOE_INFER_TILE_ROWS"]
        results = measure(contenders, budget_s=1.0)
        times = {tile: round(results[tile].median, 4) for tile in contenders}
        points.append({"case": name, "rows": average, "tokens": tokens, "ms": times})
        best = min(times.values())
        cells = "".join(f"{t:8.4f}{'*' if t == best else ' '}" for t in times.values())
        print(f"{average:6} {tokens:7}{cells}", flush=True)
    layer.close()
    path.unlink()
    return points


if __name__ == "__main__":
    main()
