"""Traces, the optimum, times and the command ``moe-infer simulate``."""

from __future__ import annotations

import io
import itertools
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_infer
from moe_infer.cli import main
from moe_infer.errors import PluginError
from moe_infer.runtime.expert_use import count_expert_use
from moe_infer.simulate import (
    Calls,
    Machine,
    Trace,
    compare,
    generate,
    optimal_hits,
    record,
    replay,
)
from moe_infer.simulate.generate import target_shares

ROOT = Path(__file__).resolve().parent.parent
needs_library = pytest.mark.needs_library


def make_calls(calls: Sequence[Sequence[int]], experts: int) -> Calls:
    offsets = np.cumsum([0, *(len(call) for call in calls)])
    flat = np.array([e for call in calls for e in call], np.int32)
    return Calls(experts, offsets, flat, np.ones(len(calls), np.int64))


def small_trace(sequences: int = 5, tokens: int = 4) -> Trace:
    rng = np.random.default_rng(3)
    choices = np.argsort(rng.random((2, sequences, tokens, 6)), axis=-1)[..., :2]
    return Trace(6, choices, ("a", "b"), "made up")


# --- Traces


def test_calls_of_a_layer() -> None:
    trace = small_trace()
    calls = trace.calls(1, batch=2, prefill=3)
    # Groups of 2, 2 and 1 sequences: a prompt and one more token each.
    assert calls.tokens.tolist() == [6, 2, 6, 2, 3, 1]
    expected = []
    for group in (slice(0, 2), slice(2, 4), slice(4, 5)):
        for step in (slice(0, 3), slice(3, 4)):
            expected.append(sorted(set(trace.choices[1, group, step].reshape(-1).tolist())))
    found = np.split(calls.experts, calls.offsets[1:-1])
    assert [part.tolist() for part in found] == expected
    assert trace.calls(0).tokens.tolist() == [1] * 20
    assert len(trace.calls(0, batch=9, prefill=4)) == 1


def test_calls_of_all_layers_together() -> None:
    trace = small_trace()
    shared = trace.shared_calls(batch=5)
    assert shared.expert_count == 12
    apart = [trace.calls(layer, batch=5) for layer in (0, 1)]
    for i, part in enumerate(np.split(shared.experts, shared.offsets[1:-1])):
        layer, step = i % 2, i // 2
        calls = apart[layer]
        own = calls.experts[calls.offsets[step] : calls.offsets[step + 1]]
        assert part.tolist() == (own + 6 * layer).tolist()


@pytest.mark.parametrize(("batch", "prefill"), [(0, 0), (1, -1), (1, 5)])
def test_calls_that_cannot_be(batch: int, prefill: int) -> None:
    with pytest.raises(ValueError, match="batch must be at least 1 and prefill 0 to 4"):
        small_trace().calls(0, batch, prefill)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"expert_count": 5}, "experts must be 0 to 4, got 0 to 5"),
        ({"expert_count": 0}, "expert_count must be 1 to 65536"),
        ({"layers": ("a",)}, "2 layers have 1 names"),
        ({"choices": np.zeros((2, 1, 1, 2), int)}, "same expert twice"),
        ({"choices": np.zeros((2, 1, 1, 2))}, "must be integers"),
        ({"choices": np.zeros((2, 0, 1, 2), int)}, "none of them 0"),
        ({"choices": np.zeros((2, 1, 2), int)}, "layers, sequences, tokens, top_k"),
        ({"choices": np.full((2, 1, 1, 1), -1)}, "got -1 to -1"),
    ],
)
def test_traces_that_cannot_be(change: dict[str, Any], sentence: str) -> None:
    good = vars(small_trace())
    with pytest.raises(ValueError, match=sentence):
        Trace(**{**good, **change})


