"""Writes the generated parts of the documentation: `python tools/make_docs.py [--check]`.

The operator's tables come from moe_infer/op, the tables of measurements from the JSON files in
benchmarks/results/, the table of models from docs/models.json, which tools/make_models.py writes.
A generated part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; everything else
in the files is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ahead_tables  # noqa: E402
import prefetch_study  # noqa: E402
from moe_bench import cases, report  # noqa: E402
from moe_bench.report import markdown_table  # noqa: E402
from moe_bench.streaming import report as streaming_report  # noqa: E402
from policies import tables  # noqa: E402

from moe_infer import op  # noqa: E402

FILES = (
    "README.md",
    "docs/operator.md",
    "docs/models.md",
    "docs/scheduling.md",
    "docs/fetching.md",
    "docs/fetching-ahead.md",
    "docs/kernels.md",
)
RESIDENT_COLUMNS = (
    "bare_graph",
    "trt_graph",
    "trt_share",
    "ort_moe_graph",
    "ort_moe_share",
    "torch",
    "module",
)


def inputs() -> str:
    """Inputs and output of the operator."""
    types = ", ".join(op.DTYPES)
    rows = [
        ("input 0", "`hidden_states`", f"{types}; (batch, seq, d_model) or (tokens, d_model)"),
        (
            "input 1, optional",
            "`router_logits`",
            "type of input 0 or float32; (..., expert_count); without it the layer computes"
            " hidden_states @ `expert_centroids`",
        ),
        (
            "input 2, optional",
            "`next_router_logits`",
            "type of input 0 or float32; (..., expert_count of the next MoELayer); only with input"
            " 1. A hint that changes no output: what the next layer's router gives for these"
            " hidden_states",
        ),
        ("output 0", "", "type and shape of input 0"),
    ]
    return markdown_table(("", "name", "type and shape"), rows)


def attributes() -> str:
    """The operator's attributes."""
    rows = []
    for a in op.ATTRIBUTES:
        default = "required" if a.required else "" if a.default is None else f"`{a.default!r}`"
        rows.append((f"`{a.name}`", a.kind, default, a.meaning))
    return markdown_table(("attribute", "type", "default", "meaning"), rows)


def routers() -> str:
    """The values of `moe_variant`."""
    rows = [(f"`{r.name}`", r.meaning) for r in op.ROUTERS.values()]
    return markdown_table(("`moe_variant`", "how a token finds its experts"), rows)


def sublayers() -> str:
    """The sub-layers."""
    rows = []
    for s in op.SUBLAYERS.values():
        names = ", ".join(f"`{t.name}`" for t in s.tensors) or "none"
        if s.biases:
            names += f"; biases {', '.join(f'`{t.name}`' for t in s.biases)}"
        rows.append((f"`{s.name}`", s.meaning, names))
    return markdown_table(("sub-layer", "output for input x", "tensors"), rows)


def tensors() -> str:
    """What a weight file holds, for each set of sub-layers that have the same tensors."""
    users: dict[tuple[op.ExpertTensor, ...], list[str]] = {}
    for s in op.SUBLAYERS.values():
        for held in (s.tensors, s.biases):
            if held:
                users.setdefault(held, []).append(f"`{s.name}`")
    rows = []
    for held, names in users.items():
        stacked, parts = [], []
        for t in held:
            packed: list[str] = list(t.part_shape)
            if len(t.parts) > 1:
                packed[0] = f"{len(t.parts)} * {packed[0]}"
            stacked.append(f"`{t.name}` (expert_count, {', '.join(packed)})")
            parts += [f"`e/{p}` ({', '.join(t.part_shape)})" for p in t.parts]
        biases = any(t.name.endswith("_bias") for t in held)
        who = ", ".join(names) + (", with `expert_bias` 1 also" if biases else "")
        rows.append((who, "<br>".join(stacked), "<br>".join(parts)))
    return markdown_table(("sub-layers", "stacked", "or, for each expert e"), rows)


def sublayer_example() -> str:
    """The whole sub-layer of docs/sub-layers.md, which a test compiles."""
    page = (ROOT / "docs/sub-layers.md").read_text()
    blocks = re.findall(r"```cpp\n.*?```", page, flags=re.DOTALL)
    if len(blocks) != 1:
        raise ValueError(f"docs/sub-layers.md must hold one C++ block, found {len(blocks)}")
    return str(blocks[0])


