"""The benchmark of resident layers on the CPU: inputs, its float64 reference, its peers, timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from moe_bench import check, machine, timing  # noqa: E402
from moe_bench.cases import TOKENS, Case, model_layers  # noqa: E402
from moe_bench.floor import Rates  # noqa: E402
from moe_bench.inputs import InputSet, make_inputs, mean_active, set_count  # noqa: E402
from moe_bench.peers.missing import NAMES, MissingPeer, load_peer  # noqa: E402
from moe_bench.peers.ort_models import microsoft_moe_model, moe_layer_model  # noqa: E402
from moe_bench.peers.ort_session import BoundSession  # noqa: E402
from moe_bench.peers.peer import Entry, Peer, Problem, UnavailableError, rotate  # noqa: E402
from moe_bench.peers.torch_grouped import COMBINES, TorchLayer  # noqa: E402
from moe_bench.point import Contest  # noqa: E402
from moe_bench.record import Record  # noqa: E402
from moe_bench.weights import Experts, folder_with_room, make_experts  # noqa: E402

import moe_infer  # noqa: E402
from moe_infer import op, reference  # noqa: E402
from moe_infer.weights import open_expert_weights  # noqa: E402

SMALL = Case("small", 6, 2, 32, 48)
SMALL_T5 = Case("small_t5", 5, 1, 32, 48, "T5_FF", "default", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "case", [SMALL, replace(SMALL, normalize=0), SMALL_T5], ids=["normalized", "plain", "t5"]
)
def test_reference_is_the_projects_reference_on_the_written_file(
    tmp_path: Path, case: Case, dtype: str
) -> None:
    path = tmp_path / "experts.safetensors"
    experts = make_experts(case, dtype, path, device="cpu")
    (given,) = make_inputs(case, dtype, 20, "zipf", 1, device="cpu")
    config = op.LayerConfig.from_attributes(case.attributes(path))
    weights = open_expert_weights(config, case.d_model)
    oracle = reference.moe_layer(
        given.hidden_states.double().numpy(),
        config,
        {e: weights.expert(e) for e in range(case.experts)},
        given.logits.double().numpy(),
    )
    expected = check.expect(case, experts, given)
    assert sorted(expected.tokens.tolist()) == list(range(20))  # few tokens: all of them
    np.testing.assert_allclose(expected.values, oracle[expected.tokens], rtol=1e-9, atol=1e-9)
    assert 0.2 < expected.values.std() < 3


def test_a_weight_file_goes_where_there_is_room(tmp_path: Path) -> None:
    assert folder_with_room(str(tmp_path), 1) == str(tmp_path)
    with pytest.raises(OSError, match=r"needs 1000000000\.0 GB: .* has"):
        folder_with_room(str(tmp_path), 10**18)


def small(tmp_path: Path, tokens: int = 100) -> tuple[Experts, check.Expected]:
    experts = make_experts(SMALL, "bfloat16", tmp_path / "e.safetensors", device="cpu")
    (given,) = make_inputs(SMALL, "bfloat16", tokens, "uniform", 1, device="cpu")
    return experts, check.expect(SMALL, experts, given)


def test_a_sample_of_many_tokens_is_checked_and_differs_by_seed(tmp_path: Path) -> None:
    _, expected = small(tmp_path)
    assert len(expected.tokens.unique()) == check.CHECKED_TOKENS == 32
    assert expected.values.shape == (32, SMALL.d_model)


def output_of(expected: check.Expected, tokens: int = 100) -> torch.Tensor:
    output = torch.zeros((tokens, SMALL.d_model), dtype=torch.bfloat16)
    output[expected.tokens] = expected.values.bfloat16()
    return output


def test_right_results_pass(tmp_path: Path) -> None:
    _, expected = small(tmp_path)
    error = check.compare(output_of(expected), expected, "bfloat16")
    assert error.within and error.norm < 4e-3
    assert check.judge(error, "bfloat16", peer=False) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_never_passes_even_outside_the_sample(tmp_path: Path, value: float) -> None:
    _, expected = small(tmp_path)
    output = output_of(expected)
    rest = sorted(set(range(100)) - set(expected.tokens.tolist()))
    output[rest[0], 3] = value
    with pytest.raises(check.WrongResultError, match="1 of 3200 values are NaN or infinite"):
        check.compare(output, expected, "bfloat16")


def test_one_wrong_element_is_wrong_for_us_and_for_peers(tmp_path: Path) -> None:
    _, expected = small(tmp_path)
    output = output_of(expected)
    output[expected.tokens[5], 7] += 1
    error = check.compare(output, expected, "bfloat16")
    assert error.largest == pytest.approx(1, abs=0.02)
    for peer in (False, True):
        with pytest.raises(check.WrongResultError, match="largest difference") as raised:
            check.judge(error, "bfloat16", peer)
        place = f"the worst is token {int(expected.tokens[5])}, column 7: "
        assert f"; 1 of 1024 values are not within the tolerance, {place}" in str(raised.value)


def test_a_peer_that_rounds_more_is_noted_and_ours_is_wrong() -> None:
    error = check.Error(largest=0.03, norm=0.01, beyond="one")
    assert "0.03" in check.judge(error, "bfloat16", peer=True)
    with pytest.raises(check.WrongResultError):
        check.judge(error, "bfloat16", peer=False)


def test_sets_rotate_over_experts() -> None:
    sets = make_inputs(SMALL, "float16", 3, "uniform", 4, device="cpu")
    assert len(sets) == 4 and not torch.equal(sets[0].hidden_states, sets[1].hidden_states)
    assert all(1 < s.active <= 6 for s in sets)
    assert mean_active(sets) == sum(len(s.chosen.unique()) for s in sets) / 4
    assert [set_count(tokens) for tokens in TOKENS] == [16, 8, 8, 4, 3]
    assert set_count(100_000) >= 2


TRITON = """
import torch
from torch.nn import functional as F
from moe_bench.peers.gated_kernel import gated_kernel
from moe_bench.read_kernel import BLOCK, STEPS, read_kernel

