"""A plot of the times over the floor; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_bench.cases import CASES
from moe_bench.report import COLUMNS, groups

SHOWN = {
    "bare_graph": ("tab:blue", "o"),
    "trt_share": ("tab:cyan", "s"),
    "trt_graph": ("tab:green", "^"),
    "ort_moe_share": ("tab:pink", "s"),
    "ort_moe_graph": ("tab:red", "^"),
    "torch": ("tab:orange", "v"),
    "module": ("tab:gray", "D"),
}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Time over floor by tokens, one picture for each layer with uniform routing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shown = [g for g in groups(record["points"]) if g[2] == "uniform"]
    dtype = "bfloat16" if any(g[1] == "bfloat16" for g in shown) else "float16"
    shown = [g for g in shown if g[1] == dtype]
    if not shown:
        return
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(4 * len(shown), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (case, _, _, points) in zip(axes[0], shown, strict=True):
        for name, (colour, marker) in SHOWN.items():
            line = [
                (p["tokens"], p["contenders"][name]["ms"] / p["floor_ms"])
                for p in points
                if "ms" in p["contenders"].get(name, {})
            ]
            if line:
                axis.plot(
                    *zip(*line, strict=True), color=colour, marker=marker, label=COLUMNS[name]
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xlabel="tokens", title=CASES[case].title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(ticker.ScalarFormatter())
        axis.title.set_fontsize(9)
        axis.set_xticks([p["tokens"] for p in points])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"time / floor, {dtype}")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
