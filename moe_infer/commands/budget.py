"""``moe-infer budget`` and ``inspect --gpu-budget``: what a budget of GPU memory holds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

import moe_infer
from moe_infer.budget import Budget, split_budget
from moe_infer.byte_size import format_bytes
from moe_infer.commands.arguments import console

OPTION = "--gpu-budget"
METAVAR = "8G"


def add_parser(commands: Any) -> None:
    """Adds the command ``budget``."""
    budget = commands.add_parser(
        "budget", help="write a copy of a model whose layers have the slots of a GPU budget"
    )
    budget.add_argument("model", help="with MoELayer nodes")
    budget.add_argument(
        OPTION, required=True, metavar=METAVAR, help="bytes for the experts of all layers"
    )
    budget.add_argument(
        "-o", "--out", required=True, help="path of the result; may be the model itself"
    )
    budget.add_argument("--json", action="store_true", help="for machines")
    budget.set_defaults(command=run)


def add_inspect_option(inspect: argparse.ArgumentParser) -> None:
    """Adds ``--gpu-budget`` to ``inspect``."""
    inspect.add_argument(
        OPTION,
        metavar=METAVAR,
        help="show what so many bytes for the experts of all layers hold; writes nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Writes the model and shows what the budget holds."""
    budget = moe_infer.set_gpu_budget(options.model, options.gpu_budget, options.out)
    show(budget, options.json)
    if not options.json:
        print(f"model: {options.out}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Shows what the budget holds.

    Raises:
        ValueError: another option asks for something else.
    """
    if options.plan or options.tokens is not None:
        raise ValueError(f"{OPTION} shows slots alone; leave --plan and --tokens away")
    layers = moe_infer.inspect_model(options.model)
    show(split_budget(options.gpu_budget, layers, OPTION), options.json)
    return 0


def show(budget: Budget, as_json: bool) -> None:
    """Prints a table, or JSON."""
    if as_json:
        print(json.dumps(budget.to_dict(), indent=1))
        return
    if not budget.layers:
        print("the model has no MoELayer")
        return
    console().print(_table(budget))
    print(
        f"budget {_both(budget.given)}; the least that works: {_both(budget.least)}; all experts:"
        f" {_both(budget.whole)}"
    )
    print("it is for slots alone: workspace comes on top (inspect --tokens, on a GPU)")


def _table(budget: Budget) -> Table:
    table = Table("layer", "experts", "top k", "a slot", "slots", "GPU: slots", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in budget.layers:
        table.add_row(
            layer.name,
            str(layer.experts),
            str(layer.top_k),
            format_bytes(layer.slot_bytes),
            str(layer.slots) if layer.slot_bytes else "none needed",
            format_bytes(layer.nbytes),
            f"{100 * layer.share:.1f} %",
        )
    table.add_section()
    table.add_row(
        "all",
        str(budget.experts),
        "",
        "",
        str(budget.slots),
        format_bytes(budget.nbytes),
        f"{100 * budget.share:.1f} %",
    )
    return table


def _both(nbytes: int) -> str:
    return f"{nbytes} ({format_bytes(nbytes)})"
