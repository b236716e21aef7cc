"""Hit rates of the library's policies, of others, and of Belady's optimum, on the same traces.

    python benchmarks/policy_study.py             # needs the library; no GPU; a few minutes

Writes benchmarks/results/policy_study.json, policy_study.png (with matplotlib) and the tables of
docs/scheduling.md (with tools/make_docs.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.policies.informed import informed_hit_rate, trace_and_noise
from benchmarks.policies.others import OTHERS, hit_rate, hits
from moe_infer.simulate import OPTIMUM, Calls, Trace, compare, generate, optimal_hits, replay
from moe_infer.simulate.generate import COVERAGE, NOISE, fitted_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
OURS = ("lru", "lfu:128", "halved:32", "halved:128", "halved:512", "halved:4096")
BUDGETS = (0.125, 0.25, 0.5)
LAYERS, TOKENS = 2, 2000


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", help="one trace")
    options = parser.parse_args()
    rows = []
    for name, make in TRACES.items():
        if options.only not in (None, name):
            continue
        started = time.perf_counter()
        caches = make()
        for budget in BUDGETS:
            experts = caches[0].expert_count
            slots = max(round(budget * experts), 1)
            rates = {policy: rate(caches, slots, policy) for policy in (*OURS, *OTHERS, OPTIMUM)}
            rows.append({"trace": name, "experts": experts, "slots": slots, "hit_rate": rates})
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    record = {
        "command": "python benchmarks/policy_study.py",
        "layers": LAYERS,
        "tokens": TOKENS,
        "circle": circles(),
        "informed": informed(),
        "shared": shared(),
        "rows": rows,
    }
    path = options.out / "policy_study.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.out / "policy_study.png")
    return 0


# --- Traces


def together(trace: Trace, batch: int = 1, prefill: int = 0) -> list[Calls]:
    """The calls of each layer."""
    return [trace.calls(layer, batch, prefill) for layer in range(len(trace.layers))]


def drifting() -> list[Calls]:
    """Every 250 tokens an eighth of the experts change places with others."""
    trace = generate(128, 8, LAYERS, TOKENS, locality=0.5)
    rng = np.random.default_rng(9)
    choices = trace.choices.copy()
    names = np.arange(128)
    for begin in range(0, TOKENS, 250):
        chosen = rng.choice(128, 16, replace=False)
        names[chosen] = names[np.roll(chosen, 1)]
        choices[:, :, begin : begin + 250] = names[trace.choices[:, :, begin : begin + 250]]
    return together(Trace(128, choices, trace.layers))


def kept_or_new() -> list[Calls]:
    """An expert's noise stays from one token to the next, or is drawn anew: half of the time each.

    Neighbouring tokens have as many experts in common as with a locality of about 0.75.
    """
    weights = fitted_weights(128, 8, COVERAGE)
    caches = []
    for layer in range(LAYERS):
        rng = np.random.default_rng(layer)
        noise = rng.standard_normal(128)
        choices = np.empty((1, 1, TOKENS, 8), np.uint8)
        for token in range(TOKENS):
            choices[0, 0, token] = np.argpartition(-(weights + NOISE * noise), 7)[:8]
            noise = np.where(rng.random(128) < 0.5, noise, rng.standard_normal(128))
        caches += together(Trace(128, choices, ("",)))
    return caches


def recorded(name: str) -> list[Calls]:
    """Real text; 4 layers, 64 sequences of 256 tokens."""
    return together(Trace.load(ROOT / f"benchmarks/traces/{name}.npz"))


TRACES: dict[str, Callable[[], list[Calls]]] = {
    "128 experts, top 8, locality 0": lambda: together(generate(128, 8, LAYERS, TOKENS)),
    "128 experts, top 8, locality 0.5": lambda: together(
        generate(128, 8, LAYERS, TOKENS, locality=0.5)
    ),
    "128 experts, top 8, locality 0.9": lambda: together(
        generate(128, 8, LAYERS, TOKENS, locality=0.9)
    ),
    "128 experts, top 8, noise stays or is new": kept_or_new,
    "256 experts, top 8, locality 0.5": lambda: together(
        generate(256, 8, LAYERS, TOKENS, locality=0.5)
    ),
    "128 experts, top 8, hot experts change": drifting,
    "128 experts, top 8, batch of 8": lambda: together(
        generate(128, 8, LAYERS, TOKENS // 4, 8, locality=0.5), batch=8
    ),
    "128 experts, top 8, prompts of 512, then 128 tokens": lambda: together(
        generate(128, 8, LAYERS, 640, 10, locality=0.5), prefill=512
    ),
    "example t5_top1, 8 experts, real text": lambda: recorded("t5_top1"),
    "example gated_top2, 8 experts, real text": lambda: recorded("gated_top2"),
}


# --- Policies


def rate(caches: list[Calls], slots: int, policy: str) -> float:
    """Hits over needed experts, of all layers."""
    if policy in OTHERS:
        found = [hit_rate(calls, slots, policy) for calls in caches]
    elif policy == OPTIMUM:
        found = [float(optimal_hits(calls, slots).sum()) / calls.offsets[-1] for calls in caches]
    else:
        found = [
            replay(calls.offsets, calls.experts, calls.expert_count, slots, policy).hit_rate
            for calls in caches
        ]
    weights = [int(calls.offsets[-1]) for calls in caches]
    return round(float(np.average(found, weights=weights)), 4)


def circles() -> dict[str, dict[str, float]]:
    """Misses of a round over experts that are needed one after another, after 30 rounds."""
    found: dict[str, dict[str, float]] = {}
    for experts, slots in ((20, 16), (20, 4), (128, 32)):
        rounds = 60
        order = np.tile(np.arange(experts, dtype=np.int32), rounds)
        offsets = np.arange(len(order) + 1)
        calls = Calls(experts, offsets, order, np.ones(len(order), np.int64))
        second = slice(experts * (rounds // 2), None)
        cell = found[f"{experts} experts, {slots} slots"] = {}
        for policy in (*OURS, *OTHERS, OPTIMUM):
            if policy in OTHERS:
                hit = hits(calls, slots, OTHERS[policy](slots))
            elif policy == OPTIMUM:
                hit = optimal_hits(calls, slots)
            else:
                hit = replay(offsets, order, experts, slots, policy).hits
            cell[policy] = round(float((1 - hit[second]).sum()) / (rounds - rounds // 2), 2)
    return found


def informed() -> dict[str, dict[str, float]]:
    """Hit rates of 32 slots for 128 experts, by locality, beside what can be expected at best."""
    found = {}
    for locality in (0.0, 0.5, 0.8, 0.9, 0.97):
        calls, weights, noise = trace_and_noise(128, 8, TOKENS, locality, 1)
        cell = {policy: rate([calls], 32, policy) for policy in (*OURS, "count and recency")}
        cell["informed"] = round(informed_hit_rate(calls, weights, noise, locality, 32), 4)
        cell[OPTIMUM] = rate([calls], 32, OPTIMUM)
        found[f"{locality:g}"] = cell
    return found


def shared() -> dict[str, dict[str, float]]:
    """Hit rates of 8 layers of 64 experts, 16 slots each, or 128 for all together.

    A layer's call is a call of the shared cache, so the same memory is a half-life 8 times as long.
    """
    even = (0.30, 0.56, 0.80)
    found = {}
    for locality in (0.0, 0.5):
        alike = generate(64, 4, 8, 1000, locality=locality)
        skewed = generate(64, 4, 4, 1000, locality=locality).choices
        flat = generate(64, 4, 4, 1000, locality=locality, coverage=even, seed=5).choices
        mixed = np.stack([skewed, flat], axis=1).reshape(alike.choices.shape)
        for name, trace in (
            ("all layers skewed alike", alike),
            ("every other layer nearly even", Trace(64, mixed, alike.layers)),
        ):
            cell = found[f"{name}, locality {locality:g}"] = {}
            for title, policy, together in (
                ("apart, halved:128", "halved:128", False),
                ("shared, halved:1024", "halved:1024", True),
                ("apart, belady", OPTIMUM, False),
                ("shared, belady", OPTIMUM, True),
            ):
                (point,) = compare(trace, [16], [policy], shared=together)
                cell[title] = round(point.hit_rate, 4)
    return found


# --- The picture


def draw(record: dict[str, Any], path: Path) -> None:
    """Hit rates at 25 % by trace; skipped without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record["rows"] if row["slots"] == round(0.25 * row["experts"])]
    figure, axis = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    for i, policy in enumerate((*OURS, *OTHERS, OPTIMUM)):
        rates = [100 * row["hit_rate"][policy] for row in rows]
        marker = "*" if policy == OPTIMUM else "o" if policy in OURS else "x"
        colour = "black" if policy == OPTIMUM else f"C{i}"
        axis.plot(rates, range(len(rows)), marker, color=colour, label=policy)
    axis.set_yticks(range(len(rows)), [row["trace"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="hit rate in %, slots for 25 % of the experts")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
