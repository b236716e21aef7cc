"""InfMoE's own example on one GPU: how close a streamed layer comes to the speed of the bus.

    python benchmarks/infmoe_example.py --out benchmarks/results/infmoe_example.json

T5_FF, 20 experts of 4096 x 16384, 512 tokens, float32, at most 4 experts on the GPU. All experts
are 16.1 GB, which is what has to cross the bus; the program measures the bus in the same run,
checks the result against float64, and prints the ratio of the two times. Needs PyTorch (for memory,
events and the float64 check), the built library, 17 GB of disk or shared memory and 20 GB of host
memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_infer import op
from moe_infer.runtime.native import Layer
from moe_infer.weights import SafetensorsWriter, open_expert_weights

EXPERTS, D_MODEL, HIDDEN, SLOTS = 20, 4096, 16384, 4
ATOL, RTOL = 1e-5, 1e-4
CHECKED_TOKENS = 16


def write_experts(path: Path) -> None:
    """Every expert is the same random block, moved along by its number: 16 GB in seconds."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(2 * HIDDEN * D_MODEL, dtype=np.float32)

    def experts(rows: int, columns: int) -> Iterator[np.ndarray]:
        part = block[: rows * columns] / np.float32(np.sqrt(columns))
        for e in range(EXPERTS):
            yield np.roll(part, 977 * e).reshape(rows, columns)

    tensors = {
        "layer_norm": ("float32", (EXPERTS, D_MODEL)),
        "gate_up": ("float32", (EXPERTS, 2 * HIDDEN, D_MODEL)),
        "down": ("float32", (EXPERTS, D_MODEL, HIDDEN)),
    }
    with SafetensorsWriter(path, tensors) as writer:
        norm = 1 + 0.1 * rng.standard_normal((EXPERTS, D_MODEL), dtype=np.float32)
        writer.write("layer_norm", norm)
        writer.write("gate_up", experts(2 * HIDDEN, D_MODEL))
        writer.write("down", experts(D_MODEL, HIDDEN))


def bus_speed() -> float:
    """Bytes a second of the copy engine from pinned memory, median of 10 copies of 256 MiB."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    times = []
    for _ in range(12):
        times.append(timed(lambda: device.copy_(host, non_blocking=True)))
    return host.numel() / statistics.median(times[2:])


def timed(run: Any) -> float:
    """Seconds by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def reference(x: torch.Tensor, chosen: torch.Tensor, config: op.LayerConfig) -> torch.Tensor:
    """The layer in float64, on the GPU."""
    weights = open_expert_weights(config, D_MODEL)
    y = torch.empty_like(x, dtype=torch.float64)
    for e in chosen.unique().tolist():
        tensors = {k: torch.from_numpy(np.array(v)).cuda() for k, v in weights.expert(e).items()}
        rows = x[chosen == e].double()
        scale = torch.rsqrt((rows * rows).mean(-1, keepdim=True) + op.RMS_NORM_EPSILON)
        n = tensors["layer_norm"].double() * rows * scale
        gate = n @ tensors["gate_up"][0::2].double().T
        up = n @ tensors["gate_up"][1::2].double().T
        hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
        y[chosen == e] = rows + hidden @ tensors["down"].double().T
    return y


def measure(path: Path, tokens: int, runs: int) -> dict[str, Any]:
    """Runs the layer, checks a sample of tokens, times it."""
    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((D_MODEL, EXPERTS), dtype=np.float32) / np.sqrt(D_MODEL)
    attributes = {
        "expert_count": EXPERTS,
        "hidden_size": HIDDEN,
        "expert_sublayer_type": "T5_FF",
        "expert_weight_file": str(path),
        "max_concurrency": SLOTS,
        "expert_centroids": tuple(centroids.ravel().tolist()),
    }
    x = torch.from_numpy(rng.standard_normal((tokens, D_MODEL), dtype=np.float32)).cuda()
    y = torch.full_like(x, float("nan"))
    chosen = (x.double() @ torch.from_numpy(centroids).cuda().double()).argmax(-1)
    stream = torch.cuda.current_stream().cuda_stream
    x_at, y_at = x.data_ptr(), y.data_ptr()
    with Layer(attributes, D_MODEL, "float32") as layer:
        workspace = torch.empty(layer.workspace(tokens), dtype=torch.uint8, device="cuda")

        def run() -> None:
            scratch = workspace.data_ptr(), len(workspace)
            layer.run(x_at, None, y_at, tokens, *scratch, stream)

        cold = timed(run)
        config = op.LayerConfig.from_attributes(attributes)
        sample = slice(0, CHECKED_TOKENS)
        expected = reference(x[sample], chosen[sample], config)
        difference = (y[sample].double() - expected).abs()
        if not bool((difference <= ATOL + RTOL * expected.abs()).all()):
            raise SystemExit(f"wrong result: largest difference {difference.max().item()}")
        first = y.clone()
        fetched = layer.stats().bytes_fetched
        times = [timed(run) for _ in range(runs)]
        if not torch.equal(first, y):
            raise SystemExit("runs differ: the result depends on what was on the GPU")
        fetched = (layer.stats().bytes_fetched - fetched) // runs
    active = len(chosen.unique())
    expert_bytes = 4 * (3 * HIDDEN * D_MODEL + D_MODEL)
    return {
        "tokens": tokens,
        "active_experts": active,
        "active_bytes": active * expert_bytes,
        "fetched_bytes_a_run": fetched,
        "first_run_ms": cold * 1e3,
        "median_ms": statistics.median(times) * 1e3,
        "all_ms": [t * 1e3 for t in times],
        "largest_difference": difference.max().item(),
    }


def main() -> None:
    """Writes the weights, measures, prints and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dir", default="/dev/shm", help="where 16.1 GB fit for a while")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    os.environ.setdefault("MOE_INFER_PINNED_BYTES", "20G")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder) / "experts.safetensors"
        print("writing 16.1 GB of experts", flush=True)
        write_experts(path)
        bus = bus_speed()
        cases = [measure(path, tokens, options.runs) for tokens in options.tokens]
    for case in cases:
        case["bus_ms"] = case["active_bytes"] / bus * 1e3
        case["ratio"] = case["median_ms"] / case["bus_ms"]
        case["first_run_ratio"] = case["first_run_ms"] / case["bus_ms"]
        print(
            f"{case['tokens']} tokens: {case['median_ms']:.1f} ms (first run"
            f" {case['first_run_ms']:.1f}); {case['active_experts']} experts of"
            f" {case['active_bytes'] / 1e9:.1f} GB at {bus / 1e9:.1f} GB/s are {case['bus_ms']:.1f}"
            f" ms: ratio {case['ratio']:.3f}, first run {case['first_run_ratio']:.3f}"
        )
    smi = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.mem",
        "--format=csv,noheader",
    ]
    record = {
        "benchmark": "InfMoE's example: T5_FF, 20 experts, 4096 x 16384, float32, 4 slots",
        "target": "median_ms <= 1.1 * bus_ms",
        "bus_bytes_a_second": bus,
        "cases": cases,
        "gpu": subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
