"""Hit rate by budget as a picture; needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from moe_infer.simulate.compare import OPTIMUM, Point


def draw(panels: Mapping[str, tuple[int, Sequence[Point]]], path: str | os.PathLike[str]) -> None:
    """Draws hit rate over the part of the experts that has a slot, one panel for each trace.

    Args:
        panels: by title, the number of experts and the points of one trace.
        path: of the picture; its suffix says the format, ``.png`` for instance.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib, which is not installed; pip install 'moe-infer[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (title, (experts, points)) in zip(axes[0], panels.items(), strict=True):
        for policy in dict.fromkeys(point.policy for point in points):
            line = sorted((p.slots / experts, p.hit_rate) for p in points if p.policy == policy)
            style = {"color": "black", "linestyle": "--"} if policy == OPTIMUM else {"marker": "o"}
            axis.plot(*zip(*line, strict=True), label=policy, markersize=3, **style)
        axis.set(xlabel="slots / experts", ylim=(0, 1), title=title)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("hit rate")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
