"""Families of patterns, one file each.

A family is a function ``find(view: GraphView) -> Iterator[Match | NearMiss]``. To add one, write
its file and add it here; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moe_infer.graph.families import fused, grouped, mistakes, split, stacked, unrolled
from moe_infer.graph.match import GraphView, Match, NearMiss

Family = Callable[[GraphView], Iterator[Match | NearMiss]]

FAMILIES: dict[str, Family] = {
    "stacked": stacked.find,
    "grouped": grouped.find,
    "split": split.find,
    "unrolled": unrolled.find,
    "fused": fused.find,
    "mistakes": mistakes.find,
}
