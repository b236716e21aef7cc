"""The order in which an expert cache enqueues copies and experts, on streams without a GPU.

The cache is compiled with a CUDA runtime that does what streams and events allow in any order
(tests/native/fake_cuda.cpp), so that a missing dependency gives wrong weights for some seed.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from layer_models import make_parts, write_experts
from native.weight_reader import OURS, ROOT, build_program, why_not

pytestmark = pytest.mark.needs_library
EXPERTS, D_MODEL, HIDDEN = 12, 8, 12  # more tensors than the ring of host_ring.h has chunks
SOURCES = [
    *OURS,
    *(
        f"ops/core/{name}.cpp"
        for name in (
            "copy_batch",
            "expert_cache",
            "expert_loader",
            "host_ring",
            "policy_settings",
            "use_history",
        )
    ),
    "tests/native/fake_cuda.cpp",
    "tests/native/cache_order.cpp",
]


@pytest.fixture(scope="module")
def program() -> Path:
    if reason := why_not():
        pytest.skip(reason)
    return build_program(ROOT / "build/cache_order", SOURCES, ["-lpthread"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = make_parts("T5_FF", EXPERTS, D_MODEL, HIDDEN, "float32")
    path = tmp_path_factory.mktemp("weights") / "experts"
    return write_experts(path, parts, "T5_FF", EXPERTS, "safetensors stacked")


def run(
    program: Path, weights: Path, slots: int, seed: int, calls: int, **environment: str
) -> list[list[str]]:
    """What each call enqueued."""
    words = [str(w) for w in (program, weights, EXPERTS, HIDDEN, slots, seed, calls)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, f"{slots} slots, seed {seed}: {done.stderr[-4000:]}"
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("pinned", ["1G", "0"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9, 12])
def test_experts_are_there_when_they_are_used(
    program: Path, weights: Path, slots: int, pinned: str
) -> None:
    for seed in range(30):
        run(program, weights, slots, seed, 40, MOE_INFER_PINNED_BYTES=pinned)


def test_the_bus_does_not_wait_for_all_hits(program: Path, weights: Path) -> None:
    """A prompt needs all experts, and half of them are there: copies begin behind the first one."""
    slots, copies = 5, 3
    found = 0
    for seed in range(10):
        for log in run(program, weights, slots, seed, 40):
            misses = log.count("copy") // copies
            if log.count("use") == EXPERTS and misses == EXPERTS - slots:
                assert log[:2] == ["use", "copy"]
                # Never many experts in a row while there is something to copy.
                until_last = "".join(w[0] for w in log[: len(log) - log[::-1].index("copy")])
                assert "uuuu" not in until_last
                found += 1
    assert found > 20