def resident_table(path: Path = ROOT / "benchmarks/results/resident.json") -> str:
    """Times of a layer with all experts in GPU memory, uniform routing."""
    if not path.exists():
        return "Not measured yet; `python benchmarks/resident.py` does."
    record = json.loads(path.read_text())
    shown = [g for g in report.groups(record["points"]) if g[2] == "uniform"]
    if any(dtype == "bfloat16" for _, dtype, _, _ in shown):
        shown = [g for g in shown if g[1] == "bfloat16"]  # the other type is in the file
    parts = [all_measured_on(record, [point for *_, points in shown for point in points])]
    for case, dtype, _, points in shown:
        parts.append(f"{cases.CASES[case].title}, {dtype}:")
        parts.append(report.points_table(points, RESIDENT_COLUMNS))
    return "\n\n".join(parts)


def all_measured_on(record: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """A sentence about a table: cards, days and commits of its points."""
    runs = [record["runs"][i] for i in sorted({point["run"] for point in points})]
    cards = ", ".join(sorted({run["card"] for run in runs}))
    dates = ", ".join(sorted({run["date"][:10] for run in runs}))
    commits = ", ".join(sorted({str(run["commit"] or "unknown")[:12] for run in runs}))
    return f"Milliseconds for one run; {cards}, {dates}, commit {commits}."


def resident_claims(path: Path = ROOT / "benchmarks/results/resident.json") -> str:
    """What these times are to show, as far as they were measured."""
    if not path.exists():
        return "Not measured yet; `python benchmarks/resident.py` does."
    summary = json.loads(path.read_text())["summary"]
    return report.claims_table([line for line in summary if line["points"]])


def streaming_table(path: Path = ROOT / "benchmarks/results/streaming.json") -> str:
    """Times of layers whose experts do not all fit; what could not run is in the file."""
    if not path.exists():
        return "Not measured yet; `python benchmarks/streaming.py` does."
    record = json.loads(path.read_text())
    parts = ["Milliseconds for one run or step."]
    for part, title in streaming_report.TITLES.items():
        if part == "F":
            continue  # ahead_measured
        points = [p for p in record["points"] if p["part"] == part and "ms" in p]
        if points:
            parts += [
                f"{title}; {measured_on(record, points)}:",
                streaming_report.table(points),
            ]
    return "\n\n".join(parts)


def measured_on(record: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """Card, day and commit of the points' run; of several, with the modes that each measured."""
    modes: dict[str, dict[str, None]] = {}
    for point in points:
        run = record["runs"][point["run"]]
        told = f"{run['card']}, {run['date'][:10]}, commit {str(run['commit'])[:12]}"
        modes.setdefault(told, {})[point["mode"]] = None
    if len(modes) == 1:
        return next(iter(modes))
    return "; ".join(f"{', '.join(of)}: {told}" for told, of in modes.items())


def ahead_measured(path: Path = ROOT / "benchmarks/results/streaming.json") -> str:
    """What fetching ahead gave."""
    record = json.loads(path.read_text()) if path.exists() else {"points": []}
    points = [p for p in record["points"] if p["part"] == "F" and "ms" in p]
    if not points:
        return "Not measured yet; `python benchmarks/streaming.py --parts F` does."
    title = f"{streaming_report.TITLES['F']}; {measured_on(record, points)}:"
    return f"{title}\n\n{streaming_report.table(points)}"


def streaming_in_short(path: Path = ROOT / "benchmarks/results/streaming.json") -> str:
    """What a user wants to know of it: a decoder's token by slots, and the peer."""
    if not path.exists():
        return "Not measured yet; `python benchmarks/streaming.py` does."
    record = json.loads(path.read_text())
    whole = cases.CASES["qwen3"].experts
    timed = [p for p in record["points"] if "ms" in p]
    decoder = [p for p in timed if p["part"] == "B" and p["tokens"] == 1 and p["slots"] < whole]
    # What a user gets: the host is what auto takes or avoids.
    decoder = [p for p in decoder if p["mode"] != "host"]
    decoder.sort(key=lambda p: (p["routing"] != "all hits", -p["slots"], p["mode"]))
    rows, shown = [], []
    for p in decoder + [p for p in timed if p["part"] == "C"]:
        if p["part"] == "B":
            who = f"48 layers of 128 experts, top 8, 2048 x 768; slots for {p['slots']}"
        elif p["part"] == "C" and p["state"] == "cold":
            who = f"4 layers of 8 experts, top 2, 4096 x 14336; slots for {p['slots']}, no hits"
        elif p["part"] == "C" and p["mode"] == "accelerate":
            who = "the same 4 layers"
        else:
            continue
        by = {
            "auto": "moe-infer",
            "host": "moe-infer",
            "device": "moe-infer, in a CUDA graph",
        }.get(p["mode"], p["mode"])
        hits = streaming_report.percent(p.get("hit_rate"))
        rows.append((who, by, report.number(p["ms"]), report.number(p.get("floor_ms")), hits))
        shown.append(p)
    table = markdown_table(
        ("MoE layers, bfloat16, one token", "by", "ms", "floor", "experts hit"), rows
    )
    return f"{all_measured_on(record, shown)}\n\n{table}"


def models() -> str:
    """What becomes of real models' exports, as tests/test_models.py found it."""
    rows = []
    for entry in json.loads((ROOT / "docs/models.json").read_text()):
        family, exporter, version = (entry[n] for n in ("family", "exporter", "transformers"))
        if entry["refusal"]:
            result = ("refused: " + entry["refusal"].replace("|", "\\|"), "")
        else:
            result = (str(entry["blocks"]), f"{entry['difference']:.0e}")
        rows.append((family, exporter, version, *result))
    header = ("model", "exporter", "transformers", "MoE blocks found", "largest difference")
    return markdown_table(header, rows)


def policy_study(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table of what benchmarks/policy_study.py found."""
    path = ROOT / "benchmarks/results/policy_study.json"
    return lambda: make(json.loads(path.read_text()))


def guesses() -> str:
    """How well experts can be guessed a layer ahead."""
    path = ROOT / "benchmarks/results/prefetch_study.json"
    return prefetch_study.table(json.loads(path.read_text())["pairs"])


def ahead(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table of what benchmarks/ahead_study.py found."""
    path = ROOT / "benchmarks/results/ahead_study.json"
    return lambda: make(json.loads(path.read_text()))


PARTS: dict[str, Callable[[], str]] = {
    "inputs": inputs,
    "attributes": attributes,
    "routers": routers,
    "sublayers": sublayers,
    "tensors": tensors,
    "sublayer_example": sublayer_example,
    "models": models,
    "resident": resident_table,
    "resident_claims": resident_claims,
    "streaming": streaming_table,
    "streaming_in_short": streaming_in_short,
    "ahead_measured": ahead_measured,
    "policies": policy_study(tables.by_trace),
    "budgets": policy_study(tables.by_budget),
    "circles": policy_study(tables.circles),
    "informed": policy_study(tables.informed),
    "shared": policy_study(tables.shared),
    "guesses": guesses,
    "ahead_spare": ahead(lambda r: ahead_tables.speeds(r, "Qwen3-30B", "spare")),
    "ahead_slot": ahead(lambda r: ahead_tables.speeds(r, "Qwen3-30B", "slot")),
    "ahead_mixtral_spare": ahead(lambda r: ahead_tables.speeds(r, "Mixtral", "spare")),
    "ahead_mixtral_slot": ahead(lambda r: ahead_tables.speeds(r, "Mixtral", "slot")),
    "ahead_quality": ahead(ahead_tables.quality),
    "ahead_ways": ahead(lambda r: ahead_tables.ways(r, "Qwen3-30B")),
    "ahead_recorded": ahead(ahead_tables.recorded),
}


def fill(text: str) -> str:
    """`text` with every generated part made anew.

    Raises:
        KeyError: a part that this program does not know.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end: {name} -->"

    pattern = r"<!-- generated: (\w+) -->\n.*?<!-- end: \1 -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL)  # a function: its text is literal


def main() -> int:
    """Rewrites the files, or with --check says which ones are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail when out of date"
    )
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        path = ROOT / name
        old = path.read_text()
        new = fill(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run `python tools/make_docs.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
