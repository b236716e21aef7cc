"""Rewrites a model of many gigabytes: peak memory, and speed against the disk's own.

    python benchmarks/rewrite_large.py --gigabytes 20 --out benchmarks/results/rewrite_large.json

Makes a decoder-like graph with float16 weights in external data (layers of Mixtral's form, 8
experts of 4096 x 14336, gate and up in one tensor as transformers writes them) and rewrites it in a
process of its own. Before and after, the whole data file is copied, plainly, 16 MiB at a time. All
are timed until their bytes are on the disk, and read a file that is out of the page cache. It needs
twice the model's size of free disk and removes what it wrote.

The exit code is 1 if the peak memory is above 2 GB and the largest tensor, or the speed is below
0.7 of the copy's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXPERTS, D_MODEL, HIDDEN, VOCABULARY = 8, 4096, 14336, 32000
CHUNK = 16 << 20
MOST_MEMORY = 2e9
LEAST_SPEED = 0.7

HEAD = """
<ir_version: 9, opset_import: ["" : 20]>
model (int64[n] tokens) => (float16[n, {vocabulary}] logits)
{{
  k = Constant <value = int64[1] {{2}}> ()
  last = Constant <value = int64[1] {{-1}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  row = Constant <value = int64[2] {{-1, {d}}}> ()
  pairs = Constant <value = int64[3] {{-1, 2, {d}}}> ()
  repeat = Constant <value = int64[3] {{1, 2, 1}}> ()
  column = Constant <value = int64[2] {{-1, 1}}> ()
  x_0 = Gather (embedding, tokens)
"""
LAYER = """
  h_{i} = MatMul (x_{i}, dense_{i})
  router_logits_{i} = MatMul (h_{i}, router_{i})
  probabilities_{i} = Softmax <axis = -1> (router_logits_{i})
  top_w_{i}, top_i_{i} = TopK <axis = -1, largest = 1> (probabilities_{i}, k)
  total_{i} = ReduceSum <keepdims = 1> (top_w_{i}, last)
  weight_{i} = Div (top_w_{i}, total_{i})
  wide_{i} = Unsqueeze (h_{i}, one)
  copies_{i} = Expand (wide_{i}, repeat)
  xs_{i} = Reshape (copies_{i}, row)
  chosen_{i} = Reshape (top_i_{i}, last)
  xc_{i} = Unsqueeze (xs_{i}, last)
  both_w_{i} = Gather <axis = 0> (gate_up_{i}, chosen_{i})
  downs_{i} = Gather <axis = 0> (down_{i}, chosen_{i})
  both3_{i} = MatMul (both_w_{i}, xc_{i})
  both_{i} = Squeeze (both3_{i}, last)
  g_{i}, u_{i} = Split <axis = -1, num_outputs = 2> (both_{i})
  sg_{i} = Sigmoid (g_{i})
  act_{i} = Mul (g_{i}, sg_{i})
  hidden_{i} = Mul (act_{i}, u_{i})
  hc_{i} = Unsqueeze (hidden_{i}, last)
  o3_{i} = MatMul (downs_{i}, hc_{i})
  o_{i} = Squeeze (o3_{i}, last)
  wc_{i} = Reshape (weight_{i}, column)
  ow_{i} = Mul (o_{i}, wc_{i})
  slots_{i} = Reshape (ow_{i}, pairs)
  moe_{i} = ReduceSum <keepdims = 0> (slots_{i}, one)
  x_{j} = Add (moe_{i}, x_{i})
"""
TAIL = "  logits = MatMul (x_{layers}, head)\n}}\n"


def make_model(folder: Path, gigabytes: float) -> tuple[int, int, int]:
    """Writes the model; returns layers, bytes of data, and those of the largest tensor."""
    d_model, hidden, vocabulary = D_MODEL, HIDDEN, VOCABULARY
    # A smaller model is smaller in everything, so that there are always several layers.
    while 3 * _layer_bytes(d_model, hidden) > gigabytes * 1e9:
        d_model, hidden, vocabulary = d_model // 2, hidden // 2, vocabulary // 2
    layers = round((gigabytes * 1e9 - 4 * vocabulary * d_model) / _layer_bytes(d_model, hidden))
    text = HEAD.format(vocabulary=vocabulary, d=d_model)
    text += "".join(LAYER.format(i=i, j=i + 1) for i in range(layers))
    model = onnx.parser.parse_model(text + TAIL.format(layers=layers))
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, d_model)}
    for i in range(layers):
        shapes[f"dense_{i}"] = (d_model, d_model)
        shapes[f"router_{i}"] = (d_model, EXPERTS)
        shapes[f"gate_up_{i}"] = (EXPERTS, 2 * hidden, d_model)
        shapes[f"down_{i}"] = (EXPERTS, d_model, hidden)
    shapes["head"] = (d_model, vocabulary)
    values = np.random.default_rng(0).standard_normal(CHUNK // 2).astype(np.float16) / 64
    offset = largest = 0
    with open(folder / "model.onnx.data", "wb") as file:
        for number, (name, shape) in enumerate(shapes.items()):
            size = 2 * int(np.prod(shape))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "model.onnx.data"),
                ("offset", offset),
                ("length", size),
            ):
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
            # No two tensors alike, at the speed of the disk.
            block = np.roll(values, 997 * number).tobytes()
            for begin in range(0, size, len(block)):
                file.write(block[: min(len(block), size - begin)])
            offset += size
            largest = max(largest, size)
        file.flush()
        os.fsync(file.fileno())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return layers, offset, largest


def _layer_bytes(d_model: int, hidden: int) -> int:
    return 2 * (EXPERTS * 3 * d_model * hidden + d_model * (d_model + EXPERTS))


def forget(path: Path) -> None:
    """Takes a file, whose bytes are on the disk, out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def copy(source: Path, target: Path) -> tuple[int, float]:
    """Bytes and seconds of a plain copy, until its bytes are on the disk."""
    forget(source)
    started = time.perf_counter()
    size = 0
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            size += len(chunk)
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return size, seconds


REWRITE = """
import json, resource, sys, time
import moe_infer
from moe_infer.graph.rewrite import rewrite

def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

before = peak()
started = time.perf_counter()
report = rewrite(sys.argv[1], sys.argv[2], progress=False)
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "layers": len(report.layers), "before": before,
    "peak": peak(), "cpu_seconds": usage.ru_utime + usage.ru_stime}))
"""


def rewrite(source: Path, target: Path) -> dict[str, Any]:
    """Rewrites in a process of its own, whose peak memory is thus the rewrite's."""
    forget(source.with_name("model.onnx.data"))
    done = subprocess.run(
        [sys.executable, "-c", REWRITE, str(source), str(target)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def measure(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Makes, copies, rewrites, copies."""
    source, target = folder / "in", folder / "out"
    source.mkdir()
    started = time.perf_counter()
    layers, size, largest = make_model(source, gigabytes)
    print(f"{layers} layers, {size / 1e9:.1f} GB, made in {time.perf_counter() - started:.0f} s")
    data = source / "model.onnx.data"
    copies = [copy(data, folder / "copy")]
    print(f"copy: {_speed(copies) / 1e9:.2f} GB/s")
    told = rewrite(source / "model.onnx", target)
    written = sum(path.stat().st_size for path in target.iterdir())
    if told["layers"] != layers or written < size:
        raise RuntimeError(f"{told['layers']} of {layers} layers, {written} of {size} bytes")
    print(f"rewrite: {size / told['seconds'] / 1e9:.2f} GB/s, peak {told['peak'] / 1e9:.2f} GB")
    shutil.rmtree(target)
    copies.append(copy(data, folder / "copy"))
    print(f"copy: {_speed(copies[1:]) / 1e9:.2f} GB/s")
    speed = size / told["seconds"]
    return {
        "model": {
            "layers": layers,
            "experts": EXPERTS,
            "bytes": size,
            "largest_tensor_bytes": largest,
        },
        "rewrite": {
            "seconds": told["seconds"],
            "bytes_per_second": speed,
            "cpu_seconds": told["cpu_seconds"],
            "peak_memory_bytes": told["peak"],
            "memory_before_bytes": told["before"],
        },
        "copy": {
            "bytes_per_second": _speed(copies),
            "each": [
                {"bytes": done, "bytes_per_second": done / seconds} for done, seconds in copies
            ],
        },
        "speed_of_copy": speed / _speed(copies),
        "memory_allowed_bytes": MOST_MEMORY + largest,
        "within": told["peak"] <= MOST_MEMORY + largest and speed >= LEAST_SPEED * _speed(copies),
    }


def _speed(copies: list[tuple[int, float]]) -> float:
    """Bytes a second over all of them."""
    return sum(size for size, _ in copies) / sum(seconds for _, seconds in copies)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of weights, from 0.01 on")
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="on the disk to use")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.gigabytes < 0.01:
        parser.error(f"--gigabytes must be at least 0.01, got {options.gigabytes}")
    options.folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(options.folder).free, 2.1e9 * options.gigabytes
    if free < needed:
        print(f"{options.folder}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free")
        return 2
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="rewrite_large-") as folder:
        record = measure(Path(folder), options.gigabytes)
    record["date"] = datetime.date.today().isoformat()
    record["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    record["load_average"] = os.getloadavg()[2]
    print(
        f"{record['speed_of_copy']:.2f} of the copy's speed; memory"
        f" {record['rewrite']['peak_memory_bytes'] / 1e9:.2f} of"
        f" {record['memory_allowed_bytes'] / 1e9:.2f} GB allowed"
    )
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