source = torch.randint(-(2**31), 2**31 - 1, (3 * BLOCK * STEPS,), dtype=torch.int32)
sums = torch.zeros(3, dtype=torch.int32)
read_kernel[(3,)](source, sums, BLOCK, STEPS)
assert (int(sums.long().sum()) - int(source.long().sum())) % 2**32 == 0, "not all was read"

inner = torch.randn(3, 2 * 100)
gate, up = inner.chunk(2, dim=-1)
for gelu, right in ((False, F.silu(gate) * up), (True, F.gelu(gate, approximate="tanh") * up)):
    output = torch.full((3, 100), float("nan"))
    gated_kernel[(3, 2)](inner, output, 100, gelu, 64)
    torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-6)
"""


def test_triton_kernels_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    # Triton reads the variable when it is imported, hence another process.
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, **variables}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


# --- Timing


def test_spread() -> None:
    found = timing.spread([float(i) for i in range(11)])
    assert found == timing.Spread(median=5, p10=1, p90=9, samples=11)
    assert timing.spread([2.0]) == timing.Spread(2, 2, 2, 1)
    with pytest.raises(ValueError, match="no samples"):
        timing.spread([])


@pytest.mark.parametrize(
    ("run_ms", "sample_ms", "budget_ms", "count"),
    [
        (0.03, 0.5, 1e4, 50),
        (8.8, 26.4, 1e4, 50),
        (40.0, 40.0, 1e6, 25),  # long: fewer
        (1.0, 10.0, 200.0, 20),  # little time
        (1000.0, 1000.0, 1.0, 5),  # never none
    ],
)
def test_sample_count(run_ms: float, sample_ms: float, budget_ms: float, count: int) -> None:
    assert timing.sample_count(run_ms, sample_ms, budget_ms) == count


class FakeContender(timing.Contender):
    """Counts its samples."""

    fails_at = 10**9

    def sample(self) -> float:
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken > self.fails_at:
            raise RuntimeError("launch failed")
        log.append(id(self))
        return 1.0


log: list[int] = []


def test_contenders_take_turns_and_a_failing_one_costs_only_itself() -> None:
    log.clear()
    good, other, bad = (FakeContender(lambda: None) for _ in range(3))
    bad.fails_at = 7
    results = timing.measure({"good": good, "bad": bad, "other": other})
    assert list(results) == ["good", "bad", "other"]
    assert results["good"] == results["other"] == timing.Spread(1, 1, 1, 50)
    assert isinstance(results["bad"], RuntimeError)
    turns = sum(a != b for a, b in pairwise(log))
    assert turns >= 2 * timing.ROUNDS


# --- Peers


def problem_of(case: Case, dtype: str, folder: Path) -> Problem:
    experts = make_experts(case, dtype, folder / f"{case.name}.safetensors", device="cpu")
    return Problem(case, dtype, experts, (5, 20), None)  # type: ignore[arg-type]


def check_entry(entry: Entry, problem: Problem, sets: list[InputSet], peer: bool) -> None:
    """Every output is there, in turn, and is the layer's."""
    count = 0
    for i, output in entry.results():
        expected = check.expect(problem.case, problem.experts, sets[i], sublayer=entry.sublayer)
        error = check.compare(output, expected, problem.dtype)
        check.judge(error, problem.dtype, peer)
        count += 1
    assert count == entry.outputs


