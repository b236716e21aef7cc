"""``moe-infer fetch-ahead MODEL -o OUT``."""

from __future__ import annotations

import argparse
from typing import Any

import moe_infer

OPTION = "--fetch-ahead"
HELP = "let each layer guess the next one's experts, for layers that stream"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "fetch-ahead", help="write a copy of a model whose layers guess the next one's experts"
    )
    parser.add_argument("model", help="with MoELayer nodes")
    parser.add_argument("--off", action="store_true", help="remove the guesses instead")
    parser.add_argument(
        "-o", "--out", required=True, help="path of the result; may be the model itself"
    )
    parser.set_defaults(command=run)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--fetch-ahead`` to a command that makes a model."""
    parser.add_argument(OPTION, action="store_true", help=HELP)


def run(options: argparse.Namespace) -> int:
    """Writes the model and shows which layers guess."""
    report = moe_infer.set_fetch_ahead(options.model, not options.off, options.out)
    print("fetching ahead: off" if options.off else report)
    print(f"model: {options.out}")
    return 0
