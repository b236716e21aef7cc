"""``moe-infer inspect --plan``: which provider runs which nodes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from moe_infer.commands.arguments import PROVIDERS, console

_MOST_OPERATORS = 12
_MOST_NODES = 20
_TENSORRT = PROVIDERS["tensorrt"]


def add_options(inspect: argparse.ArgumentParser) -> None:
    """Adds the options to ``inspect``."""
    inspect.add_argument(
        "--plan", action="store_true", help="make a session and show which provider runs what"
    )
    inspect.add_argument(
        "--provider",
        choices=sorted(PROVIDERS),
        help="with --plan: this one, and the CPU for what it cannot run; the best by default",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    from moe_infer.runtime.plan import plan

    names = None
    if options.provider is not None:
        names = list(dict.fromkeys([PROVIDERS[options.provider], PROVIDERS["cpu"]]))
    told = plan(options.model, names)
    if options.json:
        print(json.dumps(told.to_dict(), indent=1))
        return 0
    table = Table("provider", "nodes", "parts", "operators")
    for part in told.parts:
        # Those of other domains first: they are few, and the ones that are asked about.
        ordered = sorted(part.operators.items(), key=lambda i: ("." not in i[0], -i[1]))
        shown = [f"{n} {op}" for op, n in ordered[:_MOST_OPERATORS]]
        more = ["..."] if len(part.operators) > _MOST_OPERATORS else []
        table.add_row(
            part.provider, str(len(part.nodes)), str(part.parts), ", ".join([*shown, *more])
        )
    console().print(table)
    lowered = ", lowered to standard operators" if told.lowered else ""
    for layer, providers in told.layers.items():
        print(f"{layer}: {', '.join(providers) or 'nowhere'}{lowered}")
    _print_outside(told)
    return 0


def _print_outside(told: Any) -> None:
    """The nodes that cut the graph, where TensorRT takes part."""
    if all(part.provider != _TENSORRT for part in told.parts):
        return
    outside = [(n, p.provider) for p in told.parts if p.provider != _TENSORRT for n in p.nodes]
    for node, provider in outside[:_MOST_NODES]:
        print(f"not on TensorRT: {node} ({provider})")
    if len(outside) > _MOST_NODES:
        print(f"and {len(outside) - _MOST_NODES} more (--json has all)")
