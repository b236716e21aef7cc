"""What the measurements say: ratios, verdicts, tables. Reads the JSON alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_bench.cases import (
    CASES,
    ORT_MOE_GEOMEAN,
    SESSION_SHARE,
    TOKENS,
    TRITON_GEOMEAN,
    UNTUNED_GEOMEAN,
)
from moe_bench.floor import target_verdict, triton_verdict

Point = Mapping[str, Any]

COLUMNS = {
    "bare_graph": "kernel, graph",
    "bare": "kernel",
    "trt": "ORT TensorRT",
    "trt_graph": "ORT TensorRT, graph",
    "trt_share": "ORT TensorRT, in a model",
    "ort_moe": "com.microsoft.MoE",
    "ort_moe_graph": "com.microsoft.MoE, graph",
    "ort_moe_share": "com.microsoft.MoE, in a model",
    "torch": "torch grouped_mm, graph",
    "module": "peer module, graph",
}
"""What a time is of, by its name in the JSON."""

MODELS = {
    "trt_layers": ("trt_graph", "trt_share"),
    "ort_moe_layers": ("ort_moe_graph", "ort_moe_share"),
}
"""A graph of several layers, one of one layer run in the same way, and the share that follows."""


def add_shares(contenders: dict[str, Any], layers: int) -> None:
    """Puts a layer's share of a model beside the times it follows from.

    The time of several layers less that of one, over the difference in number: what a session adds
    to a run is in both.
    """
    for several, (single, share) in MODELS.items():
        if several not in contenders:
            continue
        pair = [contenders[several], contenders.get(single, {"failed": "not measured"})]
        reasons = dict.fromkeys(c["failed"] for c in pair if "ms" not in c)
        if reasons:
            contenders[share] = {"failed": "; ".join(reasons)}
            continue
        value = (pair[0]["ms"] - pair[1]["ms"]) / (layers - 1)
        if value <= 0:
            contenders[share] = {"failed": f"{layers} layers took no longer than one"}
            continue
        contenders[share] = {"ms": value}
        if note := pair[1].get("note"):
            contenders[share]["note"] = note


def milliseconds(point: Point, *names: str) -> float | None:
    """The smallest of the times with these names; None if there is none."""
    found = [
        point["contenders"][name]["ms"]
        for name in names
        if "ms" in point["contenders"].get(name, {})
    ]
    return min(found) if found else None


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def judge_point(point: Point, card: str) -> dict[str, Any]:
    """Targets and ratios of one point; only what its times allow."""
    case, tokens = CASES[point["case"]], point["tokens"]
    verdicts: dict[str, Any] = {}
    bare = milliseconds(point, "bare_graph")
    if bare is not None:
        verdicts["time_over_floor"] = bare / point["floor_ms"]
        if point["routing"] == "uniform":
            for name, judge in (("target", target_verdict), ("triton", triton_verdict)):
                verdict = judge(case, tokens, bare, point["floor_ms"], card)
                if verdict is not None:
                    verdicts[name] = vars(verdict)
    for name, ours, theirs in (
        ("ort_moe_over_trt", ("trt", "trt_graph"), ("ort_moe", "ort_moe_graph")),
        ("ort_moe_over_trt_in_a_model", ("trt_share",), ("ort_moe_share",)),
        ("ort_moe_over_bare", ("bare_graph",), ("ort_moe", "ort_moe_graph")),
        ("ort_moe_in_a_model_over_bare", ("bare_graph",), ("ort_moe_share",)),
        ("torch_over_bare", ("bare_graph",), ("torch",)),
        ("module_over_bare", ("bare_graph",), ("module",)),
        ("trt_in_a_model_over_bare", ("bare_graph",), ("trt_share",)),
    ):
        a, b = milliseconds(point, *ours), milliseconds(point, *theirs)
        if a is not None and b is not None:
            verdicts[name] = b / a
    return verdicts


def summarise(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One line for each claim and type: how many points, the mean, the worst, whether it holds.

    Only uniform routing; ``held`` is None while a point is missing that the claim is about.
    """
    lines = []
    for dtype in sorted({p["dtype"] for p in points}):
        mine = [p for p in points if p["dtype"] == dtype and p["routing"] == "uniform"]
        tuned = [p for p in mine if CASES[p["case"]].tuned]
        others = [p for p in mine if not CASES[p["case"]].tuned]
        all_tuned = len(TOKENS) * sum(case.tuned for case in CASES.values())
        everything = len(TOKENS) * len(CASES)
        lines += [
            _all_met("every target is reached", dtype, tuned, "target", all_tuned),
            _ratio(
                "vLLM's Triton kernel over the bare kernel",
                dtype,
                _triton_ratios(tuned),
                all_tuned,
                TRITON_GEOMEAN,
            ),
        ]
        for name, text in (
            ("ort_moe_over_trt", "com.microsoft.MoE over MoELayer, one layer a session"),
            ("ort_moe_over_trt_in_a_model", "com.microsoft.MoE over MoELayer, a layer of a model"),
            ("ort_moe_over_bare", "com.microsoft.MoE, one layer a session, over the bare kernel"),
        ):
            for kind, chosen, of, mean in (
                ("", tuned, all_tuned, ORT_MOE_GEOMEAN),
                (", shapes not tuned on", others, everything - all_tuned, UNTUNED_GEOMEAN),
            ):
                ratios = [p["verdicts"][name] for p in chosen if name in p["verdicts"]]
                lines.append(_ratio(text + kind, dtype, ratios, of, mean))
        shares = [
            p["verdicts"]["trt_in_a_model_over_bare"]
            for p in mine
            if "trt_in_a_model_over_bare" in p["verdicts"]
        ]
        lines.append(
            {
                "claim": "a layer's share of a model over the bare kernel",
                "dtype": dtype,
                "points": len(shares),
                "of": everything,
                "geomean": geomean(shares),
                "worst": max(shares, default=None),
                "wanted": f"at most {SESSION_SHARE}",
                "held": _held(shares, everything, max(shares, default=0.0) <= SESSION_SHARE),
            }
        )
    return lines


