"""What the benchmark of resident layers does without a GPU: inputs, reference, floors, verdicts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from moe_bench import floor, routing  # noqa: E402
from moe_bench.cases import CASES, TOKENS, Case  # noqa: E402

MIXTRAL, QWEN = CASES["mixtral"], CASES["qwen3"]
SMALL = Case("small", 6, 2, 32, 48)
SMALL_T5 = Case("small_t5", 5, 1, 32, 48, "T5_FF", "default", 0)


# --- Routing


@pytest.mark.parametrize("kind", routing.ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 8, 2), (1, 128, 8), (300, 256, 8), (500, 8, 2), (9, 3, 3)]
)
def test_logits_leave_no_choice_to_an_implementation(
    kind: str, tokens: int, experts: int, top_k: int
) -> None:
    logits = routing.make_logits(kind, tokens, experts, top_k, np.random.default_rng(3))
    assert logits.shape == (tokens, experts)
    assert (logits.astype(np.float16) == logits).all()
    assert (logits * 32 == np.round(logits * 32)).all()
    assert (np.abs(logits * 32) <= 256).all()  # 8 bits: bfloat16 holds them exactly
    ordered = -np.sort(-logits, axis=1)
    if top_k < experts:
        assert (ordered[:, top_k - 1] > ordered[:, top_k]).all()


def test_shares_of_the_experts() -> None:
    shares = {}
    for kind in routing.ROUTINGS:
        logits = routing.make_logits(kind, 4000, 16, 1, np.random.default_rng(4))
        counts = np.bincount(routing.choose(logits, 1).ravel(), minlength=16) / 4000
        shares[kind] = np.sort(counts)[::-1]
    assert shares["one"][0] == 1
    assert shares["uniform"].max() < 0.09 and shares["uniform"].min() > 0.04
    wanted = 1 / np.arange(1, 17)
    assert np.abs(shares["zipf"] - wanted / wanted.sum()).max() < 0.03


def test_one_expert_is_everybodys_first_choice_and_the_others_are_spread() -> None:
    logits = routing.make_logits("one", 2000, 8, 2, np.random.default_rng(5))
    chosen = routing.choose(logits, 2)
    assert len(np.unique(chosen[:, 0])) == 1
    counts = np.bincount(chosen[:, 1], minlength=8)
    assert (counts > 0).sum() == 7 and counts.max() < 2000 / 7 * 1.4


@pytest.mark.parametrize("kind", routing.ROUTINGS)
def test_successive_sets_share_no_expert_where_there_are_enough(kind: str) -> None:
    sets = [set(routing.choose(s, 8).ravel()) for s in routing.make_sets(kind, 16, 1, 128, 8, 1)]
    assert all(not a & b for a, b in pairwise(sets))
    assert len(set().union(*sets)) > 16


def test_ties_go_to_the_lower_expert() -> None:
    chosen = routing.choose(np.array([[1.0, 2.0, 2.0, 0.0, 2.0]]), 2)
    assert chosen.tolist() == [[1, 2]]


def test_unknown_routing_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 'skewed'"):
        routing.make_logits("skewed", 1, 2, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="top_k is 3"):
        routing.make_logits("uniform", 1, 2, 3, np.random.default_rng(0))


# --- Floors and targets


def test_floors_are_those_of_the_design() -> None:
    design = {
        "mixtral": (0.155, 0.62, 0.62, 0.92, 7.3),
        "qwen3": (0.017, 0.17, 0.27, 0.27, 0.78),
    }
    for name, values in design.items():
        found = [floor.design_floor_ms(CASES[name], tokens) for tokens in TOKENS]
        assert found == pytest.approx(values, rel=0.03)


def test_floor_takes_the_longer_of_bytes_and_products() -> None:
    case = Case("x", 4, 1, 100, 50)
    assert case.expert_bytes == 30000 and case.flops(10) == 300000
    assert floor.floor_ms(case, 10, 2, read=6e4, dense=1e9) == pytest.approx(1000)
    assert floor.floor_ms(case, 10, 2, read=1e9, dense=3e5) == pytest.approx(1000)
    assert floor.expected_active(case, 0) == 0
    assert floor.expected_active(case, 1) == pytest.approx(1)
    assert floor.expected_active(case, 10000) == pytest.approx(4)


def test_verdict_on_the_card_of_the_targets_is_by_the_milliseconds() -> None:
    for ms, met in ((0.170, True), (0.1701, False)):
        verdict = floor.target_verdict(MIXTRAL, 1, ms, 0.1, "NVIDIA H200")
        assert verdict == floor.Verdict(met, "ms", ms, 0.170)


def test_verdict_on_another_card_is_by_the_distance_from_the_floor() -> None:
    most = 0.170 / floor.design_floor_ms(MIXTRAL, 1)
    for ratio, met in ((most * 0.999, True), (most * 1.001, False)):
        verdict = floor.target_verdict(MIXTRAL, 1, 0.25 * ratio, 0.25, "NVIDIA H100 80GB HBM3")
        assert verdict is not None and verdict.basis == "time / floor"
        assert (verdict.met, verdict.limit) == (met, most)


def test_no_target_no_verdict() -> None:
    assert floor.target_verdict(CASES["t5"], 1, 1.0, 1.0, "NVIDIA H200") is None
    assert floor.target_verdict(QWEN, 3, 1.0, 1.0, "NVIDIA H200") is None
    verdict = floor.triton_verdict(QWEN, 1, 0.037, 0.017, "NVIDIA H200")
    assert verdict is not None and verdict.met


# --- Weights and reference

torch = pytest.importorskip("torch")

from moe_bench import check, timing  # noqa: E402
from moe_bench.inputs import make_inputs, mean_active, set_count  # noqa: E402
from moe_bench.weights import Experts, make_experts  # noqa: E402

from moe_infer import op, reference  # noqa: E402
from moe_infer.weights import open_expert_weights  # noqa: E402


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
        with pytest.raises(check.WrongResultError, match="largest difference"):
            check.judge(error, "bfloat16", peer)


def test_a_peer_that_rounds_more_is_noted_and_ours_is_wrong() -> None:
    error = check.Error(largest=0.03, norm=0.01, within=False)
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


READ_ALL = """
import torch
from moe_bench.read_kernel import BLOCK, STEPS, read_kernel

source = torch.randint(-(2**31), 2**31 - 1, (3 * BLOCK * STEPS,), dtype=torch.int32)
sums = torch.zeros(3, dtype=torch.int32)
read_kernel[(3,)](source, sums, BLOCK, STEPS)
assert (int(sums.long().sum()) - int(source.long().sum())) % 2**32 == 0
"""


def test_the_kernel_that_measures_the_memory_reads_all_of_it() -> None:
    pytest.importorskip("triton")
    # Triton reads the variable when it is imported, hence another process.
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL], env={**os.environ, **variables}, capture_output=True
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
