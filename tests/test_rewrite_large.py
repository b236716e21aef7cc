"""benchmarks/rewrite_large.py on a small model: what it measures and that it cleans up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_small_model(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/rewrite_large.py", "--gigabytes", "0.1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "disk"), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # 1 says that it was too slow: for so few bytes starting up counts, so the speed is not judged.
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(out.read_text())
    assert record["model"]["layers"] >= 3
    assert 0.08e9 < record["model"]["bytes"] < 0.12e9
    rewrite = record["rewrite"]
    assert rewrite["memory_before_bytes"] <= rewrite["peak_memory_bytes"]
    # Far less than the model: one tensor of one expert, and what is being hashed.
    grown = rewrite["peak_memory_bytes"] - rewrite["memory_before_bytes"]
    assert grown < 0.5 * record["model"]["bytes"]
    assert record["speed_of_copy"] > 0
    assert not list((tmp_path / "disk").iterdir())


def test_a_size_that_is_too_small() -> None:
    command = [sys.executable, "benchmarks/rewrite_large.py", "--gigabytes", "0.001"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be at least 0.01, got 0.001" in done.stderr
