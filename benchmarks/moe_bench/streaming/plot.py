"""A plot of times and floors; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_bench.streaming.report import TITLES, guess

COLUMNS = 2
COLOURS = {
    "host": "tab:blue",
    "device": "tab:green",
    "auto": "tab:olive",
    "accelerate": "tab:red",
}


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Bars of the times with their floors as black lines, one picture for each part.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    parts = {
        part: [p for p in data["points"] if p["part"] == part and "ms" in p] for part in TITLES
    }
    parts = {part: found for part, found in parts.items() if found}
    if not parts:
        return
    bars = max(len(found) for found in parts.values())
    rows = -(-len(parts) // COLUMNS)
    columns = min(len(parts), COLUMNS)
    figure = Figure(figsize=(6.5 * columns, rows * (1 + 0.18 * bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(parts) :]:
        axis.set_axis_off()
    for axis, (part, found) in zip(axes, parts.items(), strict=False):
        places = list(range(len(found)))
        axis.barh(
            places,
            [p["ms"] for p in found],
            color=[COLOURS.get(p["mode"], "tab:gray") for p in found],
        )
        for place, point in zip(places, found, strict=True):
            if floor := point.get("floor_ms"):
                axis.plot([floor, floor], [place - 0.4, place + 0.4], color="black")
        axis.set_yticks(places, [label(p) for p in found], fontsize=6)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlabel("ms; black: the floor")
        axis.set_title(TITLES[part], fontsize=8)
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=90)


def label(point: Mapping[str, Any]) -> str:
    """What a bar is about."""
    slots = "" if point.get("slots") is None else f", {point['slots']} slots"
    about = f"{point['routing']}, {point['state']}, {point['mode']}{guess(point)}"
    return f"{point['tokens']} tokens{slots}, {about}"
