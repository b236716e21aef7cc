"""Builds device code of ops/ for the host, as tests/native's sources bring it together."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / ".cuda/nvidia/cu13/include"


def build_or_skip(folder: Path, name: str, header: str) -> ctypes.CDLL:
    """tests/native/``name``.cpp as a library; ``header``: one of CUDA's that it includes."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if not (CUDA / header).is_file():
        pytest.skip(f"no {CUDA.relative_to(ROOT)}/{header} (make build)")
    path = folder / f"{name}.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-attributes"]
    flags += ["-U_FORTIFY_SOURCE"]  # it takes a jump to another stack for an error
    # What stands in on_host takes the place of a header of ops.
    includes = [f"-I{ROOT}/{place}" for place in ("tests/native/on_host", "ops", "ops/include")]
    source = str(ROOT / f"tests/native/{name}.cpp")
    done = subprocess.run(
        ["g++", *flags, *includes, "-isystem", str(CUDA), source, "-o", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))
