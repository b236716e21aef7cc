"""Markers for what a machine may lack, and a summary of what was therefore skipped.

Under MOE_INFER_REQUIRE_ALL=1 (CI) a skip of anything but a GPU test is a failure.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

from moe_infer.runtime import plugin

ROOT = Path(__file__).resolve().parent.parent
REQUIRE_ALL = os.environ.get("MOE_INFER_REQUIRE_ALL") == "1"
# CI must say the same twice; elsewhere the examples are new in every run.
if REQUIRE_ALL:
    hypothesis = importlib.import_module("hypothesis")  # tests/gpu run without it elsewhere
    hypothesis.settings.register_profile("ci", derandomize=True)
    hypothesis.settings.load_profile("ci")

TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")


# --- What a marker needs: each function gives the reason why it is not there, "" if it is.


def why_no_torch() -> str:
    missing = [name for name in ("torch", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (MOE_INFER_WITH_TORCH=1 make test)" * bool(missing)


def why_no_library() -> str:
    if plugin.find_library() is not None:
        return ""
    told = ROOT / "build/not_built.txt"  # by tools/build_native.py
    reason = told.read_text().strip() if told.is_file() else "run `make build`"
    return f"libmoe_infer.so is not built: {reason}"


@functools.cache
def why_no_tensorrt() -> str:
    """Makes `import tensorrt` work: an installed one, else the bindings over .tensorrt/lib."""
    if importlib.util.find_spec("tensorrt") is not None:
        importlib.import_module("tensorrt")
        return ""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        return "the Python bindings tensorrt-cu12-bindings 10.6.0 are not installed (make test)"
    libraries = [ROOT / ".tensorrt/lib" / name for name in TENSORRT_LIBRARIES]
    for path in libraries:
        if not path.is_file():
            return f"there is no .tensorrt/lib/{path.name} (python tools/get_tensorrt.py)"
    for path in libraries:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    return ""


@functools.cache
def why_old_onnxruntime() -> str:
    """Its own MoE operator on the CPU is wrong before, and it does not tell who runs a node."""
    version = importlib.import_module("onnxruntime").__version__
    numbers = tuple(int(number) for number in version.split(".")[:2])
    return f"ONNX Runtime {version} is older than 1.32" * (numbers < (1, 32))


@functools.cache
def why_no_gpu() -> str:
    return "" if plugin.gpu_count() else "no NVIDIA GPU"


NEEDS = {
    "needs_torch": (why_no_torch, "PyTorch and onnxscript"),
    "needs_library": (why_no_library, "libmoe_infer.so"),
    "needs_tensorrt": (why_no_tensorrt, "TensorRT's library and Python bindings; no GPU"),
    "needs_onnxruntime_1_32": (why_old_onnxruntime, "ONNX Runtime 1.32 or newer"),
    "needs_gpu": (why_no_gpu, "an NVIDIA GPU"),
}


def pytest_configure(config: pytest.Config) -> None:
    for name, (_, description) in NEEDS.items():
        config.addinivalue_line("markers", f"{name}: needs {description}")
    if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers inherit the variable
        folder = tempfile.TemporaryDirectory(prefix="moe-infer-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["MOE_INFER_TEST_FOLDER"] = folder.name  # see shared_files.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_gpu_path(item.path):
            item.add_marker("needs_gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # A GPU that is not there is the reason that counts.
    names = sorted(
        {mark.name for mark in item.iter_markers()}, key=lambda name: name != "needs_gpu"
    )
    for name in names:
        if name in NEEDS and (reason := NEEDS[name][0]()):
            pytest.skip(reason)


@pytest.fixture
def trt():
    """TensorRT's Python module."""
    if reason := why_no_tensorrt():
        pytest.skip(reason)
    return sys.modules["tensorrt"]


# --- MOE_INFER_REQUIRE_ALL


def is_gpu_path(path: Path) -> bool:
    return (ROOT / "tests/gpu") in path.parents


def refuse_skip(report) -> None:
    """Turns a skip into a failure; an expected failure is also reported as a skip, and stays."""
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"MOE_INFER_REQUIRE_ALL=1 allows no skip but for a GPU: {why(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if item.get_closest_marker("needs_gpu") is None:
        refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if not is_gpu_path(collector.path):
        refuse_skip(report)
    return report


# --- The summary


def why(report) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if not hasattr(report, "wasxfail")
    ]
    if not skipped:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for report in skipped:
        groups[why(report)].append(report.nodeid.split("::")[0])
    terminalreporter.section("skipped, and why")
    for reason, files in sorted(groups.items()):
        where = ", ".join(f"{file} ({files.count(file)})" for file in sorted(set(files)))
        terminalreporter.write_line(f"{len(files):4d}  {reason}\n      {where}")