def cpu_session(model: Any, folder: Path) -> ort.InferenceSession:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_state_under_load_is_asked_for_while_work_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []

    def query(*fields: str) -> dict[str, str]:
        begin = len(done)
        time.sleep(0.05)
        return {"before": str(begin), "meanwhile": str(len(done) - begin)}

    monkeypatch.setattr(machine, "query", query)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.001))
    found = machine.state_under_load(lambda: done.append(1), seconds=0.2)
    assert int(found["before"]) > 8 and int(found["meanwhile"]) > 8


def test_sessions_of_microsofts_operator_on_the_written_weights(tmp_path: Path) -> None:
    problem = problem_of(SMALL, "float16", tmp_path)
    path = problem.experts.path
    sets = make_inputs(SMALL, "float16", 20, "uniform", 3, device="cpu")
    for layers in (1, 3):
        model = microsoft_moe_model(SMALL, "float16", path, layers, None, "swiglu")
        assert not any(t.raw_data for t in model.graph.initializer)
        bound = BoundSession(cpu_session(model, tmp_path), problem, 20, layers)
        bound.warm_up()
        made = bound.single(sets) if layers == 1 else bound.model(sets)
        assert made.outputs == 3
        check_entry(made, problem, sets, peer=True)


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("case", [SMALL, SMALL_T5], ids=lambda c: c.name)
def test_sessions_of_moe_layers_on_the_written_weights(
    tmp_path: Path, case: Case, casts: bool
) -> None:
    problem = problem_of(case, "float16", tmp_path)
    sets = make_inputs(case, "float16", 20, "zipf", 3, device="cpu")
    for layers in (1, 3):
        model = moe_layer_model(case, "float16", problem.experts.path, layers, None, casts)
        lowered = moe_infer.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        bound = BoundSession(lowered, problem, 20, layers, casts)
        check_entry(
            bound.single(sets) if layers == 1 else bound.model(sets), problem, sets, peer=False
        )


def test_a_session_that_leaves_its_output_alone_is_found(tmp_path: Path) -> None:
    class Idle(ort.InferenceSession):
        def run_with_iobinding(self, *_: Any) -> None:
            pass

    problem = problem_of(SMALL, "float16", tmp_path)
    sets = make_inputs(SMALL, "float16", 5, "uniform", 1, device="cpu")
    path = problem.experts.path
    model = microsoft_moe_model(SMALL, "float16", path, 1, 5, "swiglu")
    onnx.save(model, tmp_path / "model.onnx")
    idle = Idle(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    with pytest.raises(check.WrongResultError, match="NaN"):
        check_entry(BoundSession(idle, problem, 5).single(sets), problem, sets, peer=True)


def test_sets_are_loaded_in_turn() -> None:
    seen: list[Any] = []
    following = rotate(["a", "b"], seen.append)  # type: ignore[arg-type]
    for _ in range(3):
        following()
    assert seen == ["a", "b", "a"]


def test_a_graph_that_stands_for_a_model_needs_no_set_twice() -> None:
    assert all(1 < model_layers(tokens) <= set_count(tokens) for tokens in TOKENS)


def grouped_product(x: Any, w: Any, offs: Any) -> Any:
    """What torch._grouped_mm computes."""
    ends = offs.tolist()
    assert ends == sorted(ends) and ends[-1] == len(x)
    begins = [0, *ends[:-1]]
    parts = [x[a:b] @ w[e] for e, (a, b) in enumerate(zip(begins, ends, strict=True))]
    return torch.cat(parts)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "case", [SMALL, replace(SMALL, normalize=0), SMALL_T5], ids=["normalized", "plain", "t5"]
)
def test_layer_in_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, combine: str
) -> None:
    monkeypatch.setattr(torch, "_grouped_mm", grouped_product, raising=False)
    problem = problem_of(case, "bfloat16", tmp_path)
    layer = TorchLayer(case, problem.experts, COMBINES[combine])
    for kind in ("uniform", "one"):
        (given,) = make_inputs(case, "bfloat16", 30, kind, 1, device="cpu")
        expected = check.expect(case, problem.experts, given)
        check.judge(check.compare(layer(given), expected, "bfloat16"), "bfloat16", peer=True)