@pytest.mark.parametrize("experts", [6, 300])
def test_a_trace_survives_a_file(tmp_path: Path, experts: int) -> None:
    trace = Trace(experts, small_trace().choices, ("a", "äöü"), "made up")
    trace.save(tmp_path / "t.npz")
    found = Trace.load(tmp_path / "t.npz")
    assert (found.expert_count, found.layers, found.source) == (experts, ("a", "äöü"), "made up")
    np.testing.assert_array_equal(found.choices, trace.choices)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def arrays_of(trace: Trace) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(
        file,
        format=np.array("moe-infer trace 1"),
        source=np.array(trace.source),
        layers=np.array(trace.layers),
        expert_count=np.array(trace.expert_count),
        choices=trace.choices,
    )
    file.seek(0)
    with np.load(file) as archive:
        return dict(archive)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": np.array("moe-infer trace 2")}, "format must be 'moe-infer trace 1'"),
        ({"format": np.array(3)}, "format is int64"),
        ({"layers": np.array("ab")}, "layers is"),
        ({"expert_count": np.array([6])}, "expert_count is"),
        ({"expert_count": np.array(4)}, "experts must be 0 to 3"),
        ({"choices": np.array(["x"], object)}, "Object arrays cannot be loaded|pickle"),
        ({"choices": np.zeros((2, 1, 1, 1), np.float32)}, "must be integers"),
        ({"more": np.zeros(1)}, "expected the arrays"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **{**arrays_of(small_trace()), **change})
    with pytest.raises(ValueError, match=sentence) as error:
        Trace.load(path)
    assert str(path) in str(error.value)


def test_damaged_files(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    small_trace(40, 40).save(good)
    whole = good.read_bytes()
    path = tmp_path / "bad.npz"
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(300):
        data = bytearray(whole[: rng.integers(len(whole))] if i % 3 == 0 else whole)
        for _ in range(rng.integers(1, 5)):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            Trace.load(path)
        except ValueError as error:
            refused += 1
            assert "is no trace that can be read" in str(error)
    assert refused > 200
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "absent.npz")


def test_a_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_infer.simulate.trace.MOST_BYTES", 20 << 20)
    path = tmp_path / "bomb.npz"
    arrays = arrays_of(small_trace())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                if name != "choices":
                    np.lib.format.write_array(member, value)
                    continue
                for _ in range(22):
                    member.write(bytes(1 << 20))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="of at most 20971520 bytes"):
        Trace.load(path)


# --- Generated traces


@pytest.mark.parametrize(
    ("experts", "top_k", "locality"), [(256, 8, 0.0), (128, 8, 0.5), (64, 4, 0.9), (8, 1, 0.0)]
)
def test_generated_traces_have_the_stated_statistics(
    experts: int, top_k: int, locality: float
) -> None:
    trace = generate(experts, top_k, 2, 1500, 4, locality, seed=1)
    choices = trace.choices
    assert choices.shape == (2, 4, 1500, top_k)
    for layer in choices:
        counts = np.sort(np.bincount(layer.reshape(-1), minlength=experts))[::-1]
        quarters = np.cumsum(counts)[experts // 4 - 1 :: experts // 4][:3] / counts.sum()
        # Neighbouring tokens are alike, so there are fewer independent ones.
        tolerance = 0.015 + 0.03 * locality
        np.testing.assert_allclose(quarters, [0.69, 0.90, 0.98], atol=tolerance)
    # The hot experts of two layers are others.
    hottest = [set(np.bincount(c.reshape(-1)).argsort()[-experts // 4 :]) for c in choices]
    assert hottest[0] != hottest[1]
    again = (choices[:, :, 1:, :, None] == choices[:, :, :-1, None, :]).any(-1).mean()
    shares = target_shares(experts, top_k)
    independent = top_k * float((shares**2).sum())
    if locality == 0:
        assert again == pytest.approx(independent, abs=0.02)
    else:
        assert again > independent + 0.3 * locality
    same = generate(experts, top_k, 2, 1500, 4, locality, seed=1)
    np.testing.assert_array_equal(same.choices, choices)


def test_target_shares() -> None:
    shares = target_shares(256, 8)
    assert shares.sum() == pytest.approx(1)
    assert np.all(np.diff(shares) <= 1e-12)
    np.testing.assert_allclose(np.cumsum(shares)[[63, 127, 191]], [0.69, 0.90, 0.98])
    even = target_shares(8, 2, (0.25, 0.5, 0.75))
    np.testing.assert_allclose(even, 1 / 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"locality": 1.0}, "locality must be from 0 to below 1"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"top_k": 9}, "top_k 1 to expert_count"),
        ({"top_k": 3}, "would get 1.* choices of a token"),
        ({"expert_count": 3}, "expert_count must be at least 4"),
        ({"coverage": (0.2, 0.5, 0.9)}, "no more than the one before"),
        ({"coverage": (0.9, 0.8, 0.9)}, "coverage must be three ascending"),
    ],
)
def test_traces_that_cannot_be_generated(arguments: dict[str, Any], sentence: str) -> None:
    good = {"expert_count": 8, "top_k": 1, "layers": 1, "tokens": 4}
    with pytest.raises(ValueError, match=sentence):
        generate(**{**good, **arguments})


