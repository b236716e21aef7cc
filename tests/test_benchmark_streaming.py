"""The benchmark of streaming layers without a GPU: traces, floors, claims, and the whole program
with layers that a reference computes."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from moe_bench.budget import Budget  # noqa: E402
from moe_bench.cases import CASES, Case  # noqa: E402
from moe_bench.check import TOLERANCES, WrongResultError  # noqa: E402
from moe_bench.guesses import best  # noqa: E402
from moe_bench.peers.peer import UnavailableError  # noqa: E402
from moe_bench.streaming import (  # noqa: E402
    ahead,
    chain,
    claims,
    decoder,
    disk,
    example,
    offload,
    predicted,
    report,
    shapes,
    steps,
    traces,
)
from moe_bench.streaming.context import Context  # noqa: E402
from moe_bench.timing import cycles_a_us  # noqa: E402

from moe_infer import op, reference  # noqa: E402
from moe_infer.runtime.native import LayerStats, NextLogits  # noqa: E402
from moe_infer.simulate import COVERAGE  # noqa: E402
from moe_infer.weights import open_expert_weights  # noqa: E402

T5 = Case("t5", 6, 1, 16, 24, "T5_FF", "default", 0)
QWEN = Case("qwen3", 16, 2, 16, 24)
HIT_RATES = predicted.hit_rates
MIXTRAL = Case("mixtral", 8, 2, 32, 24)


# --- A layer without a GPU


class FakeLayer:
    """Computes in float64 what the library would, keeps the least recently used in slots.

    Class attributes:
        wrong: whether layers that stream add something to their results.
        guess: experts that the layer before guessed, most likely first.
        recalls: part of what was needed, of each guess.
    """

    wrong = False
    guess: list[int] | None = None
    recalls: ClassVar[list[float]] = []

    def __init__(
        self, attributes: dict[str, Any], d_model: int, dtype: str, has_logits: bool, logits: str
    ) -> None:
        assert has_logits and logits == dtype
        self._config = op.LayerConfig.from_attributes(attributes)
        weights = open_expert_weights(self._config, d_model)
        self._experts = {e: weights.expert(e) for e in range(self._config.expert_count)}
        self._bytes = sum(t.nbytes for t in self._experts[0].values())
        self._d_model, self._type = d_model, getattr(torch, dtype)
        self._slots = [-1] * self._config.max_concurrency
        self._last_use: dict[int, int] = {}
        self._clock = 0
        self._counts = dict.fromkeys(LayerStats.__dataclass_fields__, 0)
        self.streams = self._config.max_concurrency < self._config.expert_count
        self.open = True

    def workspace(self, tokens: int) -> int:
        return 16 * tokens

    def run(
        self,
        x: int,
        logits: int,
        output: int,
        tokens: int,
        workspace: int,
        size: int,
        stream: int,
        next_logits: NextLogits | None = None,
    ) -> None:
        assert self.open and size >= self.workspace(tokens)
        given = self._at(x, tokens, self._d_model).double().numpy()
        scores = self._at(logits, tokens, self._config.expert_count).double().numpy()
        value = reference.moe_layer(given, self._config, self._experts, scores)
        if self.streams:
            self._fetch(reference.route(given, self._config, scores)[0])
            if next_logits is not None:
                assert getattr(torch, next_logits.dtype) == self._type
                told = self._at(next_logits.ptr, tokens, next_logits.expert_count).float().numpy()
                FakeLayer.guess = best(told[0], self._config.top_k).tolist()
            value = value + self.wrong
        self._at(output, tokens, self._d_model).copy_(torch.from_numpy(value))

    def _fetch(self, chosen: np.ndarray) -> None:
        """The library's rule for the least recently used: ops/core/policy.h."""
        self._clock += 1
        needed = np.unique(chosen).tolist()
        self._end_guess(needed)
        missed = [e for e in needed if e not in self._slots]
        for e in needed:
            self._last_use[e] = self._clock
        filled: list[int] = []
        in_flight = 2 if len(self._slots) > 2 else len(self._slots) - 1
        for e in missed:
            free = [i for i in range(len(self._slots)) if i not in filled[-in_flight:]]
            slot = min(free, key=lambda i: (*self._worth(self._slots[i], needed), i))
            self._slots[slot] = e
            filled.append(slot)
        self._counts["hits"] += len(needed) - len(missed)
        self._counts["misses"] += len(missed)
        self._counts["bytes_fetched"] += len(missed) * self._bytes

    def _end_guess(self, needed: list[int]) -> None:
        """As if all of the first guessed expert that is in no slot had come."""
        guess, FakeLayer.guess = FakeLayer.guess, None
        if guess is None:
            return
        FakeLayer.recalls.append(len({*guess} & {*needed}) / len(needed))
        for expert in [e for e in guess if e not in self._slots][:1]:
            how = "used" if expert in needed else "wasted"
            self._counts[f"prefetches_{how}"] += 1
            self._counts[f"prefetch_bytes_{how}"] += self._bytes
            self._counts["bytes_fetched"] += self._bytes * (how == "wasted")  # else it is a miss's

    def _worth(self, expert: int, needed: list[int]) -> tuple[int, int]:
        if expert < 0:
            return 0, 0
        return 2 if expert in needed else 1, self._last_use[expert]

    def _at(self, address: int, rows: int, columns: int) -> torch.Tensor:
        count = rows * columns
        data = (ctypes.c_uint8 * (count * self._type.itemsize)).from_address(address)
        return torch.frombuffer(data, dtype=self._type).view(rows, columns)

    def stats(self) -> LayerStats:
        return LayerStats(**self._counts)

    def close(self) -> None:
        self.open = False


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


