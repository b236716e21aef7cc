"""The markers themselves: a skip is a failure in CI, but for the GPU, and the summary tells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest
@pytest.mark.needs_torch
def test_marked(): assert False
def test_called(): pytest.skip("asked to")
@pytest.mark.skipif(True, reason="told to")
def test_skipif(): assert False
@pytest.mark.needs_gpu
def test_gpu(): assert False
@pytest.mark.xfail(strict=True)
def test_expected(): assert False
def test_passes(): pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs TESTS beside this conftest, on a machine that has neither PyTorch nor a GPU."""
    (tmp_path / "tests").mkdir()
    conftest = (HERE / "conftest.py").read_text()
    absent = 'NEEDS["needs_torch"] = (lambda: "no torch", "")\n'
    absent += 'NEEDS["needs_gpu"] = (lambda: "no NVIDIA GPU", "")\n'
    (tmp_path / "tests/conftest.py").write_text(conftest + "\n\n" + absent)
    (tmp_path / "tests/test_it.py").write_text(TESTS)
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)

    def call(require_all: bool) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parent),
                "MOE_INFER_REQUIRE_ALL": "1" if require_all else "0",
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout

    return call


def test_skips_are_told_with_their_reasons(run):
    code, output = run(require_all=False)
    assert code == 0, output
    assert "1 passed, 4 skipped, 1 xfailed" in output
    summary = output[output.index("skipped, and why") :]
    for reason in ("no torch", "asked to", "told to", "no NVIDIA GPU"):
        assert f"   1  {reason}\n      tests/test_it.py (1)" in summary


def test_ci_allows_only_gpu_tests_to_be_skipped(run):
    code, output = run(require_all=True)
    assert code == 1
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors" in output
    assert "allows no skip but for a GPU: no torch" in output