# --- The optimum


def fewest_misses(calls: Sequence[Sequence[int]], slots: int, last_stays: bool) -> int:
    """By trying everything that a cache may hold after each call."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for call in calls:
        needed = frozenset(call)
        following: dict[frozenset[int], int] = {}
        for there, misses in states.items():
            fetched = needed - there
            union = there | needed
            for size in range(min(slots, len(union)) + 1):
                for kept in map(frozenset, itertools.combinations(sorted(union), size)):
                    if last_stays and fetched and not kept & fetched:
                        continue
                    cost = misses + len(fetched)
                    following[kept] = min(following.get(kept, cost), cost)
        states = following
    return min(states.values())


@given(
    st.lists(st.sets(st.integers(0, 4)).map(sorted), max_size=9),
    st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_the_optimum_by_trying_everything(calls: list[list[int]], slots: int) -> None:
    found = optimal_hits(make_calls(calls, 5), slots)
    needed = np.array([len(call) for call in calls], np.int64)
    misses = int((needed - found).sum())
    assert misses == fewest_misses(calls, slots, last_stays=False)
    # What a real cache can reach, and what it can reach with one slot more.
    assert fewest_misses(calls, slots + 1, last_stays=True) <= misses
    assert misses <= fewest_misses(calls, slots, last_stays=True)


@needs_library
@given(
    st.lists(st.sets(st.integers(0, 9), max_size=6).map(sorted), max_size=40),
    st.integers(1, 11),
    st.sampled_from(["lru", "lfu:4", "halved"]),
)
@settings(max_examples=100, deadline=None)
def test_no_policy_beats_the_optimum(calls: list[list[int]], slots: int, policy: str) -> None:
    made = make_calls(calls, 10)
    found = replay(made.offsets, made.experts, 10, slots, policy)
    assert found.hits.sum() <= optimal_hits(made, slots).sum()


def test_the_optimum_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="slots must be at least 1"):
        optimal_hits(make_calls([[0]], 1), 0)


# --- Times


def test_times_of_calls() -> None:
    machine = Machine(expert_bytes=5.55e6, bus=55.5, other_us=50, expert_us=2, fetch_us=1)
    needed, misses = np.array([8, 8, 0, 100]), np.array([0, 3, 0, 1])
    # A fetch takes 101 microseconds.
    assert machine.call_us(needed, misses).tolist() == [66, 355, 50, 250]
    assert machine.floor_us(needed, misses) == pytest.approx(max(400, 66 + 66 + 50 + 250))
    for wrong in ({"bus": 0}, {"expert_bytes": 0}, {"other_us": -1}, {"expert_us": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a number"):
            Machine(**{"expert_bytes": 1.0, **wrong})


# --- Comparing


@needs_library
def test_points_add_up() -> None:
    trace = generate(16, 2, 3, 200, 4, locality=0.5)
    machine = Machine(expert_bytes=1e6, other_us=10)
    points = compare(trace, [4, 8], ["lru", "belady"], batch=2, prefill=50, machine=machine)
    assert [(p.slots, p.policy) for p in points] == [
        (4, "lru"),
        (4, "belady"),
        (8, "lru"),
        (8, "belady"),
    ]
    needed = misses = prompts = us = 0
    for layer in range(3):
        calls = trace.calls(layer, 2, 50)
        found = replay(calls.offsets, calls.experts, 16, 4, "lru")
        needed += found.needed.sum()
        misses += found.misses.sum()
        prompts += found.misses[calls.tokens == 100].sum()
        us += machine.call_us(found.needed, found.misses).sum()
    assert (points[0].needed, points[0].misses) == (needed, misses)
    assert points[0].decode_misses == misses - prompts > 0
    assert points[0].tokens == 800
    assert points[0].ms_per_token == pytest.approx(us / 800e3)
    assert points[1].hit_rate > points[0].hit_rate
    assert points[2].hit_rate > points[0].hit_rate


@needs_library
def test_shared_slots() -> None:
    """A layer whose tokens all choose the same experts leaves its slots to the other."""
    choices = generate(16, 2, 2, 500).choices.copy()
    choices[0] = [3, 7]
    trace = Trace(16, choices, ("even", "skewed"))
    apart = compare(trace, [6], ["halved"])[0]
    shared = compare(trace, [6], ["halved"], shared=True)[0]
    assert (shared.slots, shared.calls) == (12, 1000)
    assert shared.hit_rate > apart.hit_rate + 0.02


@needs_library
def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_infer.runtime import plugin

    def absent() -> Any:
        raise PluginError(f"there is no library; {plugin.BUILD_HINT}")

    cached = sys.modules["moe_infer.simulate.replay"]._function
    cached.cache_clear()
    monkeypatch.setattr(plugin, "load", absent)
    with pytest.raises(PluginError, match="build it with"):
        replay(np.array([0, 1]), np.array([0]), 1, 1, "lru")
    monkeypatch.setattr(plugin, "load", object)
    with pytest.raises(PluginError, match=r"older than this package .* build it with"):
        replay(np.array([0, 1]), np.array([0]), 1, 1, "lru")
    cached.cache_clear()


# --- Recorded traces


@pytest.mark.parametrize("name", ["t5_top1", "gated_top2"])
def test_a_recorded_trace_is_what_the_model_chooses(name: str, tmp_path: Path) -> None:
    moe_infer.rewrite(ROOT / f"examples/tiny_moe/{name}.onnx", tmp_path)
    rng = np.random.default_rng(0)
    runs = [{"tokens": rng.integers(0, 512, (1, 9))} for _ in range(3)]
    session = moe_infer.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"], expert_use=True
    )
    trace = record(session, runs, "random tokens")
    top_k = 1 if name == "t5_top1" else 2
    assert trace.choices.shape == (4, 3, 9, top_k)
    for i, feeds in enumerate(runs):
        for layer, use in enumerate(count_expert_use(session, feeds)):
            found = np.bincount(trace.choices[layer, i].reshape(-1), minlength=8)
            assert found.tolist() == use.tokens.tolist()
    # Causal: the first tokens choose the same without the rest.
    short = record(session, [{"tokens": runs[0]["tokens"][:, :4]}])
    np.testing.assert_array_equal(short.choices[:, 0], trace.choices[:, 0, :4])
    with pytest.raises(ValueError, match=r"one length, got \[4, 9\]"):
        record(session, [runs[0], {"tokens": runs[0]["tokens"][:, :4]}])


def test_recording_needs_taps(tmp_path: Path) -> None:
    moe_infer.rewrite(ROOT / "examples/tiny_moe/t5_top1.onnx", tmp_path)
    session = moe_infer.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    with pytest.raises(ValueError, match="expert_use=True"):
        record(session, [{"tokens": np.zeros((1, 4), np.int64)}])


@pytest.mark.parametrize(("name", "top_k"), [("t5_top1", 1), ("gated_top2", 2)])
def test_committed_traces(name: str, top_k: int) -> None:
    path = ROOT / f"benchmarks/traces/{name}.npz"
    trace = Trace.load(path)
    assert path.stat().st_size < 150_000
    assert trace.expert_count == 8
    assert trace.choices.shape == (4, 64, 256, top_k)
    assert "King James" in trace.source


# --- The command


@needs_library
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.npz"
    generated = "experts=16,top_k=2,layers=2,tokens=100,locality=0.3,seed=4"
    assert main(["simulate", "--generate", generated, "--save", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = compare(
        generate(16, 2, 2, 100, locality=0.3, seed=4), [2, 4, 8], ["lru", "lfu", "halved", "belady"]
    )
    assert told["points"] == [point.to_dict() for point in expected]
    arguments = ["simulate", str(path), "--slots", "4,50%", "--policy", "lru", "--prefill", "10"]
    assert main([*arguments, "--expert-bytes", "9M", "--other-us", "20"]) == 0
    shown = capsys.readouterr().out
    assert "4 of 16" in shown
    assert "8 of 16" in shown
    assert "ms a token" in shown
    assert "hit rate without prompts" in shown


@needs_library
def test_the_command_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe_infer.rewrite(ROOT / "examples/tiny_moe/gated_top2.onnx", tmp_path)
    ids = np.random.default_rng(1).integers(0, 512, (3, 12))
    np.save(tmp_path / "ids.npy", ids)
    arguments = ["simulate", "--record", str(tmp_path / "model.onnx"), "--slots", "4"]
    arguments += ["--input", f"tokens={tmp_path / 'ids.npy'}"]
    assert main([*arguments, "--save", str(tmp_path / "t.npz")]) == 0
    assert "4 of 8" in capsys.readouterr().out
    expected = record(tmp_path / "model.onnx", [{"tokens": row[None]} for row in ids])
    np.testing.assert_array_equal(Trace.load(tmp_path / "t.npz").choices, expected.choices)


@needs_library
def test_the_commands_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.png"
    generated = "experts=16,top_k=2,layers=1,tokens=50"
    assert main(["simulate", "--generate", generated, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@needs_library
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give one of TRACE.npz, --generate and --record"),
        (["x.npz", "--generate", "experts=8"], "give one of"),
        (
            ["--record", "x.onnx"],
            "same number of sequences in their first dimension, got no --input",
        ),
        (["absent.npz"], "absent.npz"),
        (["--generate", "experts=8"], "lacks top_k, layers, tokens"),
        (["--generate", "experts"], "must be NAME=VALUE"),
        (["--generate", "experts=x"], "experts must be a number, got 'x'"),
        (["--generate", "colour=1"], "got 'colour'"),
        (["GOOD", "--slots", "0"], "slots must be a number from 1"),
        (["GOOD", "--slots", "101%"], "must be numbers or parts such as 25%, got '101%'"),
        (["GOOD", "--policy", "mru"], "policy must be lru, lfu:HALF_LIFE"),
        (["GOOD", "--expert-bytes", "much"], "--expert-bytes must be a number of bytes such as"),
        (["GOOD", "--expert-bytes", "1M", "--bus", "0"], "bus must be a number above 0"),
        (["GOOD", "--batch", "0"], "batch must be at least 1"),
    ],
)
def test_the_commands_errors(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--generate", "experts=8,top_k=1,layers=1,tokens=4"]
    given = list(itertools.chain(*(good if a == "GOOD" else [a] for a in arguments)))
    assert main(["simulate", *given]) == 1
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
