"""What the families find in a graph, told once for each place where a MoE block may begin."""

from __future__ import annotations

from collections.abc import Iterable

from moe_infer.graph.families import FAMILIES
from moe_infer.graph.match import GraphView, Match, NearMiss, describe


def candidates(view: GraphView) -> list[Match | NearMiss]:
    """For each anchor the match, or the near miss that went furthest; in the graph's order."""
    found: dict[str, Match | NearMiss] = {}
    for family in FAMILIES.values():
        for candidate in family(view):
            before = found.get(candidate.anchor)
            if before is None or _better(candidate, before):
                found[candidate.anchor] = candidate
    order = {describe(node): i for i, node in enumerate(view.nodes)}
    return sorted(found.values(), key=lambda c: order.get(c.anchor, -1))


def _better(new: Match | NearMiss, old: Match | NearMiss) -> bool:
    if isinstance(old, Match):
        return False
    # A later family reads all that an earlier one does, and more.
    if isinstance(new, Match) or new.wrong_export != old.wrong_export:
        return isinstance(new, Match) or new.wrong_export
    return new.stage >= old.stage


def outside(
    misses: Iterable[NearMiss], view: GraphView, regions: Iterable[Iterable[int]]
) -> list[NearMiss]:
    """Near misses that do not begin inside a block that was found, the furthest first.

    Args:
        misses: of :func:`candidates`.
        view: the graph.
        regions: positions of the nodes of each block.
    """
    inside = {describe(view.nodes[i]) for region in regions for i in region}
    return sorted((m for m in misses if m.anchor not in inside), key=lambda m: -m.stage)
