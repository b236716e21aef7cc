"""What the benchmark of resident layers says: routing, floors, verdicts, tables, its file."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from moe_bench import floor, report, routing  # noqa: E402
from moe_bench.budget import Budget  # noqa: E402
from moe_bench.cases import CASES, TOKENS, Case  # noqa: E402

MIXTRAL, QWEN = CASES["mixtral"], CASES["qwen3"]


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


# --- Shares, ratios, claims


def timed(**times: float | str) -> dict[str, Any]:
    """Contenders by name; a text is the reason why there is no time."""
    return {n: {"failed": t} if isinstance(t, str) else {"ms": t} for n, t in times.items()}


def test_share_of_a_model_is_what_a_further_layer_costs() -> None:
    contenders = timed(trt_graph=0.05, trt_layers=0.26, ort_moe_graph=0.2)
    contenders["trt_graph"]["note"] = "float32 outside"
    report.add_shares(contenders, 8)
    assert contenders["trt_share"] == {"ms": pytest.approx(0.03), "note": "float32 outside"}
    assert "ort_moe_share" not in contenders


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"trt_layers": "no memory", "trt_graph": 1.0}, "no memory"),
        ({"trt_layers": 1.0, "trt_graph": "no capture"}, "no capture"),
        ({"trt_layers": "no TensorRT", "trt_graph": "no TensorRT"}, "no TensorRT"),
        ({"trt_layers": 1.0}, "not measured"),
        ({"trt_layers": 1.0, "trt_graph": 1.0}, "8 layers took no longer than one"),
    ],
)
def test_no_share_without_both_times(times: dict[str, float | str], reason: str) -> None:
    contenders = timed(**times)
    report.add_shares(contenders, 8)
    assert contenders["trt_share"] == {"failed": reason}


def point(case: str = "mixtral", tokens: int = 1, **more: Any) -> dict[str, Any]:
    """A point with verdicts for one H200."""
    made = {
        "case": case,
        "dtype": "bfloat16",
        "tokens": tokens,
        "routing": "uniform",
        "floor_ms": floor.design_floor_ms(CASES[case], tokens),
        "contenders": timed(**more.pop("times")),
        "run": 0,
        **more,
    }
    return {**made, "verdicts": report.judge_point(made, "NVIDIA H200")}


def test_ratios_take_the_better_of_with_and_without_graph() -> None:
    verdicts = point(
        times={
            "bare_graph": 0.16,
            "trt": 0.3,
            "trt_graph": 0.2,
            "ort_moe": 0.4,
            "ort_moe_graph": 0.5,
        }
    )["verdicts"]
    assert verdicts["ort_moe_over_trt"] == pytest.approx(2)
    assert verdicts["ort_moe_over_bare"] == pytest.approx(2.5)
    assert verdicts["time_over_floor"] == pytest.approx(0.16 / 0.15486, rel=1e-3)
    assert verdicts["target"]["met"] and verdicts["triton"]["met"]
    assert "torch_over_bare" not in verdicts


def test_targets_are_for_uniform_routing_only() -> None:
    verdicts = point(times={"bare_graph": 0.16}, routing="one")["verdicts"]
    assert "target" not in verdicts and "triton" not in verdicts


def all_points(**times: float) -> list[dict[str, Any]]:
    return [point(case, tokens, times=times) for case in CASES for tokens in TOKENS]


def claim(points: list[dict[str, Any]], start: str) -> dict[str, Any]:
    (line,) = [line for line in report.summarise(points) if line["claim"] == start]
    return line


MOE_CLAIM = "com.microsoft.MoE over MoELayer, one layer a session"


def test_claims_hold_only_when_every_point_is_there() -> None:
    points = all_points(bare_graph=0.01, trt_graph=1.0, ort_moe=1.7, trt_share=0.0104)
    held = claim(points, MOE_CLAIM)
    assert (held["points"], held["of"], held["held"]) == (10, 10, True)
    assert held["geomean"] == pytest.approx(1.7) and held["worst"] == pytest.approx(1.7)
    assert claim(points, f"{MOE_CLAIM}, shapes not tuned on")["of"] == 10
    assert claim(points, "every target is reached")["held"] is True
    assert claim(points, "a layer's share of a model over the bare kernel")["held"] is True
    missing = [{**p, "verdicts": {}} if p["tokens"] == 16 else p for p in points]
    for line in report.summarise(missing):
        assert line["held"] is None, line


def test_one_slower_point_breaks_a_claim_whatever_the_mean() -> None:
    points = all_points(bare_graph=0.01, trt_graph=1.0, ort_moe=3.0)
    points[0] = point(times={"bare_graph": 0.01, "trt_graph": 1.0, "ort_moe": 0.99})
    line = claim(points, MOE_CLAIM)
    assert line["geomean"] > 1.6 and line["worst"] == pytest.approx(0.99)
    assert line["held"] is False


def test_a_mean_below_the_wanted_breaks_a_claim() -> None:
    points = all_points(bare_graph=0.01, trt_graph=1.0, ort_moe=1.5)
    assert claim(points, MOE_CLAIM)["held"] is False
    assert claim(points, f"{MOE_CLAIM}, shapes not tuned on")["held"] is True


def test_a_share_beyond_five_percent_breaks_the_claim() -> None:
    points = all_points(bare_graph=1.0, trt_share=1.051)
    assert claim(points, "a layer's share of a model over the bare kernel")["held"] is False


def test_types_are_judged_apart_and_points_that_are_not_there_are_missed() -> None:
    points = all_points(bare_graph=0.01)
    points[0] = {**point(times={"bare_graph": 1.0}), "dtype": "float16"}
    lines = [x for x in report.summarise(points) if x["claim"] == "every target is reached"]
    assert [(x["dtype"], x["held"]) for x in lines] == [("bfloat16", None), ("float16", False)]


# --- Tables


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), (0.028, "0.0280"), (1.2, "1.20"), (8.837, "8.84"), (1234.5, "1234"), (0.0, "0.0")],
)
def test_numbers_have_three_digits(value: float | None, expected: str) -> None:
    assert report.number(value) == expected


def test_table_leaves_out_columns_without_entries_and_marks_what_failed() -> None:
    table = report.points_table(
        [
            point(times={"bare_graph": 0.165, "trt": "no TensorRT"}),
            point(tokens=16, times={"bare_graph": 0.7, "trt": "no TensorRT"}),
        ]
    )
    assert table.splitlines() == [
        "| tokens | floor | kernel, graph | ORT TensorRT | x floor | target |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1 | 0.155 | 0.165 | – | 1.07 | 0.170: met |",
        "| 16 | 0.613 | 0.700 | – | 1.14 | 0.645: missed |",
    ]


def test_table_shows_the_spread_where_it_is_asked_for() -> None:
    made = point(times={"bare_graph": 0.165})
    made["contenders"]["bare_graph"] |= {"p10": 0.1641, "p90": 0.1702}
    assert "| 0.165 (0.164..0.170) |" in report.points_table([made], spread=True)
    assert "| 0.165 |" in report.points_table([made])


def test_text_gives_each_reason_once_with_its_tokens() -> None:
    points = [point(tokens=t, times={"bare_graph": 1.0, "trt": "no TensorRT"}) for t in (16, 1)]
    said = report.text({"points": points, "summary": report.summarise(points)})
    assert said.count("no TensorRT") == 1
    assert "ORT TensorRT (1, 16 tokens): not available: no TensorRT" in said
    assert said.index("| 1 |") < said.index("| 16 |")
    assert "| every target is reached | bfloat16 | 2 of 10 |" in said


# --- Time


def test_budget_gives_half_to_samples_and_ends() -> None:
    now = [100.0]
    budget = Budget(60, 10, clock=lambda: now[0])
    assert budget.share() == pytest.approx(0.5 * 60 / 10)
    now[0] += 33
    assert budget.share() == pytest.approx(0.5 * 27 / 9)
    now[0] += 26.9
    assert budget.share() == 1.0 and not budget.spent
    now[0] += 0.2
    assert budget.spent and budget.left == 7


# --- The documentation's table


def test_docs_show_the_file_where_it_is(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import make_docs

    assert "benchmarks/resident.py" in make_docs.resident_table(tmp_path / "none.json")
    points = [point(tokens=t, times={"bare_graph": 1.0, "torch": 2.0}) for t in TOKENS]
    data = {
        "runs": [{"card": "NVIDIA H200", "date": "2026-11-25", "commit": "abc", "versions": {}}],
        "points": points,
        "summary": report.summarise(points),
    }
    path = tmp_path / "resident.json"
    path.write_text(json.dumps(data))
    shown = make_docs.resident_table(path)
    assert CASES["mixtral"].title in shown and "NVIDIA H200" in shown
    assert report.points_table(points) in shown


def test_docs_say_which_run_measured_which_mode() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import make_docs

    runs = [{"card": "H200", "date": f"2026-11-2{day}", "commit": "abc"} for day in (8, 9)]
    record = {"runs": runs}
    points = [{"run": 1, "mode": "host"}, {"run": 0, "mode": "device"}, {"run": 1, "mode": "host"}]
    assert make_docs.measured_on(record, points[:1]) == "H200, 2026-11-29, commit abc"
    told = "host: H200, 2026-11-29, commit abc; device: H200, 2026-11-28, commit abc"
    assert make_docs.measured_on(record, points) == told
