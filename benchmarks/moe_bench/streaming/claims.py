"""What the measurements have to show, and whether they do. Reads the points of the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moe_bench.report import geomean
from moe_bench.streaming.shapes import (
    BUS_SHARE,
    DECODER_BELOW_BELADY,
    DECODER_BUDGETS,
    DECODER_OVER_FLOOR,
    DEFAULT_MODES,
    EXAMPLE_MOST_BYTES,
    EXAMPLE_MOST_MS,
    EXAMPLE_OVER_INFMOE,
    HITS_OVER_RESIDENT,
    INFMOE_MS,
    MIXTRAL_MOST_MS,
    MIXTRAL_OVER_ACCELERATE,
    MODES,
    SIMULATED_WITHIN,
)
from moe_bench.streaming.simulated import simulated_ms

Point = dict[str, Any]


def summarise(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One line for each claim; ``held`` is None while a point is missing that it is about."""
    timed = [point for point in points if "ms" in point]
    lines = []
    there = {point["mode"] for point in points}
    for mode in MODES:
        if mode not in DEFAULT_MODES and mode not in there:
            continue
        mine = [point for point in timed if point["mode"] == mode]
        lines += _about_the_bus(mode, mine)
        lines += _about_hits(mode, mine)
        lines += _about_the_example(mode, mine)
        lines += _about_mixtral(mode, mine, timed)
        lines += _about_the_decoder(mode, mine)
        if mode == "host":
            lines.append(_about_the_replay("F", mode, mine))  # guesses evict nothing
    return lines


def _about_the_bus(mode: str, points: list[Point]) -> list[dict[str, Any]]:
    bound = [
        p
        for p in points
        if p["part"] in ("A", "A32", "B", "C") and p.get("bound") == "bus" and p["bytes_a_run"]
    ]
    share = BUS_SHARE[mode]
    shares = [p["bus_share"] for p in bound]
    parts = {p["part"] for p in bound}
    return [
        _line(
            f"{mode}: part of the bus's speed where the bus is the bound",
            shares,
            f">= {share:g}",
            lambda v: v >= share,
            min,
            complete={"A", "B", "C"} <= parts,
        )
    ]


def _about_hits(mode: str, points: list[Point]) -> list[dict[str, Any]]:
    hits = [p for p in points if p["part"] == "B" and p["routing"] == "all hits"]
    missed = sum(p["bytes_a_run"] for p in hits)
    whole = [p for p in points if p["part"] == "B" and p.get("percent") == 100]
    lines = [
        _line(
            f"{mode}: all hits, over resident",
            [p["over_resident"] for p in hits],
            f"<= {HITS_OVER_RESIDENT:g}",
            lambda v: v <= HITS_OVER_RESIDENT and not missed,
            max,
        )
    ]
    if mode == "host":
        lines.append(
            _line(
                "budget of 100 %: bytes that move after warm-up",
                [p["bytes_a_run"] for p in whole],
                "0",
                lambda v: v == 0,
                max,
            )
        )
    return lines


def _about_the_example(mode: str, points: list[Point]) -> list[dict[str, Any]]:
    def find(part: str, tokens: int, slots: int, state: str) -> list[Point]:
        wanted = {"part": part, "tokens": tokens, "slots": slots, "state": state}
        return [p for p in points if all(p.get(k) == v for k, v in wanted.items())]

    uniform = [p for p in find("A", 512, 16, "warm") if p["routing"] == "uniform"]
    return [
        _line(
            f"{mode}: A, bfloat16, 4 slots, 512 tokens, cold, ms",
            [p["ms"] for p in find("A", 512, 4, "cold")],
            f"< {EXAMPLE_MOST_MS:g}",
            lambda v: v < EXAMPLE_MOST_MS,
            max,
        ),
        _line(
            f"{mode}: A, bfloat16, 16 slots, repeated calls, bytes over all-miss bytes",
            [p["bytes_a_run"] / p["all_miss_bytes"] for p in uniform],
            f"<= {EXAMPLE_MOST_BYTES:.3f}",
            lambda v: v <= EXAMPLE_MOST_BYTES,
            max,
        ),
        _line(
            f"{mode}: A, float32, 4 slots, 40960 tokens, cold, over InfMoE on an H200",
            [p["ms"] / INFMOE_MS[40960] for p in find("A32", 40960, 4, "cold")],
            f"< {EXAMPLE_OVER_INFMOE:g}",
            lambda v: v < EXAMPLE_OVER_INFMOE,
            max,
        ),
    ]