def test_a_module_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_bench.peers.peer.capture", Replay)
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def make(case):\n"
        "    assert case.gate_up.shape == (case.experts, 2 * case.hidden, case.d_model)\n"
        "    return lambda x, logits: torch.zeros_like(x) if case.dtype == 'bfloat16' else 1 / 0\n"
    )
    problem = problem_of(SMALL, "bfloat16", tmp_path)
    sets = make_inputs(SMALL, "bfloat16", 5, "uniform", 2, device="cpu")
    peer = load_peer("module", file)
    peer.prepare(problem)
    entry = peer.entries(sets, model=True)["module"]()
    assert entry.runs == 2 and not entry.ours
    with pytest.raises(check.WrongResultError, match="wrong result"):
        check_entry(entry, problem, sets, peer=True)


class Replay:
    """Stands for a CUDA graph."""

    def __init__(self, run: Any) -> None:
        run()
        self.replay = run


def test_peers_have_the_names_that_stand_in_for_them() -> None:
    for name, entries in NAMES.items():
        assert load_peer(name, Path("mine.py")).names == entries
    missing = load_peer("module", None)
    assert isinstance(missing, MissingPeer)
    with pytest.raises(UnavailableError, match="no file"):
        missing.prepare(None)  # type: ignore[arg-type]


# --- A point


class FakePeer(Peer):
    """The reference as a peer; ``fault`` says where it goes wrong."""

    def __init__(self, name: str, fault: str = "", ours: bool = False) -> None:
        self.names, self._fault, self._ours = (name,), fault, ours

    def _fail(self, place: str) -> None:
        if self._fault == place:
            raise RuntimeError(f"no {place}")

    def prepare(self, problem: Problem) -> None:
        self._fail("prepare")
        self._problem = problem

    def open(self, tokens: int) -> None:
        self._fail("open")

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Any]:
        self._fail("entries")

        def make() -> Entry:
            self._fail("make")
            return Entry(lambda: self._fail("run"), 1, results, len(sets), ours=self._ours)

        def results() -> Iterator[tuple[int, Any]]:
            problem = self._problem
            for i, given in enumerate(sets):
                y = check.expect(problem.case, problem.experts, given)  # few tokens: all of them
                output = torch.zeros_like(given.hidden_states)
                output[y.tokens] = y.values.to(output.dtype)
                if self._fault == "wrong":
                    output[0, 0] += 1
                if self._fault != "missing" or i:
                    yield i, output

        return {self.names[0]: make}


