"""What a figure or a test result was made on: the machine, the versions, the compiled plugin.

`python tools/machine.py` prints it as JSON.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt", "numpy", "ml_dtypes")
GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem")
TENSORRT_PROVIDER = "TensorrtExecutionProvider"


def describe() -> dict[str, Any]:
    from moe_infer.runtime import plugin

    status = plugin.status()
    return {
        "machine": {"gpu": gpus(), "cpu": cpu(), "system": platform.platform()},
        "versions": versions(status),
        "library": library(status.library),
        "gpus": plugin.gpu_count(),
        "why_no_tensorrt": why_no_tensorrt(status),
    }


def gpus() -> list[dict[str, str]]:
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return [{"unknown": str(error)}]
    lines = done.stdout.splitlines()
    return [dict(zip(GPU_FIELDS, line.split(", "), strict=True)) for line in lines]


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{os.cpu_count()} cores"


def versions(status: Any) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "moe_infer": (ROOT / "VERSION").read_text().strip(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["TensorRT in the process"] = status.tensorrt_version or "none"
    found["TensorRT headers of the plugin"] = status.headers_version or "none"
    return found


def library(path: Path | None) -> dict[str, str] | None:
    """Two results are of one build if these are equal."""
    if path is None:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"sha256": digest, "bytes": str(path.stat().st_size)}


def why_no_tensorrt(status: Any) -> str:
    """Why no engine can be built and run here, "" if one can."""
    if not status.usable:
        return str(status.reason)
    try:
        import onnxruntime
    except ImportError as error:
        return f"ONNX Runtime cannot be imported: {error}"
    available = onnxruntime.get_available_providers()
    return "" if TENSORRT_PROVIDER in available else f"this ONNX Runtime has no {TENSORRT_PROVIDER}"


if __name__ == "__main__":
    print(json.dumps(describe()))