def _about_mixtral(mode: str, points: list[Point], everybody: list[Point]) -> list[dict[str, Any]]:
    cold = [p for p in points if p["part"] == "C" and p["state"] == "cold"]
    peer = [p for p in everybody if p["part"] == "C" and p["mode"] == "accelerate"]
    ratios = [p["ms"] / c["ms"] for c in cold for p in peer if p["run"] == c["run"]]
    return [
        _line(
            f"{mode}: C, cold, ms",
            [p["ms"] for p in cold],
            f"< {MIXTRAL_MOST_MS:g}",
            lambda v: v < MIXTRAL_MOST_MS,
            max,
        ),
        _line(
            f"{mode}: C, cold, accelerate's time over ours, same run",
            ratios,
            f">= {MIXTRAL_OVER_ACCELERATE:g}",
            lambda v: v >= MIXTRAL_OVER_ACCELERATE,
            min,
        ),
    ]


def _about_the_decoder(mode: str, points: list[Point]) -> list[dict[str, Any]]:
    main = [
        p
        for p in points
        if p["part"] == "B"
        and (p["tokens"], p["percent"], p["routing"]) == (1, DECODER_BUDGETS[0], "skewed")
    ]
    below = [p["belady_hit_rate"] - p["hit_rate"] for p in main if p.get("belady_hit_rate")]
    name = f"{mode}: B, {DECODER_BUDGETS[0]} %, batch 1"
    return [
        _line(
            f"{name}, time over floor",
            [p["over_floor"] for p in main],
            f"<= {DECODER_OVER_FLOOR:g}",
            lambda v: v <= DECODER_OVER_FLOOR,
            max,
        ),
        _about_the_replay("B", mode, points),
        _line(
            f"{mode}: B, batch 1, simulated time over measured",
            [
                ms / p["ms"]
                for p in points
                if p["tokens"] == 1 and (ms := simulated_ms(p)) is not None
            ],
            f"within {SIMULATED_WITHIN:.0%}",
            lambda v: abs(v - 1) <= SIMULATED_WITHIN,
            lambda values: max(values, key=lambda v: abs(v - 1)),
        ),
        _line(
            f"{name}, hit rate below Belady's",
            below,
            f"<= {DECODER_BELOW_BELADY:g}",
            lambda v: v <= DECODER_BELOW_BELADY,
            max,
        ),
    ]


def _about_the_replay(part: str, mode: str, points: list[Point]) -> dict[str, Any]:
    mine = [p for p in points if p["part"] == part and p.get("replay_hit_rate")]
    return _line(
        f"{mode}: {part}, hit rates that are not the replay's",
        [p["hit_rate"] - p["replay_hit_rate"] for p in mine],
        "0",
        lambda v: abs(v) < 1e-9,
        lambda values: max(values, key=abs),
    )


def _line(
    claim: str,
    values: list[float],
    wanted: str,
    holds: Callable[[float], bool],
    worst: Callable[[Iterable[float]], float],
    complete: bool = True,
) -> dict[str, Any]:
    """``complete``: nothing is missing that the claim is about, if there are values at all."""
    bad = any(not holds(value) for value in values)
    held = False if bad else True if values and complete else None
    return {
        "claim": claim,
        "dtype": "",
        "points": len(values),
        "of": len(values) or 1,
        "geomean": geomean(values) if values and min(values) > 0 else None,
        "worst": worst(values) if values else None,
        "wanted": wanted,
        "held": held,
    }