def _held(values: Sequence[Any], wanted: int, held: bool) -> bool | None:
    if not held:
        return False
    return True if values and len(values) == wanted else None


def _all_met(claim: str, dtype: str, points: Sequence[Point], name: str, of: int) -> dict[str, Any]:
    verdicts = [p["verdicts"][name] for p in points if name in p["verdicts"]]
    over = [v["value"] / v["limit"] for v in verdicts]
    return {
        "claim": claim,
        "dtype": dtype,
        "points": len(verdicts),
        "of": of,
        "geomean": geomean(over),
        "worst": max(over, default=None),
        "wanted": "at most 1 of the limit",
        "held": _held(verdicts, of, all(v["met"] for v in verdicts)),
    }


def _triton_ratios(points: Sequence[Point]) -> list[float]:
    verdicts = [p["verdicts"]["triton"] for p in points if "triton" in p["verdicts"]]
    return [v["limit"] / v["value"] for v in verdicts]


def _ratio(claim: str, dtype: str, ratios: Sequence[float], of: int, mean: float) -> dict[str, Any]:
    found = geomean(ratios)
    worst = min(ratios, default=None)
    good = found is None or worst is None or (found >= mean and worst >= 1)
    return {
        "claim": claim,
        "dtype": dtype,
        "points": len(ratios),
        "of": of,
        "geomean": found,
        "worst": worst,
        "wanted": f"{mean} in geometric mean, never below 1",
        "held": _held(ratios, of, good),
    }


# --- Tables


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None
) -> str:
    """A Markdown table; columns after the first ``texts`` are numbers, which stand to the right."""
    left = len(header) if texts is None else texts
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [list(header), rules, *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, without exponents."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return str(value)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def points_table(
    points: Sequence[Point], columns: Iterable[str] = COLUMNS, spread: bool = False
) -> str:
    """Milliseconds of every contender; columns without any entry are left out.

    Args:
        points: one row each.
        columns: which contenders.
        spread: also the 10th and 90th percentile.
    """
    shown = [c for c in columns if any(c in p["contenders"] for p in points)]
    header = ["tokens", "floor", *(COLUMNS[c] for c in shown), "x floor", "target"]
    rows = []
    for point in points:
        times = [_cell(point["contenders"].get(c), spread) for c in shown]
        verdicts = point["verdicts"]
        ratio = number(verdicts.get("time_over_floor"))
        rows.append(
            [str(point["tokens"]), number(point["floor_ms"]), *times, ratio, _target(verdicts)]
        )
    return markdown_table(header, rows)


def _cell(contender: Mapping[str, Any] | None, spread: bool) -> str:
    if contender is None:
        return ""
    if "ms" not in contender:
        return "–"
    text = number(contender["ms"])
    if spread and "p10" in contender:
        text += f" ({number(contender['p10'])}..{number(contender['p90'])})"
    return text


def _target(verdicts: Mapping[str, Any]) -> str:
    target = verdicts.get("target")
    if target is None:
        return ""
    sign = "met" if target["met"] else "missed"
    unit = "" if target["basis"] == "ms" else " x floor"
    return f"{number(target['limit'])}{unit}: {sign}"


def groups(points: Iterable[Point]) -> list[tuple[str, str, str, list[Point]]]:
    """(case, dtype, routing, points by tokens), in the order of the cases."""
    found: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point["case"], point["dtype"], point["routing"]), []).append(point)
    order = {"uniform": 0, "zipf": 1, "one": 2}
    keys = sorted(found, key=lambda k: (list(CASES).index(k[0]), k[1], order.get(k[2], 9)))
    return [(*key, sorted(found[key], key=lambda p: p["tokens"])) for key in keys]


def text(record: Mapping[str, Any]) -> str:
    """Everything, for a terminal: tables, what failed and why, claims."""
    parts = []
    for case, dtype, routing, points in groups(record["points"]):
        parts.append(
            f"{CASES[case].title}, {dtype}, routing {routing}, milliseconds: median (p10..p90)"
        )
        parts.append(points_table(points, spread=True))
        parts += _reasons(points)
        parts.append("")
    parts.append(claims_table(record["summary"]))
    return "\n".join(parts)


def _reasons(points: Sequence[Point]) -> list[str]:
    """What is behind the dashes, and notes; each text once with the tokens it is about."""
    seen: dict[tuple[str, str], list[int]] = {}
    for point in points:
        for name, contender in point["contenders"].items():
            said = contender.get("failed") or contender.get("note")
            if said:
                key = (name, f"not available: {said}" if "failed" in contender else said)
                seen.setdefault(key, []).append(point["tokens"])
    return [
        f"  {COLUMNS.get(name, name)} ({', '.join(map(str, tokens))} tokens): {said[:400]}"
        for (name, said), tokens in seen.items()
    ]


def claims_table(summary: Iterable[Mapping[str, Any]]) -> str:
    """The claims and whether they hold."""
    says = {True: "yes", False: "NO", None: "not all measured"}
    rows = [
        [
            line["claim"],
            line["dtype"],
            f"{line['points']} of {line['of']}",
            number(line["geomean"]),
            number(line["worst"]),
            line["wanted"],
            says[line["held"]],
        ]
        for line in summary
    ]
    return markdown_table(["claim", "type", "points", "mean", "worst", "wanted", "holds"], rows)
