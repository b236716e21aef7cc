"""Fetching ahead, simulated: against cases computed by hand, and the library without guesses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_infer.simulate import Ahead, Pace, Trace, fetch_ahead, generate, replay

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ahead_study  # noqa: E402
import ahead_tables  # noqa: E402
from moe_bench.guesses import recall  # noqa: E402

# 1 GB/s is 1,000 bytes a microsecond: an expert takes 100 us.
PACE = Pace(expert_bytes=100_000, bus=1, idle_us=40, beside_us=10, stop_bytes=5_000)


def make(layers: Sequence[Sequence[Sequence[int]]], experts: int = 8) -> Trace:
    """A trace of one sequence from layers[layer][token]."""
    choices = np.array(layers)[:, None]
    return Trace(experts, choices, tuple(str(i) for i in range(len(layers))))


def ahead(
    needed: Any, guesses: Any, slots: int, pace: Pace = PACE, most: int = 1, **options: Any
) -> Ahead:
    given = None if guesses is None else np.array(guesses)[:, None]
    return fetch_ahead(make(needed), given, slots, pace, most, **options)


@pytest.mark.needs_library
@pytest.mark.parametrize(("slots", "half_life"), [(4, 128), (9, 3), (20, 16), (40, 1)])
def test_without_guesses_it_is_the_library_s_replay(slots: int, half_life: int) -> None:
    trace = generate(32, 4, 3, 300, 2, 0.5, seed=2)
    for most, spare in ((0, False), (0, True)):
        found = fetch_ahead(trace, None, slots, PACE, most, spare, half_life=half_life)
        for layer in range(3):
            calls = trace.calls(layer)
            same = replay(calls.offsets, calls.experts, 32, slots, f"halved:{half_life}")
            np.testing.assert_array_equal(found.hits[:, layer], same.hits)
            np.testing.assert_array_equal(found.misses[:, layer], same.misses)
    assert not found.right.any() and not found.wrong.any()
    assert found.precision == 0


def test_right_guesses_beside_the_slots_change_no_decision() -> None:
    trace = generate(32, 4, 2, 200, locality=0.5)
    without = fetch_ahead(trace, None, 8, PACE, 0)
    for spare in (True, False):
        found = fetch_ahead(trace, trace.choices, 8, PACE, 4, spare)
        assert found.precision == 1
        assert found.right[:, 0].sum() == 0 and found.misses[:, 1].sum() == 0
        if spare:
            np.testing.assert_array_equal(found.hits, without.hits)
    wrong = np.argsort(np.random.default_rng(0).random((2, 1, 200, 32)))[..., :4]
    beside = fetch_ahead(trace, wrong, 8, PACE, 2, spare=True)
    np.testing.assert_array_equal(beside.hits, without.hits)
    inside = fetch_ahead(trace, wrong, 8, PACE, 2)
    assert inside.hit_rate < without.hit_rate


@pytest.mark.parametrize("spare", [False, True])
def test_a_right_and_a_wrong_guess(spare: bool) -> None:
    # Layer 0 fetches 0 in 100 us, then the bus is idle for 40: 40,000 bytes of the guess.
    right = ahead([[[0]], [[3]]], [[[9]], [[3]]], 2, spare=spare)
    assert right.right.tolist() == [[0, 1]] and right.misses.tolist() == [[1, 0]]
    assert right.useful_bytes.tolist() == [[0, 40_000]]
    assert right.us.tolist() == [[140, 60 + 40]]
    assert right.us_per_run == 240
    # A wrong one is stopped; 5,000 bytes still come, then the miss.
    wrong = ahead([[[0]], [[3]]], [[[9]], [[4]]], 2, spare=spare)
    assert wrong.wrong.tolist() == [[0, 1]] and wrong.misses.tolist() == [[1, 1]]
    assert wrong.wasted_bytes.tolist() == [[0, 45_000]]
    assert wrong.us.tolist() == [[140, 105 + 40]]
    assert wrong.precision == 0 and wrong.hit_rate == 0


def test_guesses_follow_each_other_and_a_complete_one_needs_no_stop() -> None:
    pace = Pace(expert_bytes=100_000, bus=1, idle_us=130, stop_bytes=50_000)
    found = ahead([[[0]], [[3]]], [[[9, 9]], [[4, 3]]], 3, pace, most=2)
    # 4 is complete and wrong, 30,000 bytes of 3 came; 70,000 are left.
    assert found.wasted_bytes[0, 1] == 100_000
    assert found.useful_bytes[0, 1] == 30_000
    assert found.us.tolist() == [[230, 70 + 130]]
    # The other way round: 3 is complete, and what comes after the stop is at most what is left.
    found = ahead([[[0]], [[3]]], [[[9, 9]], [[3, 4]]], 3, pace, most=2)
    assert found.wasted_bytes[0, 1] == 80_000
    assert found.us.tolist() == [[230, 50 + 130]]


def test_an_idle_layer_leaves_the_bus_what_runs_beside_it() -> None:
    # In the second run layer 0 hits: 10 us beside and 40 idle.
    needed = [[[0], [0]], [[1], [2]]]
    found = ahead(needed, [[[9], [9]], [[1], [2]]], 2)
    assert found.hits.tolist() == [[0, 0], [1, 0]]
    assert found.useful_bytes[:, 1].tolist() == [40_000, 50_000]
    assert found.us.tolist() == [[140, 100], [50, 50 + 40]]
    assert found.after(1).us_per_run == 140


def test_a_wrong_guess_in_a_slot_costs_an_expert_and_one_beside_does_not() -> None:
    # Two slots hold 1 and 2; 3 is guessed, 1 is needed.
    needed = [[[0]] * 3, [[1], [2], [1]]]
    guesses = [[[9]] * 3, [[1], [2], [3]]]
    assert ahead(needed, guesses, 2, spare=True).hits[:, 1].tolist() == [0, 0, 1]
    # The policy evicts, of equals, the one fetched last, which is 2; then 1 is a hit.
    assert ahead(needed, guesses, 2).hits[:, 1].tolist() == [0, 0, 1]
    needed[1][2] = [2]
    assert ahead(needed, guesses, 2, spare=True).hits[:, 1].tolist() == [0, 0, 1]
    assert ahead(needed, guesses, 2).misses[:, 1].tolist() == [0, 0, 1]
    # Unless it is guessed itself.
    longer = [[[9, 9]] * 3, [[1, 1], [2, 2], [3, 2]]]
    assert ahead(needed, longer, 2).hits[:, 1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("spare", [False, True])
def test_complete_wrong_guesses_stay_only_if_told(spare: bool) -> None:
    needed = [[[0]] * 2, [[1], [5]]]
    guesses = [[[9, 9]] * 2, [[5, 5], [6, 5]]]  # who is guessed does not leave for a guess
    long = Pace(expert_bytes=100_000, bus=1, idle_us=100)
    assert ahead(needed, guesses, 2, long, spare=spare).hits[:, 1].tolist() == [0, 0]
    assert ahead(needed, guesses, 2, long, spare=spare, keep=True).hits[:, 1].tolist() == [0, 1]
    short = Pace(expert_bytes=100_000, bus=1, idle_us=99)
    assert ahead(needed, guesses, 2, short, spare=spare, keep=True).hits[:, 1].tolist() == [0, 0]


def test_without_a_list_the_absent_expert_that_is_worth_most() -> None:
    # One slot: 4 was used twice, then 5 came and 4 went; 4 is what the counts name.
    needed = [[[0]] * 4, [[4], [4], [5], [4]]]
    found = ahead(needed, None, 1, spare=True)
    assert found.right[:, 1].tolist() == [0, 0, 0, 1]
    assert found.wrong[:, 1].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"slots": 0}, "slots must be at least top_k, 1, got 0"),
        ({"most": -1}, "most must be at least 0 and half_life 1, got -1 and 128"),
        ({"half_life": 0}, "got 1 and 0"),
        ({"guesses": [[[1, 2]]]}, "guesses must be"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], sentence: str) -> None:
    good: dict[str, Any] = {"needed": [[[0]], [[1]]], "guesses": [[[1]], [[1]]], "slots": 2}
    with pytest.raises(ValueError, match=sentence):
        ahead(**{**good, **change})


@pytest.mark.parametrize("name", ["expert_bytes", "bus", "idle_us", "stop_bytes"])
def test_paces_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Pace(**{**vars(PACE), name: -1})


# --- The study


def test_guesses_have_the_stated_recall() -> None:
    shape = ahead_study.Shape(3, 32, 4, 1e6, 10, (0.69, 0.90, 0.98), (8,), (1,))
    guessed = ahead_study.generated(shape, tokens=200)
    for target, list_of in guessed.guesses.items():
        found = recall(list_of[..., :4], guessed.trace.choices)
        assert found == pytest.approx(float(target), abs=0.01)


def test_the_study_of_a_small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_study, "WARM", 50)
    shape = ahead_study.Shape(3, 32, 4, 1e6, 10, (0.69, 0.90, 0.98), (8,), (1, 2))
    guessed = ahead_study.generated(shape, tokens=150)
    rows = [{"model": "small", **row} for row in ahead_study.speeds(shape, guessed)]
    assert [row["idle_us"] for row in rows] == [25, 50, 100, 200]
    for row in rows:
        better = row["spare, 1"]
        assert better["0.90"] < better["0.75"] < better["0.60"] < row["ms"]
    quality = [{"model": "small", **row} for row in ahead_study.quality(shape, guessed)]
    assert all(row["1"]["precision"] >= row["2"]["precision"] for row in quality)
    ways = [{"model": "small", **row} for row in ahead_study.ways(shape, guessed)]
    record = {"rows": rows, "quality": quality, "ways": ways}
    assert ahead_tables.speeds(record, "small", "spare").count("\n") == 5
    assert ahead_tables.quality(record).count("\n") == 4
    assert ahead_tables.ways(record, "small").count("\n") == 11


def test_routers_guesses_come_from_the_layer_before() -> None:
    layer = ahead_study.prefetch_study.Layer
    eye = np.eye(3)
    first = layer("a", 1, eye, np.array([[0.0, 1, 0], [1, 0, 0]]), np.array([[1], [0]]))
    second = layer("b", 1, eye[:, ::-1], np.zeros((2, 3)), np.array([[2], [1]]))
    guessed = ahead_study.routers_guesses([[first, second]])
    assert guessed.trace.choices[:, 0, :, 0].tolist() == [[1, 0], [2, 1]]
    assert guessed.guesses["router"][:, 0, :, 0].tolist() == [[1, 0], [1, 2]]
