"""Tests that need a GPU: `make test-gpu` (tools/gpu_report.py), or `python -m pytest tests/gpu`.

Markers: `engine`, needs TensorRT and builds engines; `alone`, compares the GPU's free memory and
must have it to itself; `sanitize`, small enough for compute-sanitizer, which slows kernels down a
hundredfold; `large`, needs much memory and half a minute, run with MOE_INFER_LARGE=1 only.
"""

from __future__ import annotations

import os

# TensorRT and cuBLAS round float32 products to TF32 unless told not to, which is beyond the
# tolerance that is tested here; the layer itself never does. Read when CUDA starts.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine: needs TensorRT, and builds engines")
    config.addinivalue_line("markers", "alone: compares free GPU memory, nothing may run beside")
    config.addinivalue_line("markers", "sanitize: small enough for compute-sanitizer")
    config.addinivalue_line("markers", "large: whole layers of real sizes, with MOE_INFER_LARGE=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("MOE_INFER_LARGE") == "1":
        return
    large = [item for item in items if item.get_closest_marker("large")]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]