def fake_capture(run: Callable[[], Any]) -> Any:
    """A graph, unless a layer streams, as the host drives the fetches."""
    bound = run.__self__  # type: ignore[attr-defined]
    if any(layer.streams for layer in bound._chain.layers):
        raise ValueError("a CUDA graph cannot capture a layer that streams its experts")
    run()
    return SimpleNamespace(replay=run)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "Layer", FakeLayer)
    monkeypatch.setattr(chain, "capture", fake_capture)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(1e-9 * cycles))
    monkeypatch.setattr(FakeLayer, "wrong", False)
    monkeypatch.setattr(FakeLayer, "guess", None)
    monkeypatch.setattr(FakeLayer, "recalls", [])
    monkeypatch.setattr(predicted, "hit_rates", lambda *_: {})  # the library's
    for module, name, value in (
        (example, "EXAMPLE", T5),
        (example, "EXAMPLE_SLOTS", (2, 4)),
        (example, "EXAMPLE_TOKENS", (40, 50)),
        (example, "EXAMPLE_SKEWED_TOKENS", 3),
        (example, "COLD_SAMPLES", 1),
        (example, "WARM_RUNS", 4),
        (decoder, "DECODER", QWEN),
        (decoder, "DECODER_LAYERS", 3),
        (decoder, "DECODER_FILES", 2),
        (decoder, "DECODER_TOKENS", (1, 5)),
        (decoder, "STEPS", {1: (6, 8), 5: (1, 3)}),
        (ahead, "DECODER", QWEN),
        (ahead, "DECODER_LAYERS", 3),
        (offload, "MIXTRAL", MIXTRAL),
        (offload, "MIXTRAL_LAYERS", 2),
        (disk, "DECODER", QWEN),
        (disk, "DISK_SLOTS", 4),
    ):
        monkeypatch.setattr(module, name, value)


def context_in(folder: Path, *modes: str) -> Context:
    return Context(Budget(100, 50), str(folder), str(folder), modes or ("host",), 1e9, "cpu")


# --- The parts


def test_the_example(without_gpu: None, tmp_path: Path) -> None:
    found = list(example.points(context_in(tmp_path, "host", "device"), "float32", "A32"))
    assert len(found) == example.planned(2) == 3 * 2 * 2 * 2
    for point in found:
        if point["mode"] == "device":
            assert "no CUDA graph: a CUDA graph cannot capture" in point["failed"]
            continue
        assert point["ms"] > 0 and point["floor_ms"] > 0, point
        moved = point["bytes_a_run"] / point["all_miss_bytes"]
        if point["state"] == "cold" and point["routing"] == "uniform":
            assert moved == pytest.approx(1, rel=0.05)  # the norms are not in the estimate
        elif point["routing"] == "uniform":  # all six in every call; those in slots come first
            assert moved == pytest.approx(1 - point["slots"] / 6, rel=0.05)
    assert not list(tmp_path.iterdir())


