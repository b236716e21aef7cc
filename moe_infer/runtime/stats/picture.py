"""Use and residency of experts as a picture; needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_infer.runtime.stats.counters import ExpertStats


def heat_matrices(
    stats: Sequence[ExpertStats],
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """What the picture shows, (layers, largest number of experts) each.

    Returns:
        The part of a layer's runs that needed each expert, and 1 where it lies in a slot, 0 where
        it does not. NaN where nobody counts, and where a layer has fewer experts.
    """
    shape = (len(stats), max((layer.experts for layer in stats), default=0))
    use, resident = np.full(shape, np.nan), np.full(shape, np.nan)
    for i, layer in enumerate(stats):
        if layer.uses is not None:
            use[i, : layer.experts] = layer.uses / max(layer.runs or 0, 1)
        if layer.resident is not None:
            resident[i, : layer.experts] = layer.resident
    return use, resident


def save_heat_map(stats: Sequence[ExpertStats], path: str | os.PathLike[str]) -> None:
    """Draws layer by expert: how often each was needed, and which lie in a slot now.

    Args:
        stats: the layers.
        path: of the picture; its suffix says the format, ``.png`` for instance.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no layers, or matplotlib does not know the suffix.
    """
    if not stats:
        raise ValueError("a heat map needs at least one layer, got none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a picture needs matplotlib ({error}): pip install 'moe-infer[plot]'"
        ) from error

    use, resident = heat_matrices(stats)
    height = min(3 + 0.18 * len(stats), 40)
    # Without pyplot: nothing of the caller's figures and backends is touched.
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, use, "viridis", "part of the runs that needed the expert", None),
        (right, resident, "Greens", "in a slot now", 1.0),
    )
    for axis, values, colours, title, largest in panels:
        known = not bool(np.isnan(values).all())
        axis.set(title=title if known else f"{title}: not counted here", xlabel="expert")
        axis.set_facecolor("lightgray")
        if not known:
            continue
        image = axis.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            vmin=0,
            vmax=largest or max(float(np.nanmax(values)), 1e-9),
        )
        figure.colorbar(image, ax=axis)
    step = -(-len(stats) // 60)
    names = [layer.name if len(layer.name) < 33 else f"…{layer.name[-31:]}" for layer in stats]
    left.set_yticks(range(0, len(stats), step), names[::step], fontsize=7)
    figure.savefig(os.fspath(path), dpi=110)
