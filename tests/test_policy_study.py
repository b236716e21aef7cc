"""The policies that lost play by the rules, and the committed figures come from this code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import policy_study  # noqa: E402
from benchmarks.policies.informed import informed_hit_rate, trace_and_noise  # noqa: E402
from benchmarks.policies.others import OTHERS, Policy, hits  # noqa: E402
from moe_infer.simulate import Calls, generate, optimal_hits, replay  # noqa: E402

RECORD = json.loads((ROOT / "benchmarks/results/policy_study.json").read_text())


class Oldest(Policy):
    """LRU, to hold the cache against the library's."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.last: dict[int, int] = {}
        self.slot: dict[int, int] = {}

    def used(self, expert: int, resident: bool) -> None:
        self.last[expert] = self.clock

    def victim(self, expert: int, allowed: set[int]) -> int:
        return min(allowed, key=lambda e: (self.last[e], self.slot[e]))

    def fetched(self, expert: int, evicted: int | None) -> None:
        self.slot[expert] = len(self.slot) if evicted is None else self.slot.pop(evicted)


def some_calls() -> Calls:
    """Single tokens, and now and then more experts than slots."""
    rng = np.random.default_rng(6)
    likely = 1 / (1 + np.arange(20))
    parts = [
        np.sort(rng.choice(20, 18 if i % 30 == 29 else 3, replace=False, p=likely / likely.sum()))
        for i in range(600)
    ]
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    experts = np.concatenate(parts).astype(np.int32)
    return Calls(20, offsets, experts, np.ones(600, np.int64))


@pytest.mark.needs_library
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 19])
def test_the_cache_is_the_librarys(slots: int) -> None:
    calls = some_calls()
    found = hits(calls, slots, Oldest(slots))
    expected = replay(calls.offsets, calls.experts, 20, slots, "lru").hits
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("slots", [1, 2, 5, 12, 20])
def test_policies_that_lost(name: str, slots: int) -> None:
    calls = some_calls()
    found = hits(calls, slots, OTHERS[name](slots))
    assert found.sum() <= optimal_hits(calls, slots).sum()
    if slots == 20:
        assert found.sum() == len(calls.experts) - 20


def test_who_knows_the_process_is_between() -> None:
    calls, weights, noise = trace_and_noise(32, 4, 400, 0.8, 3)
    found = informed_hit_rate(calls, weights, noise, 0.8, 8)
    best = optimal_hits(calls, 8).sum() / len(calls.experts)
    counted = hits(calls, 8, OTHERS["staying counts"](8)).sum() / len(calls.experts)
    assert counted < found < best
    # The same process as generate's.
    made = generate(32, 4, 1, 400, locality=0.8, seed=3).calls(0)

    def again(one: Calls) -> float:
        chosen = one.experts.reshape(-1, 4)
        return float((chosen[1:, :, None] == chosen[:-1, None, :]).any(-1).mean())

    assert again(calls) == pytest.approx(again(made), abs=0.06)


@pytest.mark.needs_library
@pytest.mark.parametrize("row", [r for r in RECORD["rows"] if r["trace"].startswith("example")])
def test_committed_figures(row: dict) -> None:
    """Of the recorded traces, by the library's policies."""
    caches = policy_study.TRACES[row["trace"]]()
    found = {name: policy_study.rate(caches, row["slots"], name) for name in policy_study.OURS}
    assert found == {name: row["hit_rate"][name] for name in policy_study.OURS}
