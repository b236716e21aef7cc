"""Experts whose weights are stacked in one tensor for each projection, (experts, rows, columns).

Two forms, and what lies between them:

* gathered: the weights of the chosen experts are gathered for every (token, expert) pair,
  multiplied (MatMul or Einsum), weighted and summed over the pair's ``k``. This is what batched_mm
  of transformers and most hand-written inference code become.
* dense: every expert is computed on every token and weighted by a one-hot mask or a scatter.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_infer.graph.match import GraphView, Match, NearMiss
from moe_infer.graph.routing import RoutingInterpreter
from moe_infer.graph.search import search

NAME = "stacked"


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every block, or how far it went, in the order of the graph."""
    return search(view, NAME, RoutingInterpreter, basic=True)
