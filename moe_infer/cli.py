"""Command line: ``moe-infer rewrite | budget | lower | inspect | run | ...`` (``--help`` has all).

Exit codes: 0 done, 1 an error (one line on standard error), 2 wrong usage, 3 nothing matched
(``rewrite``), 4 the models differ (``verify``), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import moe_infer
from moe_infer.byte_size import format_bytes
from moe_infer.commands import budget, export, fetch_ahead, plan, simulate, verify
from moe_infer.commands.arguments import (
    PROVIDERS,
    console,
    given_inputs,
    given_shapes,
    given_sizes,
    pair,
)
from moe_infer.graph.explain import explain
from moe_infer.graph.lower_nodes import load_model
from moe_infer.runtime.stats import ExpertStats, text

NOTHING_MATCHED = 3
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (ValueError, TypeError, OSError, ImportError, moe_infer.PluginError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("moe-infer: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # ONNX Runtime's exceptions have no base class of their own.
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return _fail(error)


def _fail(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"'{error.filename2 or error.filename}': {error.strerror}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    print(f"moe-infer: error: {' '.join(lines) or repr(error)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-infer", description="Mixture-of-Experts ONNX models")
    parser.add_argument("--version", action="version", version=f"%(prog)s {moe_infer.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    rewrite = commands.add_parser("rewrite", help="find MoE blocks, insert MoELayer nodes")
    rewrite.add_argument("model", help="an exported ONNX model")
    rewrite.add_argument(
        "out_dir", nargs="?", help="folder for model.onnx and the experts; not with --explain"
    )
    rewrite.add_argument(
        "--explain",
        action="store_true",
        help="write nothing; show for every candidate what matches, or how far the nearest pattern"
        " went, at which node it stopped and why",
    )
    slots = rewrite.add_mutually_exclusive_group()
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
    fetch_ahead.add_option(rewrite)
    rewrite.set_defaults(command=_rewrite)

    budget.add_parser(commands)
    fetch_ahead.add_parser(commands)

    lower = commands.add_parser("lower", help="replace MoELayer nodes by standard operators")
    lower.add_argument("model")
    lower.add_argument("out", help="path of the lowered model")
    lower.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    lower.set_defaults(command=_lower)

    inspect = commands.add_parser("inspect", help="show the MoELayer nodes of a model")
    inspect.add_argument("model")
    inspect.add_argument(
        "--tokens", type=int, metavar="N", help="ask the GPU for the workspace of N tokens too"
    )
    plan.add_options(inspect)
    budget.add_inspect_option(inspect)
    inspect.add_argument("--json", action="store_true", help="for machines")
    inspect.set_defaults(command=_inspect)

    run = commands.add_parser("run", help="run a model on given or random inputs")
    run.add_argument("model")
    run.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE.npy | FILE.npz",
        help="one input, or all that an npz holds",
    )
    run.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,8",
        help="shape of a random input",
    )
    run.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=3",
        help="size of a symbolic dimension; a batch of 2, 5 tokens, a past of 3 by default",
    )
    run.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="NAME=1x1,1x16,1x128",
        help="smallest, usual and largest shape of an input for TensorRT, or three numbers for a"
        " symbolic dimension",
    )
    run.add_argument(
        "--provider",
        choices=sorted(PROVIDERS),
        help="exactly this one; the best there is by default",
    )
    run.add_argument(
        budget.OPTION,
        metavar=budget.METAVAR,
        help="bytes of GPU memory for the experts of all layers; on TensorRT alone",
    )
    run.add_argument("--repeat", type=int, default=1, metavar="N", help="timed runs")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--expert-use", action="store_true", help="show which experts the run used")
    run.add_argument(
        "--layers-only",
        action="store_true",
        help="leave all but the MoELayer nodes to other providers than TensorRT",
    )
    run.add_argument(
        "--stats",
        action="store_true",
        help="show what each layer's experts did: hits, misses, bytes fetched, use and residency",
    )
    run.add_argument(
        "--stats-picture",
        metavar="FILE.png",
        help="draw use and residency, layer by expert (needs matplotlib)",
    )
    run.add_argument("--json", action="store_true", help="for machines")
    run.set_defaults(command=_run)

    verify.add_parser(commands)
    export.add_parser(commands)
    simulate.add_parser(commands)
    return parser


def _rewrite(options: argparse.Namespace) -> int:
    if options.explain:
        if options.out_dir is not None:
            raise ValueError("--explain writes nothing; leave out_dir away")
        explanation = explain(options.model)
        print(explanation)
        return 0 if explanation else NOTHING_MATCHED
    if options.out_dir is None:
        raise ValueError("out_dir is missing: moe-infer rewrite MODEL OUT_DIR")
    report = moe_infer.rewrite(
        options.model,
        options.out_dir,
        max_concurrency=options.max_concurrency,
        gpu_budget=options.gpu_budget,
        fetch_ahead=options.fetch_ahead,
    )
    print(report)
    return 0 if report else NOTHING_MATCHED


def _lower(options: argparse.Namespace) -> int:
    with Console(stderr=True).status("lowering"):
        model = moe_infer.lower(options.model, options.out, PROVIDERS[options.provider])
    fused = sum(node.op_type == "MoE" for node in model.graph.node)
    branches = sum(node.op_type == "If" for node in model.graph.node)
    print(f"{options.out}: {fused} layers by com.microsoft.MoE, {branches} experts by If")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.provider is not None and not options.plan:
        raise ValueError("--provider says where --plan makes its session; give --plan, too")
    if options.plan and options.tokens is not None:
        raise ValueError("--plan makes a session and asks for no workspace; leave --tokens away")
    if options.gpu_budget is not None:
        return budget.inspect(options)
    if options.plan:
        return plan.run(options)
    layers = moe_infer.inspect_model(options.model, tokens=options.tokens)
    if options.json:
        print(json.dumps([dataclasses.asdict(layer) for layer in layers], indent=1))
        return 0
    if not layers:
        print("the model has no MoELayer")
        return 0
    tables = (_layers_table(layers), _memory_table(layers, options.tokens))
    for table in tables:
        console().print(table)
    return 0


def _layers_table(layers: Sequence[Any]) -> Table:
    table = Table("layer", "experts", "router", "sub-layer", "hidden states", "weights", "file")
    for layer in layers:
        shape = "?" if layer.shape is None else ", ".join(str(d or "?") for d in layer.shape)
        table.add_row(
            layer.name,
            f"{layer.experts}, top {layer.top_k}",
            f"{layer.router} by {layer.router_input}" + ", guesses next" * layer.guesses_next,
            f"{layer.sublayer} {layer.d_model} x {layer.hidden_size}"
            + (", biases" if layer.biases else ""),
            f"{layer.dtype} ({shape})",
            f"{layer.weight_dtype}, {layer.weight_format}",
            layer.weight_file,
        )
    return table


def _memory_table(layers: Sequence[Any], tokens: int | None) -> Table:
    unknown = "not asked (--tokens, on a GPU)" if tokens is None else "no GPU to ask"
    table = Table(
        "layer",
        "on disk",
        "host",
        "slots",
        "a slot",
        "GPU: slots",
        "GPU: workspace",
        "in a CUDA graph",
        "on the CPU",
    )
    for column in table.columns[1:7]:
        column.justify = "right"
    for layer in layers:
        workspace = layer.workspace_bytes
        table.add_row(
            layer.name,
            format_bytes(layer.disk_bytes),
            format_bytes(layer.host_bytes),
            str(layer.slots),
            format_bytes(layer.slot_bytes),
            format_bytes(layer.slots_bytes),
            unknown if workspace is None else format_bytes(workspace),
            layer.cuda_graph,
            layer.lowering,
        )
    table.add_section()
    table.add_row(
        "all",
        format_bytes(sum(layer.disk_bytes for layer in layers)),
        format_bytes(sum(layer.host_bytes for layer in layers)),
        str(sum(layer.slots for layer in layers)),
        "",
        format_bytes(sum(layer.slots_bytes for layer in layers)),
    )
    return table


def _run(options: argparse.Namespace) -> int:
    if options.repeat < 1:
        raise ValueError(f"--repeat must be at least 1, got {options.repeat}")
    # Before the session, which may take minutes.
    feeds = _feeds(options)
    ranges = _ranges(options.range) or None
    started = time.perf_counter()
    with Console(stderr=True).status("creating the session"):
        session = moe_infer.InferenceSession(
            options.model,
            providers=None if options.provider is None else [PROVIDERS[options.provider]],
            input_shapes=ranges,
            expert_use=options.expert_use,
            gpu_budget=options.gpu_budget,
            layers_only=options.layers_only,
        )
    creation = time.perf_counter() - started
    names = [output.name for output in session.get_outputs()]
    times = []
    for _ in track(
        range(options.repeat),
        "running",
        console=Console(stderr=True),
        transient=True,
        disable=options.repeat == 1,
    ):
        started = time.perf_counter()
        values = session.run(None, feeds)
        times.append(time.perf_counter() - started)
    record = {
        "model": str(options.model),
        "moe_provider": session.moe_provider,
        "lowered": session.lowered,
        "providers": session.get_providers(),
        "creation_s": creation,
        "run_s": times,
        "inputs": {name: _describe(value) for name, value in feeds.items()},
        "outputs": {name: _describe(value) for name, value in zip(names, values, strict=True)},
    }
    if options.expert_use:
        record["expert_use"] = {use.layer: use.tokens.tolist() for use in session.expert_use}
    wants_stats = options.stats or options.stats_picture is not None
    stats = session.expert_stats() if wants_stats else []
    if options.stats:
        record["expert_stats"] = [layer.to_dict() for layer in stats]
    if options.stats_picture is not None:
        from moe_infer.runtime.stats.picture import save_heat_map

        save_heat_map(stats, options.stats_picture)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        _print_run(record)
        if options.stats:
            _print_stats(stats, session.lowered and not options.expert_use)
    return 0


def _print_stats(stats: Sequence[ExpertStats], uncounted: bool) -> None:
    if not stats:
        print("no layers to show statistics of")
        return
    shown = console()
    shown.print(text.table(stats))
    if uncounted:
        print(
            "the layers are lowered to ONNX Runtime's operators, which have no slots and count"
            " nothing; --expert-use counts which experts the runs used"
        )
    elif any(layer.uses is None for layer in stats):
        print(
            "a layer whose experts all stay on the GPU does not read back which were used;"
            " --expert-use counts that beside it"
        )
    print(text.heat_map(stats, max(shown.width - 10, 16)))


def _print_run(record: dict[str, Any]) -> None:
    provider = record["moe_provider"] or record["providers"][0]
    print(f"provider: {provider}{', lowered' if record['lowered'] else ''}")
    times = sorted(record["run_s"])
    print(
        f"session in {record['creation_s']:.2f} s; {len(times)} runs, median"
        f" {1e3 * times[len(times) // 2]:.2f} ms, fastest {1e3 * times[0]:.2f} ms"
    )
    for kind in ("inputs", "outputs"):
        for name, told in record[kind].items():
            print(f"{kind[:-1]} {name}: {told['dtype']} {tuple(told['shape'])}")
    for layer, tokens in record.get("expert_use", {}).items():
        used = sum(n > 0 for n in tokens)
        print(f"experts of {layer}: {used} of {len(tokens)} used, tokens {tokens}")


def _describe(value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def _ranges(texts: Sequence[str]) -> dict[str, Any]:
    from moe_infer.runtime.profiles import parse_range

    return {name: parse_range(value) for name, value in (pair(t, "--range") for t in texts)}


def _feeds(options: argparse.Namespace) -> dict[str, np.ndarray[Any, Any]]:
    from moe_infer.compare.feeds import make_feeds

    feeds = make_feeds(
        load_model(options.model)[0],
        given=given_inputs(options.input),
        dims=given_sizes(options.dim),
        shapes=given_shapes(options.shape),
        seed=options.seed,
    )
    for name, value in feeds.items():
        if value.dtype.name == "bfloat16":
            raise ValueError(
                f"input '{name}' is bfloat16, which ONNX Runtime does not take as a NumPy array;"
                " moe-infer verify runs such graphs"
            )
    return feeds


if __name__ == "__main__":
    sys.exit(main())