def test_the_decoder(without_gpu: None, tmp_path: Path) -> None:
    found = list(decoder.points(context_in(tmp_path)))
    assert len(found) == decoder.planned(1) == 9
    assert all("failed" not in point for point in found)
    by_about = {(p["tokens"], p["percent"], p["routing"]): p for p in found}
    whole = by_about[1, 100, "skewed"]
    assert (whole["slots"], whole["bytes_a_run"], whole["hit_rate"]) == (16, 0, None)
    assert "replay_hit_rate" not in whole
    assert whole["bound"] == "compute" and whole["floor_ms"] == whole["resident_ms"]
    hits = by_about[1, 25, "all hits"]
    assert hits["hit_rate"] == 1 and hits["bytes_a_run"] == 0
    skewed = [by_about[1, percent, "skewed"]["hit_rate"] for percent in (10, 25, 50)]
    assert skewed == sorted(skewed) and 0 < skewed[0] < skewed[-1] < 1
    quarter = by_about[1, 25, "skewed"]
    missed = quarter["bytes_a_run"] / quarter["all_miss_bytes"]
    assert missed == pytest.approx(1 - quarter["hit_rate"], rel=1e-6)
    assert by_about[5, 25, "skewed"]["ms_a_token"] == by_about[5, 25, "skewed"]["ms"] / 5
    assert not list(tmp_path.iterdir())


