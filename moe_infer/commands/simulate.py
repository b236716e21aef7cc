"""``moe-infer simulate``: hit rates and times of an expert cache on a trace."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from moe_infer.byte_size import parse_bytes
from moe_infer.commands.arguments import console, given_inputs, pair

_GENERATED = {
    "experts": ("expert_count", int),
    "top_k": ("top_k", int),
    "layers": ("layers", int),
    "tokens": ("tokens", int),
    "sequences": ("sequences", int),
    "locality": ("locality", float),
    "seed": ("seed", int),
}
_REQUIRED = ("experts", "top_k", "layers", "tokens")


def add_parser(commands: Any) -> None:
    """Adds the command's options."""
    simulate = commands.add_parser(
        "simulate",
        help="replay a routing trace: hit rates of policies and budgets, and times; no GPU needed",
    )
    simulate.add_argument("trace", nargs="?", metavar="TRACE.npz", help="as --save writes it")
    simulate.add_argument(
        "--generate",
        metavar="experts=128,top_k=8,layers=4,tokens=1000",
        help="make the trace; also sequences=1, locality=0 (correlation of neighbouring tokens, to"
        " below 1) and seed=0",
    )
    simulate.add_argument(
        "--record",
        metavar="MODEL",
        help="record the trace: run a model with MoELayer nodes on the CPU, once for each row of"
        " --input",
    )
    simulate.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE.npy | FILE.npz",
        help="with --record: inputs whose first dimension is the sequences'",
    )
    simulate.add_argument("--save", metavar="TRACE.npz", help="keep the trace")
    simulate.add_argument(
        "--slots",
        default="10%,25%,50%",
        metavar="16,25%",
        help="slots of each layer, as a number or as a part of its experts",
    )
    simulate.add_argument(
        "--policy",
        action="append",
        metavar="lru | lfu:128 | ... | belady",
        help="may be given several times; belady is the optimum. By default lru, lfu, halved, and"
        " belady",
    )
    simulate.add_argument("--batch", type=int, default=1, help="sequences in a call")
    simulate.add_argument("--prefill", type=int, default=0, help="tokens of a prompt")
    simulate.add_argument("--shared", action="store_true", help="all layers share all slots")
    times = simulate.add_argument_group("times, estimated when --expert-bytes is given")
    times.add_argument("--expert-bytes", metavar="9M", help="of one expert")
    times.add_argument("--bus", type=float, default=55.5, metavar="GB/S", help="host to device")
    times.add_argument("--other-us", type=float, default=0.0, help="a layer without its experts")
    times.add_argument("--expert-us", type=float, default=0.0, help="one expert, once it is there")
    times.add_argument("--fetch-us", type=float, default=0.0, help="a fetch beside its bytes")
    simulate.add_argument("--plot", metavar="FILE.png", help="draw hit rates (needs matplotlib)")
    simulate.add_argument("--json", action="store_true", help="for machines")
    simulate.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Simulates and prints a table."""
    from moe_infer.simulate import OPTIMUM, Machine, compare

    if sum(given is not None for given in (options.trace, options.generate, options.record)) != 1:
        raise ValueError("give one of TRACE.npz, --generate and --record")
    if options.input and options.record is None:
        raise ValueError("--input is for --record MODEL; leave it away")
    machine = None
    if options.expert_bytes is not None:
        machine = Machine(
            parse_bytes(options.expert_bytes, "--expert-bytes"),
            options.bus,
            options.other_us,
            options.expert_us,
            options.fetch_us,
        )
    trace = _trace(options)
    if options.save is not None:
        trace.save(options.save)  # first: to record another one may take long
    points = compare(
        trace,
        _slots(options.slots, trace.expert_count),
        options.policy or ["lru", "lfu", "halved", OPTIMUM],
        options.batch,
        options.prefill,
        machine,
        options.shared,
    )
    if options.plot is not None:
        from moe_infer.simulate.plot import draw

        experts = trace.expert_count * (len(trace.layers) if options.shared else 1)
        draw({trace.source[:60] or "trace": (experts, points)}, options.plot)
    if options.json:
        told = {
            "source": trace.source,
            "expert_count": trace.expert_count,
            "layers": list(trace.layers),
            "top_k": trace.top_k,
            "sequences": trace.sequences,
            "tokens": trace.tokens,
            "batch": options.batch,
            "prefill": options.prefill,
            "machine": None if machine is None else vars(machine),
            "points": [point.to_dict() for point in points],
        }
        print(json.dumps(told, indent=1))
    else:
        print(trace.source)
        console().print(_table(points, trace, options.prefill > 0))
    return 0


def _trace(options: argparse.Namespace) -> Any:
    from moe_infer.compare.feeds import check_given
    from moe_infer.graph.lower_nodes import load_model
    from moe_infer.simulate import Trace, generate, record

    if options.generate is not None:
        return generate(**_generated(options.generate))
    if options.trace is not None:
        return Trace.load(options.trace)
    inputs = given_inputs(options.input)
    lengths = {name: len(value) if value.ndim else 0 for name, value in inputs.items()}
    if not inputs or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            "--record needs inputs with the same number of sequences in their first dimension, got"
            f" {lengths or 'no --input'}"
        )
    inputs = check_given(load_model(options.record)[0], inputs)
    runs = (
        {name: value[i : i + 1] for name, value in inputs.items()}
        for i in range(next(iter(lengths.values())))
    )
    return record(options.record, runs, f"recorded: {options.record}")


def _table(points: Sequence[Any], trace: Any, prefill: bool) -> Table:
    timed = points[0].ms_per_token is not None
    table = Table("slots", "policy", "hit rate", "misses a token")
    if prefill:
        table.add_column("hit rate without prompts")
    if timed:
        table.add_column("ms a token")
        table.add_column("floor")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    last = points[0].slots
    for point in points:
        if point.slots != last:
            table.add_section()
        last = point.slots
        cells = [
            f"{point.slots} of {trace.expert_count * (len(trace.layers) if point.shared else 1)}",
            point.policy,
            f"{100 * point.hit_rate:.1f} %",
            f"{point.misses / point.tokens:.2f}",
        ]
        if prefill:
            cells.append(f"{100 * point.decode_hit_rate:.1f} %")
        if timed:
            cells += [f"{point.ms_per_token:.3f}", f"{point.floor_ms_per_token:.3f}"]
        table.add_row(*cells)
    return table


def _generated(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in text.split(","):
        name, value = pair(entry, "--generate")
        if name not in _GENERATED:
            raise ValueError(f"--generate knows {', '.join(_GENERATED)}, got '{name}' in '{text}'")
        argument, kind = _GENERATED[name]
        try:
            found[argument] = kind(value)
        except ValueError:
            raise ValueError(f"--generate {name} must be a number, got '{value}'") from None
    missing = [name for name in _REQUIRED if _GENERATED[name][0] not in found]
    if missing:
        raise ValueError(f"--generate lacks {', '.join(missing)}, got '{text}'")
    return found


def _slots(text: str, experts: int) -> list[int]:
    found = []
    for entry in text.split(","):
        if not re.fullmatch(r"\d{1,9}|\d{1,2}(\.\d+)?%|100%", entry.strip()):
            raise ValueError(f"--slots must be numbers or parts such as 25%, got '{entry}'")
        entry = entry.strip()
        part = round(float(entry[:-1]) / 100 * experts) if entry.endswith("%") else int(entry)
        found.append(max(part, 1) if entry.endswith("%") else part)
    return found
