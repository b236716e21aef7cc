"""``moe-infer verify ORIGINAL REWRITTEN``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from moe_infer.commands.arguments import (
    PROVIDERS,
    console,
    given_inputs,
    given_shapes,
    given_sizes,
)

DIFFERENT = 4
"""Exit code when something is outside the tolerance."""


def add_parser(commands: Any) -> None:
    """Adds the command's options."""
    verify = commands.add_parser(
        "verify", help="run a model and its rewrite on the same inputs and compare them"
    )
    verify.add_argument("original", help="the model as it was exported")
    verify.add_argument("rewritten", help="what `moe-infer rewrite` made of it")
    verify.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE.npy | FILE.npz",
        help="one input, or all that an npz holds; the others are random",
    )
    verify.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=3",
        help="size of a symbolic dimension; a batch of 2, 5 tokens, a past of 3 by default",
    )
    verify.add_argument(
        "--shape", action="append", default=[], metavar="NAME=1,8", help="shape of a random input"
    )
    verify.add_argument("--seed", type=int, default=0, help="of the random inputs")
    verify.add_argument("--atol", type=float, help="largest absolute difference")
    verify.add_argument("--rtol", type=float, help="allowed share of the original's value")
    for name, what in (("provider", "rewritten"), ("original-provider", "original")):
        verify.add_argument(
            f"--{name}", choices=sorted(PROVIDERS), help=f"runs the {what} model, exactly this one"
        )
    verify.add_argument("--json", action="store_true", help="for machines")
    verify.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Verifies and prints a table."""
    from moe_infer.compare.verify import verify

    report = verify(
        options.original,
        options.rewritten,
        inputs=given_inputs(options.input),
        dims=given_sizes(options.dim),
        shapes=given_shapes(options.shape),
        seed=options.seed,
        atol=options.atol,
        rtol=options.rtol,
        providers=_providers(options.provider),
        original_providers=_providers(options.original_provider),
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _print(report)
    return 0 if report else DIFFERENT


def _providers(name: str | None) -> list[str] | None:
    return None if name is None else [PROVIDERS[name]]


def _print(report: Any) -> None:
    print(f"original on {report.providers[0]}, rewritten on {report.providers[1]}")
    for name, (kind, shape) in report.inputs.items():
        print(f"input {name}: {kind} {shape}")
    table = Table("", "value", "shape", "largest difference", "mean", "of values up to", "outside")
    for column in table.columns[3:]:
        column.justify = "right"
    for layer in report.layers:
        if layer.difference is None:
            table.add_row(layer.node, layer.reason)
        else:
            table.add_row(layer.node, *_cells(layer.difference))
    table.add_section()
    for difference in report.outputs:
        table.add_row("output", *_cells(difference))
    console().print(table)
    print(str(report).splitlines()[-1])


def _cells(difference: Any) -> tuple[str, ...]:
    if difference.problem:
        return difference.name, str(difference.shape), difference.problem
    return (
        difference.name,
        str(difference.shape),
        f"{difference.largest:.3g}",
        f"{difference.mean:.3g}",
        f"{difference.scale:.3g}",
        str(difference.outside),
    )
