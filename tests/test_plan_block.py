"""The block that plans a fetch on the GPU, run on the host, against policy.h's serial statement."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from native.host_library import build_or_skip

LRU, LFU, HALVED = 0, 1, 2  # PolicyKind
CALLS = 60


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_or_skip(tmp_path_factory.mktemp("plan"), "plan_block", "cuda_runtime_api.h")


def make_calls(experts: int, slots: int, seed: int) -> np.ndarray:
    """(CALLS, experts): rows of each expert; at most as many experts a call as there are slots.

    A few experts are in most calls, so there are hits; some calls need nothing, some all slots.
    """
    rng = np.random.default_rng(seed)
    likely = rng.zipf(1.6, experts).clip(max=1000).astype(float)
    likely /= likely.sum()
    counts = np.zeros((CALLS, experts), np.int32)
    for call in range(CALLS):
        most = int(rng.choice([0, 1, min(2, slots), slots, rng.integers(1, slots + 1)]))
        needed = rng.choice(experts, most, replace=False, p=likely)
        counts[call, needed] = rng.integers(1, 5, most)
    return counts


@pytest.mark.parametrize("orders", [0, 1], ids=["kernels copy", "the host copies"])
@pytest.mark.parametrize("kind", [LRU, LFU, HALVED])
@pytest.mark.parametrize(
    ("experts", "slots"),
    [
        (1, 1),
        (2, 1),
        (8, 3),
        (31, 30),
        (33, 8),
        (128, 32),
        (256, 255),
        (257, 9),
        (600, 300),
        (1024, 64),
    ],
)
def test_the_block_decides_what_the_policy_says(
    library: ctypes.CDLL, experts: int, slots: int, kind: int, orders: int
) -> None:
    counts = make_calls(experts, slots, seed=experts + kind)
    what = ctypes.create_string_buffer(200)
    differs = library.plan_calls(
        *(kind, 7, experts, slots, orders, CALLS),
        counts.ctypes.data_as(ctypes.c_void_p),
        what,
        len(what),
    )
    assert differs == -1, f"call {differs}: {what.value.decode()}"
