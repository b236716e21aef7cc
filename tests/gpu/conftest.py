"""Tests that need a GPU: `python -m pytest tests/gpu`.

MOE_INFER_GPU_REPORT=FILE writes what ran where, as JSON. `-m sanitize` selects a few small cases
for compute-sanitizer, which slows kernels down a hundredfold.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# TensorRT and cuBLAS round float32 products to TF32 unless told not to, which is beyond the
# tolerance that is tested here; the layer itself never does. Read when CUDA starts.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import pytest

import moe_infer
from moe_infer.runtime import plugin

REPORT = os.environ.get("MOE_INFER_GPU_REPORT")
PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt", "numpy", "ml_dtypes")
GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem")

_cases: list[dict[str, Any]] = []
_started = time.time()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanitize: small enough for compute-sanitizer")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test that fails or is skipped in its set-up has no call.
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        case = {
            "test": report.nodeid.split("::", 1)[-1],
            "file": report.nodeid.split("::")[0],
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        if report.outcome != "passed":
            case["why"] = str(report.longrepr)[-2000:]
        _cases.append(case)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not REPORT or not _cases:
        return
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in _cases:
        counts[case["outcome"]] += 1
    record = {
        "what": "tests/gpu",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - _started, 1),
        "machine": {"gpu": _gpu(), "cpu": _cpu(), "system": platform.platform()},
        "versions": _versions(),
        "counts": counts,
        "cases": _cases,
    }
    path = Path(REPORT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _gpu() -> list[dict[str, str]]:
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return [{"unknown": str(error)}]
    lines = done.stdout.splitlines()
    return [dict(zip(GPU_FIELDS, line.split(", "), strict=True)) for line in lines]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "moe_infer": moe_infer.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    status = plugin.status()
    versions["TensorRT in the process"] = status.tensorrt_version or "none"
    versions["TensorRT headers of the plugin"] = status.headers_version or "none"
    return versions