@pytest.mark.needs_library
def test_hit_rates_are_those_of_the_librarys_replay(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The layers here keep what was used last, so does the replay with that policy."""
    monkeypatch.setattr(predicted, "hit_rates", HIT_RATES)
    monkeypatch.setenv("MOE_INFER_POLICY", "lru")
    found = [p for p in decoder.points(context_in(tmp_path)) if p["percent"] != 100]
    assert len(found) == 7
    for point in found:
        assert point["hit_rate"] == pytest.approx(point["replay_hit_rate"], abs=1e-12), point
        assert point["belady_hit_rate"] >= point["hit_rate"] and point["policy"] == "lru"
    assert any(point["belady_hit_rate"] > point["hit_rate"] for point in found)


def test_guesses_of_the_stated_recall_reach_the_layer_that_they_are_for(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decoder, "STEPS", {1: (20, 100)})
    monkeypatch.setattr(ahead, "AHEAD_BUDGETS", (25,))
    monkeypatch.setattr(ahead, "AHEAD_PAUSES_US", (0,))
    found = {}
    for point in ahead.points(context_in(tmp_path)):
        found[point["recall"]] = point
        if point["recall"] is None:
            assert not FakeLayer.recalls
            continue
        assert len(FakeLayer.recalls) == 120 * 2  # steps, layers but the first
        assert np.mean(FakeLayer.recalls) == pytest.approx(point["recall"], abs=0.04)
        FakeLayer.recalls.clear()
    without, *others = found.values()
    assert (without["prefetches_used"], without["prefetches_wasted"]) == (0, 0)
    assert without["gain"] is None and without["bytes_fetched"] == without["bytes_a_run"]
    for point in others:
        assert point["gain"] == without["ms"] / point["ms"]
        assert point["samples"] == 100
        assert point["prefetches_wasted"] > 0
        for name in ("hit_rate", "bytes_a_run", "floor_ms"):  # of the same trace, what is needed
            assert point[name] == pytest.approx(without[name]), name
        wasted = point["bytes_fetched"] - point["bytes_a_run"]
        assert wasted == pytest.approx(point["prefetch_bytes_wasted"])
    used = [found[recall]["prefetches_used"] for recall in (0.6, 0.75, 0.9)]
    assert used == sorted(used) and 0 < used[0] < used[2]


def test_pauses_between_the_layers(without_gpu: None, tmp_path: Path) -> None:
    found = list(ahead.points(context_in(tmp_path, "device")))
    assert len(found) == ahead.planned(1) == 24
    assert all(point["mode"] == "host" and "failed" not in point for point in found)
    for point in found:
        pause_ms = 1e-3 * 3 * point["pause_us"]
        assert point["ms"] > pause_ms and point["resident_ms"] > pause_ms
        assert point["bus_ms"] == pytest.approx(1e3 * point["bytes_a_run"] / 1e9)
        assert (point["pause_cycles"] > 0) == (point["pause_us"] > 0)
    assert [p["recall"] for p in found[:4]] == [None, 0.75, 0.9, 0.6]
    assert not list(tmp_path.iterdir())


def test_cycles_are_measured(without_gpu: None) -> None:
    assert 500 < cycles_a_us() <= 1000  # a cycle of the sleep here takes a nanosecond


def test_four_layers_and_one_token(without_gpu: None, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = {(p["mode"], p["state"]): p for p in offload.points(context_in(tmp_path))}
    assert len(found) == offload.planned(1)
    cold, warm = found["host", "cold"], found["host", "warm"]
    assert cold["hit_rate"] == 0 and cold["bytes_a_run"] == cold["all_miss_bytes"]
    assert warm["hit_rate"] == 1 and warm["bytes_a_run"] == 0
    resident = found["transformers", "peer"]
    assert resident["ms"] > 0 and "MoE blocks alone" in resident["note"], resident
    try:
        import accelerate  # noqa: F401
    except ImportError:
        assert found["accelerate", "peer"]["failed"].startswith("accelerate: ")
    else:
        assert found["accelerate", "peer"]["ms"] > 0, found["accelerate", "peer"]


def test_from_the_disk(without_gpu: None, tmp_path: Path) -> None:
    found = list(disk.points(context_in(tmp_path)))
    states = [(mode, state) for mode in ("host", "load") for state in ("page cache", "disk")]
    assert [(point["mode"], point["state"]) for point in found] == states
    assert len(found) == disk.planned(1)
    for point in found:
        assert point["read_bytes_a_second"] > 0, point
        if point["mode"] == "load":
            assert point["bytes_a_run"] == point["all_miss_bytes"] > 0
        else:
            assert point["hit_rate"] == 0, point
        assert point["floor_ms"] == pytest.approx(
            1e3 * point["bytes_a_run"] / min(1e9, point["read_bytes_a_second"])
        )
    assert "MOE_INFER_PINNED_BYTES" not in __import__("os").environ


@pytest.mark.parametrize("part", [decoder.points, ahead.points, offload.points, disk.points])
def test_a_result_that_is_not_the_residents_has_no_time(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: Any
) -> None:
    monkeypatch.setattr(FakeLayer, "wrong", 1.0)
    monkeypatch.setattr(offload, "PEERS", ())
    found = [
        p for p in part(context_in(tmp_path)) if p["mode"] != "load" and p.get("percent") != 100
    ]
    assert found
    for point in found:
        assert point["wrong"] and "ms" not in point
        assert "are not those of the layer whose experts all stay" in point["failed"]


def test_loaded_layers_that_give_other_results_have_no_time(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = disk.Load.measure

    def expect_others(load: disk.Load, *given: Any) -> dict[str, Any]:
        load.expected.outputs.add_(1)
        return measure(load, *given)

    monkeypatch.setattr(disk.Load, "measure", expect_others)
    (*_, cached, cold) = disk.points(context_in(tmp_path))
    for point in (cached, cold):
        assert point["mode"] == "load" and point["wrong"] and "ms" not in point


def test_a_decoder_in_a_graph_counts_the_step_before_it_too(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run outside of the graph is the trace's first step, and not one more."""

    def capture(run: Callable[[], Any]) -> Any:
        run()
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(chain, "capture", capture)
    points = decoder.points(context_in(tmp_path, "host", "device"))
    first, second = next(points), next(points)
    points.close()
    assert (first["mode"], second["mode"]) == ("host", "device")
    assert first["hit_rate"] == second["hit_rate"]
    assert first["samples"] == second["samples"] == 8


def test_a_mode_that_cannot_be_captured_is_not_available(without_gpu: None, tmp_path: Path) -> None:
    (first, *_) = disk.points(context_in(tmp_path, "device"))
    assert first["failed"].startswith("no CUDA graph: ") and "wrong" not in first


def test_the_environment_is_set_while_layers_are_made(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    seen = []

    def make(*_: Any) -> Any:
        seen.append(os.environ.get("MOE_INFER_FETCH"))
        if len(seen) == 3:
            raise ValueError("no more")
        layer = SimpleNamespace(closed=False)
        layer.close = lambda: made.append(layer)
        return layer

    made: list[Any] = []
    monkeypatch.setattr(chain, "Layer", make)
    with pytest.raises(ValueError, match="no more"):
        chain.Chain(QWEN, "bfloat16", [tmp_path / "x"], 5, 2, "device")
    assert seen == ["device"] * 3 and len(made) == 2  # what was made is freed
    assert "MOE_INFER_FETCH" not in os.environ


# --- The program


@pytest.fixture
def program(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("streaming", ROOT / "benchmarks/streaming.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "bus_speed", lambda: 2e9)
    monkeypatch.setattr(module, "describe", lambda: {"card": "none"})
    monkeypatch.setattr(module, "gpu_state", dict)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(module, "Context", lambda *a: Context(*a, device="cpu"))
    monkeypatch.setenv("MOE_INFER_PINNED_BYTES", "1G")
    return module


def run_program(program: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> int:
    given = ["--dir", str(folder), "--disk", str(folder), "--out", str(folder), *more]
    monkeypatch.setattr(sys, "argv", ["streaming.py", *given])
    return int(program.main())


def test_everything(
    program: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_program(program, monkeypatch, tmp_path, "--modes", "host") == 0
    data = json.loads((tmp_path / "streaming.json").read_text())
    assert {point["part"] for point in data["points"]} == set(shapes.PARTS)
    assert sum(point["part"] == "F" for point in data["points"]) == ahead.planned(1)
    assert [entry["part"] for entry in data["runs"][0]["bus"]] == list(shapes.PARTS)
    assert data["runs"][0]["settings"]["MOE_INFER_PINNED_BYTES"] == "1G"
    shown = capsys.readouterr().out
    for title in report.TITLES.values():
        assert title in shown
    assert "not reached" not in shown
    held = {line["claim"]: line["held"] for line in data["summary"]}
    assert held["budget of 100 %: bytes that move after warm-up"] is True
    again = "--append", "--parts", "D", "--modes", "host"
    assert run_program(program, monkeypatch, tmp_path, *again) == 0
    after = json.loads((tmp_path / "streaming.json").read_text())
    assert len(after["points"]) == len(data["points"]) and len(after["runs"]) == 2
    assert {p["run"] for p in after["points"] if p["part"] == "D"} == {1}


def test_without_time_what_was_not_reached_is_told(
    program: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_program(program, monkeypatch, tmp_path, "--minutes", "0", "--parts", "B", "C") == 0
    planned = decoder.planned(2) + offload.planned(2)
    assert f"{planned} planned points were not reached" in capsys.readouterr().out


def test_a_wrong_result_that_ends_a_part_says_of_which_calls(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(TOLERANCES, "float32", (0.0, 0.0))
    given = "--parts", "A32", "--modes", "host"
    assert run_program(program, monkeypatch, tmp_path, *given) == 1
    data = json.loads((tmp_path / "streaming.json").read_text())
    (failure,) = data["runs"][0]["failures"]
    assert failure["reason"].startswith("40 tokens, uniform: wrong result: largest difference")
    assert not data["points"]


def test_a_part_that_fails_costs_only_itself(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(_: Context) -> Any:
        raise OSError("no room")
        yield

    monkeypatch.setitem(program.MAKERS, "C", fails)
    chosen = "--parts", "C", "D", "--modes", "host"
    assert run_program(program, monkeypatch, tmp_path, *chosen) == 1
    data = json.loads((tmp_path / "streaming.json").read_text())
    assert data["runs"][0]["failures"] == [{"part": "C", "reason": "OSError: no room"}]
    assert len(data["points"]) == disk.planned(1)


def test_options(program: Any) -> None:
    assert program.parse([]).parts == list(shapes.PARTS)
    assert program.parse(["--parts", "B", "C"]).parts == ["C", "B"]  # in order of importance
    with pytest.raises(SystemExit):
        program.parse(["--modes", "gpu"])
    assert program.parse([]).modes == ["host", "device"]
    assert set(program.MAKERS) == set(program.PLANNED) == set(program.SHARES) == set(shapes.PARTS)


# --- Traces


def test_shares_are_as_steep_as_is_said() -> None:
    for case in (CASES["qwen3"], replace(CASES["qwen3"], experts=256, top_k=1)):
        chosen = traces.skewed(case, 2, 400, 8, 0.5, 1, "cpu")
        assert chosen.shape == (400, 2, 8, case.top_k)
        found = traces.coverage(chosen, case.experts)
        for part, wanted in zip(("0.25", "0.5", "0.75"), COVERAGE, strict=True):
            assert found[part] == pytest.approx(wanted, abs=0.03), (case, found)


def test_the_scores_are_those_that_the_choices_come_from() -> None:
    case = CASES["qwen3"]
    chosen = traces.skewed(case, 3, 20, 1, 0.5, 7, "cpu")
    highest = best(traces.scores(case, 3, 20, 0.5, 7), case.top_k).transpose(2, 0, 1, 3)
    assert np.array_equal(np.sort(highest), np.sort(chosen.numpy()))


def test_locality_keeps_experts_and_leaves_the_shares() -> None:
    case = CASES["qwen3"]
    kept, covered = [], []
    for locality in (0.0, 0.5, 0.95):
        chosen = traces.skewed(case, 4, 300, 1, locality, 2, "cpu")
        used = traces.needed(chosen, case.experts)
        kept.append(float((used[1:] & used[:-1]).sum() / used[1:].sum()))
        covered.append(traces.coverage(chosen, case.experts)["0.25"])
    assert kept[0] < kept[1] < kept[2] and kept[2] > 0.7
    assert abs(covered[0] - covered[1]) < 0.05  # at 0.95 too little is drawn anew to count


def test_layers_have_hot_experts_of_their_own_and_a_seed_says_which() -> None:
    case = CASES["qwen3"]
    a, b = (traces.skewed(case, 2, 50, 4, 0.5, seed, "cpu") for seed in (3, 3))
    assert torch.equal(a, b)
    assert not torch.equal(a, traces.skewed(case, 2, 50, 4, 0.5, 4, "cpu"))
    counts = [torch.bincount(a[:, i].flatten(), minlength=128) for i in range(2)]
    hottest = [set(c.topk(16).indices.tolist()) for c in counts]
    assert len(hottest[0] & hottest[1]) < 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_leave_no_other_choice(dtype: str) -> None:
    case = CASES["qwen3"]
    chosen = traces.skewed(case, 3, 4, 5, 0.5, 5, "cpu")
    logits = traces.logits_of(chosen, case, dtype)
    assert logits.shape == (4, 3, 5, 128)
    top = logits.float().topk(case.top_k + 1, dim=-1)
    assert torch.equal(top.indices[..., :-1], chosen)
    assert (top.values.diff(dim=-1) < 0).all()


def test_changing_steps_never_meet_the_experts_of_the_one_before() -> None:
    chosen = traces.changing(CASES["qwen3"], 3, 40, 6, "cpu")
    used = traces.needed(chosen, 128)
    assert (used.sum(-1) == 8).all()
    assert not (used[1:] & used[:-1]).any()
    assert used[:16].any(0).all()  # all in turn
    few = traces.needed(traces.few(CASES["qwen3"], 3, 40, 32, 7, "cpu"), 128)
    assert (few.sum(-1) == 8).all() and not few[..., 32:].any() and few[..., :32].any(0).all()


def test_tokens_go_where_they_should() -> None:
    made = offload.make_tokens("cpu")
    assert made.x.shape == (24, 1, 4096) and made.logits.shape == (24, 4, 1, 8)
    assert 0.9 < made.x.float().std() < 1.1
    chosen = (made.x.double() @ made.gate.double().T).topk(2, dim=-1).indices
    assert torch.equal(chosen, made.chosen)


# --- Times and floors


def test_floor_is_the_longer_of_bus_and_resident() -> None:
    by_bus = steps.against_floor(2.0, 1e6, 1e9, 0.5)
    assert (by_bus["floor_ms"], by_bus["bound"]) == (pytest.approx(1.0), "bus")
    assert by_bus["over_floor"] == pytest.approx(2) and by_bus["bus_share"] == pytest.approx(0.5)
    assert by_bus["gb_a_second"] == pytest.approx(0.5)
    by_compute = steps.against_floor(2.0, 1e6, 1e9, 1.5)
    assert (by_compute["floor_ms"], by_compute["bound"]) == (1.5, "compute")
    assert steps.against_floor(2.0, 0, 1e9, None)["over_floor"] is None


def test_runs_that_differ_are_told_by_their_mean() -> None:
    assert steps.times([1.0, 1.0, 4.0], alike=True)["ms"] == 1.0
    told = steps.times([1.0, 1.0, 4.0], alike=False)
    assert (told["ms"], told["median_ms"], told["ms_is"]) == (2.0, 1.0, "mean")


def test_steps_end_with_the_time_but_not_too_early(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    assert len(steps.time_steps(done.append, 30, 100, 2)) == 30
    assert done == list(range(30))
    assert len(steps.time_steps(lambda _: time.sleep(0.01), 30, 0.0, 3)) == 3


def test_bits_are_compared() -> None:
    def bound(values: list[float]) -> Any:
        made = object.__new__(chain.Bound)
        made.outputs = torch.tensor([values])
        return made

    bound([1.0, 2.0]).must_equal(bound([1.0, 2.0]))
    with pytest.raises(WrongResultError, match="layer 0: 1 of 2 values"):
        bound([1.0, 2.0]).must_equal(bound([1.0, 2.0000002]))
    with pytest.raises(WrongResultError, match="NaN or infinite"):
        bound([1.0, float("nan")]).must_equal(bound([1.0, float("nan")]))


# --- Claims


def point(part: str, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "part": part, "mode": "host", "state": "cold", "routing": "uniform", "tokens": 512,
        "slots": 4, "ms": 100.0, "bound": "bus", "bus_share": 0.96, "bytes_a_run": 10.0,
        "all_miss_bytes": 40.0, "over_floor": 1.05, "hit_rate": 0.7, "run": 0,
    }  # fmt: skip
    return {**values, **more}


def held(points: list[dict[str, Any]], claim: str) -> bool | None:
    (line,) = [line for line in claims.summarise(points) if line["claim"] == claim]
    found: bool | None = line["held"]
    return found


def test_nothing_is_claimed_without_points() -> None:
    assert {line["held"] for line in claims.summarise([])} == {None}


def test_claim_about_the_bus() -> None:
    claim = "host: part of the bus's speed where the bus is the bound"
    points = [point(part, percent=50) for part in "ABC"]
    assert held(points, claim) is True
    assert held(points[:2], claim) is None
    assert held([*points, point("A", bus_share=0.94)], claim) is False
    assert held([*points, point("A", bus_share=0.1, bound="compute")], claim) is True
    assert held([*points, point("D", bus_share=0.1)], claim) is True


def test_claims_with_limits() -> None:
    for claim, made, good, bad in (
        ("host: A, bfloat16, 4 slots, 512 tokens, cold, ms", point("A"), 149.0, 150.0),
        ("host: C, cold, ms", point("C"), 59.0, 60.0),
        (
            "host: A, float32, 4 slots, 40960 tokens, cold, over InfMoE on an H200",
            point("A32", tokens=40960),
            385.0,
            386.0,
        ),
    ):
        assert held([{**made, "ms": good}], claim) is True, claim
        assert held([{**made, "ms": bad}], claim) is False, claim
    claim = "host: A, bfloat16, 16 slots, repeated calls, bytes over all-miss bytes"
    warm = point("A", slots=16, state="warm")
    assert held([warm], claim) is True
    assert held([{**warm, "bytes_a_run": 14.0}], claim) is False


def test_accelerate_counts_only_from_the_same_run() -> None:
    claim = "host: C, cold, accelerate's time over ours, same run"
    ours = point("C", ms=50.0)
    theirs = point("C", ms=1500.0, state="peer", mode="accelerate")
    assert held([ours, theirs], claim) is True
    assert held([ours, {**theirs, "ms": 1000.0}], claim) is False
    assert held([ours, {**theirs, "run": 1}], claim) is None


def test_claims_about_the_decoder() -> None:
    main = point("B", tokens=1, percent=25, routing="skewed", state="warm")
    floor, belady = (
        f"host: B, 25 %, batch 1, {what}" for what in ("time over floor", "hit rate below Belady's")
    )
    assert held([main], floor) is True and held([main], belady) is None
    assert held([{**main, "over_floor": 1.2}], floor) is False
    assert held([{**main, "belady_hit_rate": 0.74}], belady) is True
    assert held([{**main, "belady_hit_rate": 0.76}], belady) is False
    replayed = "host: B, hit rates that are not the replay's"
    assert held([{**main, "replay_hit_rate": 0.7}], replayed) is True
    assert held([{**main, "replay_hit_rate": 0.701}], replayed) is False
    hits = {**main, "routing": "all hits", "over_resident": 1.02, "bytes_a_run": 0}
    assert held([hits], "host: all hits, over resident") is True
    assert held([{**hits, "bytes_a_run": 1}], "host: all hits, over resident") is False
    assert held([{**hits, "over_resident": 1.04}], "host: all hits, over resident") is False


def test_claim_about_guesses() -> None:
    claim = "host: F, hit rates that are not the replay's"
    made = point("F", recall=0.75, pause_us=50, replay_hit_rate=0.7)
    assert held([made], claim) is True
    assert held([made, {**made, "hit_rate": 0.71}], claim) is False
    assert (
        held([{**made, "hit_rate": 0.71}], "host: B, hit rates that are not the replay's") is None
    )


def test_guesses_have_a_table_of_their_own() -> None:
    counts = {"used": 9.0, "wasted": 2.5}
    more = {f"prefetch{what}_{how}": n for how, n in counts.items() for what in ("es", "_bytes")}
    made = [
        point("F", recall=recall, pause_us=50, gain=recall and 1.05, **more)
        for recall in (None, 0.75)
    ]
    made.append({**made[1], "recall": 0.9, "failed": "no room"})
    del made[2]["ms"]
    head, _, *rows = report.table(made).splitlines()
    assert head.startswith("| slots | pause, us | recall | ms |") and " gain " in head
    assert rows[0].startswith("| 4 | 50 | no guesses | 100 |")
    assert rows[1].startswith("| 4 | 50 | 75 % | 100 |") and " 1.05 " in rows[1]
    assert " 70.0 % | 9.00 | 2.50 | " in rows[1]
    assert rows[2].startswith("| 4 | 50 | 90 % |  | – |")
    (note,) = report.notes(made)
    assert note == "  host 512/4 cold, 50 us, 90 % guesses: not available: no room"


def test_failed_points_are_in_the_table_and_its_notes() -> None:
    made = [point("A"), {"failed": "no CUDA graph", **point("A", mode="device")}]
    del made[1]["ms"]
    shown = report.table(made)
    assert "| 512 | 4 | uniform | cold | device |  | – |" in shown
    assert report.notes(made) == ["  device 512/4 cold: not available: no CUDA graph"]


def test_unavailable_is_no_wrong_result(tmp_path: Path) -> None:
    def work(_: float) -> dict[str, Any]:
        raise UnavailableError("no")

    assert context_in(tmp_path).measure({"a": 1}, work) == {"a": 1, "failed": "no"}


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from moe_bench.streaming.plot import draw

    draw({"points": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    guessed = point("F", recall=None, pause_us=50)
    draw(
        {"points": [point("A", floor_ms=90.0), point("C", slots=None), guessed]},
        tmp_path / "some.png",
    )
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
