"""The counters as a table, and use and residency as shades, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from moe_infer.runtime.stats.counters import ExpertStats

SHADES = " ░▒▓█"
UNKNOWN = "–"
LEGEND = (
    "use: '░' to '█' for a quarter to all of the layer's largest, ' ' for none;"
    " slot: '■' in a slot now, '□' some of the experts of a place, '·' none"
)


def table(stats: Sequence[ExpertStats]) -> Table:
    """A row for each layer."""
    made = Table(
        "layer", "experts", "slots", "runs", "tokens", "hits", "misses", "hit rate", "evicted",
        "fetched", "prefetched", "stalled", "used",
    )  # fmt: skip
    for column in made.columns[1:]:
        column.justify = "right"
    for layer in stats:
        rate = layer.hit_rate
        used = None if layer.uses is None else int(np.count_nonzero(layer.uses))
        made.add_row(
            layer.name,
            str(layer.experts),
            _text(layer.slots),
            _text(layer.runs),
            _text(layer.tokens),
            _text(layer.hits),
            _text(layer.misses),
            UNKNOWN if rate is None else f"{100 * rate:.1f} %",
            _text(layer.evictions),
            UNKNOWN if layer.bytes_fetched is None else f"{layer.bytes_fetched / 1e9:.3f} GB",
            _prefetches(layer),
            UNKNOWN if layer.stall_s is None else f"{1e3 * layer.stall_s:.1f} ms",
            _text(used),
        )
    return made


def heat_map(stats: Sequence[ExpertStats], width: int = 80) -> str:
    """Two lines for each layer: how often each expert was used, and whether it lies in a slot.

    Args:
        stats: the layers; what nobody counts is left out.
        width: most characters for the experts. Where there are more experts, each place stands for
            several: their largest use, and whether all, some or none lie in a slot.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    lines = []
    for layer in stats:
        rows = []
        if layer.uses is not None:
            rows.append(("use ", _shades(layer.uses, width)))
        if layer.resident is not None:
            rows.append(("slot", _marks(layer.resident, width)))
        if rows:
            lines.append(layer.name)
            lines += [f"  {kind} |{row}|" for kind, row in rows]
    return "\n".join([*lines, LEGEND]) if lines else "no layer counts the use of its experts"


def _shades(uses: np.ndarray[Any, Any], width: int) -> str:
    largest = max(int(uses.max(initial=0)), 1)
    steps = len(SHADES) - 1
    # Rounded up: what was used at all is never shown as unused.
    levels = [-(-int(part.max()) * steps // largest) for part in _parts(uses, width)]
    return "".join(SHADES[level] for level in levels)


def _marks(resident: np.ndarray[Any, Any], width: int) -> str:
    return "".join(
        "■" if part.all() else "□" if part.any() else "·" for part in _parts(resident, width)
    )


def _parts(values: np.ndarray[Any, Any], width: int) -> list[np.ndarray[Any, Any]]:
    """At most ``width`` runs of equal length, but for the last one."""
    length = -(-len(values) // width)
    return [values[i : i + length] for i in range(0, len(values), max(length, 1))]


def _text(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _prefetches(layer: ExpertStats) -> str:
    if layer.prefetches_used is None or layer.prefetches_wasted is None:
        return UNKNOWN
    return f"{layer.prefetches_used} used, {layer.prefetches_wasted} wasted"
