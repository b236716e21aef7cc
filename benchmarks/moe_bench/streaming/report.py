"""The measurements as tables. Reads the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_bench.report import claims_table, markdown_table, number
from moe_bench.streaming.simulated import simulated_ms

TITLES = {
    "A": "A: InfMoE's example, T5_FF, 20 experts of 4096 x 16384, bfloat16",
    "A32": "A: the same in float32",
    "B": "B: 48 layers of 128 experts, top 8, 2048 x 768, bfloat16",
    "F": "F: the same layers, one token, told guesses of what the next layer needs",
    "C": "C: four Mixtral layers, one token, bfloat16",
    "D": "D: 2 layers of 128 experts from a file: almost nothing pinned, and loading all that stay",
}

Point = Mapping[str, Any]


def text(data: Mapping[str, Any]) -> str:
    """All tables, notes and claims."""
    parts = []
    for part, title in TITLES.items():
        mine = [point for point in data["points"] if point["part"] == part]
        if mine:
            parts += [title, "", table(mine), *notes(mine), ""]
    failures = [f for run in data["runs"] for f in run["failures"]]
    parts += [f"part {f['part']} ended early: {f['reason']}" for f in failures]
    return "\n".join([*parts, claims_table(data["summary"])])


def table(points: Sequence[Point]) -> str:
    """One part."""
    return ahead_table(points) if points[0]["part"] == "F" else general_table(points)


def general_table(points: Sequence[Point]) -> str:
    """A part that has no guesses."""
    rows = [
        [
            str(point["tokens"]),
            str(point.get("slots") or ""),
            point["routing"],
            point["state"],
            point["mode"],
            number(point.get("ms")),
            spread(point),
            number(point.get("floor_ms")),
            number(point.get("over_floor")),
            point.get("bound", ""),
            number(point.get("resident_ms")),
            number(point.get("gb_a_second")),
            percent(point.get("bus_share")),
            percent(point.get("hit_rate")),
            percent(point.get("replay_hit_rate")),
            percent(point.get("belady_hit_rate")),
            number(simulated_ms(point)) if "ms" in point else "",
        ]
        for point in points
    ]
    head = [
        "tokens", "slots", "routing", "state", "mode", "ms", "p10..p90", "floor", "x floor",
        "bound", "resident", "GB/s", "of the bus", "hits", "replayed", "Belady",
        "simulated",
    ]  # fmt: skip
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return markdown_table([head[i] for i in used], [[row[i] for i in used] for row in rows])


def ahead_table(points: Sequence[Point]) -> str:
    """Part F; used, wasted and their bytes are of one step of all layers."""
    ahead = {
        "prefetches_used": 1,
        "prefetches_wasted": 1,
        "prefetch_bytes_used": 1e-6,
        "prefetch_bytes_wasted": 1e-6,
    }
    rows = [
        [
            str(point["slots"]),
            str(point["pause_us"]),
            percent(point["recall"], 0) or "no guesses",
            number(point.get("ms")),
            spread(point),
            number(point.get("gain")),
            number(point.get("floor_ms")),
            number(point.get("over_floor")),
            number(point.get("resident_ms")),
            percent(point.get("hit_rate")),
            *(number(unit * point[name]) if "ms" in point else "" for name, unit in ahead.items()),
        ]
        for point in points
    ]
    head = [
        "slots", "pause, us", "recall", "ms", "p10..p90", "gain", "floor", "x floor", "resident",
        "hits", "used", "wasted", "MB used", "MB wasted",
    ]  # fmt: skip
    return markdown_table(head, rows)


def spread(point: Point) -> str:
    """Most of the times."""
    return f"{number(point.get('p10'))}..{number(point.get('p90'))}" if "ms" in point else "–"


def notes(points: Sequence[Point]) -> list[str]:
    """Failures and notes; each text once with what it is about."""
    seen: dict[str, list[str]] = {}
    for point in points:
        said = point.get("failed") or point.get("note")
        if said:
            about = f"{point['mode']} {point['tokens']}/{point.get('slots')} {point['state']}"
            about += guess(point)
            seen.setdefault(f"not available: {said}" if "failed" in point else said, []).append(
                about
            )
    return [f"  {', '.join(about)}: {said[:400]}" for said, about in seen.items()]


def guess(point: Point) -> str:
    """Of part F, what else a point is about; nothing of the others."""
    if "recall" not in point:
        return ""
    return f", {point['pause_us']} us, {percent(point['recall'], 0) or 'no'} guesses"


def percent(value: float | None, digits: int = 1) -> str:
    """A part of one."""
    return "" if value is None else f"{100 * value:.{digits}f} %"
