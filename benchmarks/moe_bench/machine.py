"""Where and with what a run was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import moe_infer
from moe_infer.runtime import plugin

PACKAGES = ("torch", "triton", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
COMMIT_VARIABLE = "MOE_INFER_COMMIT"
_STATE = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
)

_UNDER_LOAD = ("clocks.sm", "power.draw.instant", "clocks_event_reasons.active")


def describe() -> dict[str, Any]:
    """The machine, versions and the commit."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "card": torch.cuda.get_device_name(),
        "gpu_memory": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "multiprocessors": properties.multi_processor_count,
        "driver": query("driver_version").get("driver_version"),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions(),
    }


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi tells them."""
    return query(*_STATE)


def state_under_load(work: Callable[[], Any], seconds: float = 1.5) -> dict[str, str]:
    """Clock, power and what holds the clock down, while the GPU does nothing but ``work``.

    Args:
        work: enqueues some; called over and over.
        seconds: for which it is done; asked is when half of them are over.
    """
    end = time.perf_counter() + seconds
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: time.sleep(seconds / 2) or query(*_UNDER_LOAD))
        while not asked.done() or time.perf_counter() < end:
            for _ in range(8):
                work()
            torch.cuda.synchronize()
    return asked.result()


def query(*fields: str) -> dict[str, str]:
    """Fields of nvidia-smi; only "unknown" if it cannot tell."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    return dict(zip(fields, done.stdout.splitlines()[0].split(", "), strict=False))


def commit() -> str | None:
    """The source's commit, "-dirty" if it was changed; MOE_INFER_COMMIT where there is no git."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    root = Path(__file__).resolve().parent.parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python, the packages, CUDA and TensorRT."""
    found = {"python": platform.python_version(), "moe_infer": moe_infer.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        import onnxruntime  # brought by PYTHONPATH it may have no metadata

        found["onnxruntime (imported)"] = onnxruntime.__version__
    except ImportError:
        pass
    found["CUDA of torch"] = str(torch.version.cuda)
    status = plugin.status()
    found["TensorRT"] = status.tensorrt_version or "none"
    return found