def fake_measure(contenders: dict[str, timing.Contender], budget_s: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, contender in contenders.items():
        try:
            contender.run()
            results[name] = timing.Spread(0.5, 0.4, 0.6, 50)
        except RuntimeError as error:
            results[name] = error
    return results


def test_a_time_that_the_chip_cannot_reach_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_bench.point.measure", fake_measure)
    problem = problem_of(SMALL, "bfloat16", tmp_path)
    slow = Rates(1e9, {"bfloat16": SMALL.flops(16) / 1e-3})  # 1 ms, the fake takes half of that
    contest = Contest(problem, slow, [FakePeer("bare_graph", ours=True)], l2_bytes=1)
    contest.open(16)
    found = contest.measure("uniform", 1.0)
    assert "less than the chip needs" in found["contenders"]["bare_graph"]["failed"]
    assert "ms" not in found["contenders"]["bare_graph"]
    assert found["expert_bytes_exceed_l2"] is True


FAULTS = {
    "prepare": "RuntimeError: no prepare",
    "open": "RuntimeError: no open",
    "entries": "RuntimeError: no entries",
    "make": "RuntimeError: no make",
    "run": "RuntimeError: no run",
    "wrong": "wrong result: largest difference 1",
    "missing": "1 outputs instead of 2",
}


def test_a_failure_costs_its_own_column_and_its_text_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_bench.point.measure", fake_measure)
    monkeypatch.setattr("moe_bench.inputs.SETS", {10**6: 2})
    case = replace(SMALL, name="mixtral")  # the record knows the real ones
    problem = problem_of(case, "bfloat16", tmp_path)
    peers: list[Peer] = [FakePeer(fault, fault) for fault in FAULTS]
    peers.insert(1, FakePeer("bare_graph", ours=True))
    contest = Contest(problem, Rates(1e9, {"bfloat16": 1e9}), peers, l2_bytes=10**6)
    contest.open(16)
    found = contest.measure("uniform", 1.0)
    for name, text in FAULTS.items():
        assert found["contenders"][name]["failed"].startswith(text), name
        assert "ms" not in found["contenders"][name]
    good = found["contenders"]["bare_graph"]
    assert (good["ms"], good["p10"], good["p90"], good["samples"]) == (0.5, 0.4, 0.6, 50)
    assert good["norm_error"] < 1e-2 and "failed" not in good
    assert found["floor_ms"] == pytest.approx(1e3 * case.flops(16) / 1e9)
    assert found["expert_bytes_exceed_l2"] is False

    path = tmp_path / "resident.json"
    record = Record(path, {"card": "NVIDIA H100"}, append=False)
    record.add(found)
    assert not record.failed  # a peer's is not ours
    assert json.loads(path.read_text())["points"][0]["verdicts"]["target"]["basis"] != "ms"


def test_a_wrong_result_of_ours_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_bench.point.measure", fake_measure)
    problem = problem_of(replace(SMALL, name="mixtral"), "bfloat16", tmp_path)
    peers = [FakePeer("bare_graph", "wrong", ours=True)]
    contest = Contest(problem, Rates(1e9, {"bfloat16": 1e9}), peers, l2_bytes=10**6)
    contest.open(16)
    record = Record(tmp_path / "resident.json", {"card": "NVIDIA H100"}, append=False)
    record.add(contest.measure("one", 1.0))
    assert record.failed


def test_appending_keeps_other_points_and_replaces_the_same(tmp_path: Path) -> None:
    path = tmp_path / "resident.json"
    base = {"case": "mixtral", "dtype": "bfloat16", "routing": "uniform", "floor_ms": 0.1}

    def add(record: Record, tokens: int, ms: float) -> None:
        record.add({**base, "tokens": tokens, "contenders": {"bare_graph": {"ms": ms}}})

    first = Record(path, {"card": "NVIDIA H200"}, append=False)
    add(first, 1, 0.5)
    add(first, 16, 0.6)
    second = Record(path, {"card": "NVIDIA H200"}, append=True)
    add(second, 16, 0.7)
    data = json.loads(path.read_text())
    found = [(p["tokens"], p["run"], p["contenders"]["bare_graph"]["ms"]) for p in data["points"]]
    assert found == [(1, 0, 0.5), (16, 1, 0.7)] and len(data["runs"]) == 2
    add(second, 1, 0.4)  # in its old place
    assert [p["tokens"] for p in json.loads(path.read_text())["points"]] == [1, 16]
    assert not second.failed
    second.add_failure("t5", "bfloat16", "no memory")
    assert second.failed
    assert json.loads(path.read_text())["runs"][1]["failures"][0]["reason"] == "no memory"
    path.write_text("[]")
    with pytest.raises(ValueError, match="has no runs and points"):
        Record(path, {}, append=True)
