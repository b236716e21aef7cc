"""``moe-infer export MODEL_DIR OUT_DIR``."""

from __future__ import annotations

import argparse
from typing import Any

from moe_infer.commands import budget, fetch_ahead


def add_parser(commands: Any) -> None:
    """Adds the command's options."""
    export = commands.add_parser(
        "export", help="export a local transformers model with MoELayer nodes"
    )
    export.add_argument("model_dir", help="folder with config.json and weights; nothing is fetched")
    export.add_argument("out_dir", help="folder for model.onnx, the experts and the tokenizer")
    export.add_argument(
        "--insert",
        action="store_true",
        help="put the layers in before the export, for models too large for two copies",
    )
    export.add_argument(
        "--no-cache", action="store_true", help="a graph without key/value inputs and outputs"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the graph; as the weights are stored by default",
    )
    slots = export.add_mutually_exclusive_group()
    slots.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="most experts of a layer on the GPU at once; all of them by default",
    )
    slots.add_argument(
        budget.OPTION,
        metavar=budget.METAVAR,
        help="bytes of GPU memory for the experts of all layers, split into slots",
    )
    fetch_ahead.add_option(export)
    export.add_argument(
        "--check", action="store_true", help="run the graph on the CPU and compare with PyTorch"
    )
    export.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Exports and prints the report."""
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"export needs PyTorch ({error}); pip install 'moe-infer[torch]' 'transformers>=5'"
        ) from error
    from moe_infer.torch.pretrained import export_pretrained

    report = export_pretrained(
        options.model_dir,
        options.out_dir,
        insert=options.insert,
        cached=not options.no_cache,
        dtype=options.dtype,
        max_concurrency=options.max_concurrency,
        gpu_budget=options.gpu_budget,
        fetch_ahead=options.fetch_ahead,
        check=options.check,
    )
    print(report)
    return 0
