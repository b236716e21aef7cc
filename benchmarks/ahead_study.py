"""Whether fetching the next layer's experts ahead pays, by simulation.

    python -m examples.tiny_moe.corpus            # the text
    python benchmarks/ahead_study.py

What is simulated is said in moe_infer/simulate/ahead.py. Guesses are of two kinds. In generated
traces a guessed score is the true one plus normal noise, as much as gives a stated recall: the part
of the chosen experts that is among as many guesses. In the repository's trained models guesses are
what the next layer's router makes of a layer's hidden states, as in prefetch_study.py. Runs on the
CPU; writes benchmarks/results/ahead_study.json, whose tables stand in docs/fetching-ahead.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prefetch_study
import record_traces
from moe_bench.guesses import best, by_recall, recall

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.tiny_moe import corpus  # noqa: E402
from moe_infer.simulate import COVERAGE, Ahead, Pace, Trace, fetch_ahead  # noqa: E402
from moe_infer.simulate.generate import fitted_weights, token_scores  # noqa: E402

Array = np.ndarray[Any, Any]

BUS = 53.2 * 0.915
"""GB/s: the copy engine's, times what the device's copies reach of it (docs/fetching.md)."""
STOP_BYTES = 8 * 65536
"""Eight blocks copy 64 KiB at a time; all that they may have begun."""
IDLE_US = (25, 50, 100, 200)
RECALLS = (0.60, 0.75, 0.90)
TOKENS, WARM = 300, 120
LONGER = 4
"""Guesses beyond top-k of a longer list."""


@dataclass(frozen=True)
class Shape:
    """A model and what is tried with it.

    Attributes:
        beside_us: of a layer's resident time, what runs before the last byte is needed.
    """

    layers: int
    experts: int
    top_k: int
    expert_bytes: float
    beside_us: float
    coverage: tuple[float, float, float]
    slots: tuple[int, ...]
    most: tuple[int, ...]

    def pace(self, idle_us: float, stop_bytes: float = STOP_BYTES) -> Pace:
        """With the device's copies."""
        return Pace(self.expert_bytes, BUS, idle_us, self.beside_us, stop_bytes)


SHAPES = {
    # 36 us resident, of which `down` and the next routing, 25 us, come after the last byte.
    "Qwen3-30B": Shape(48, 128, 8, 3 * 2048 * 768 * 2, 11, COVERAGE, (13, 32, 64), (1, 2, 4)),
    # 240 us resident, of which `down`, 80 us, comes after; nearly even use of the experts.
    "Mixtral": Shape(32, 8, 2, 3 * 4096 * 14336 * 2, 160, (0.30, 0.56, 0.80), (2, 4), (1, 2)),
}


@dataclass(frozen=True)
class Guessed:
    """A trace and, by name, the experts guessed for it, most likely first."""

    trace: Trace
    guesses: dict[str, Array]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=corpus.DEFAULT_PATH)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "command": "python benchmarks/ahead_study.py",
        "tokens": TOKENS - WARM,
        "bus": BUS,
        "stop_bytes": STOP_BYTES,
        "quality": [],
        "rows": [],
        "ways": [],
    }
    for name, shape in SHAPES.items():
        started = time.perf_counter()
        guessed = generated(shape)
        for row in speeds(shape, guessed):
            record["rows"].append({"model": name, **row})
        record["quality"] += [{"model": name, **row} for row in quality(shape, guessed)]
        record["ways"] += [{"model": name, **row} for row in ways(shape, guessed)]
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    record["recorded"] = list(recorded(options.corpus))
    (options.out / "ahead_study.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


# --- Traces and guesses


def generated(shape: Shape, locality: float = 0.5, tokens: int = TOKENS) -> Guessed:
    """With guesses of every recall in RECALLS."""
    weights = fitted_weights(shape.experts, shape.top_k, shape.coverage)
    scored = token_scores(weights, shape.layers, 1, locality, seed=0)
    scores = np.stack(list(itertools.islice(scored, tokens)), axis=2).astype(np.float32)
    choices = best(scores, shape.top_k)
    names = tuple(str(layer) for layer in range(shape.layers))
    longer = min(shape.top_k + LONGER, shape.experts)
    found = by_recall(scores, shape.top_k, RECALLS, longer)
    guesses = {f"{wanted:.2f}": guess for wanted, guess in found.items()}
    return Guessed(Trace(shape.experts, choices, names), guesses)


# --- What is found


def speeds(shape: Shape, guessed: Guessed) -> Iterator[dict[str, Any]]:
    """Milliseconds a token, without and with guesses, for each number of slots and idle time."""
    for slots, idle in itertools.product(shape.slots, IDLE_US):
        pace = shape.pace(idle)
        without = run(guessed, None, slots, pace, 0)
        row: dict[str, Any] = {
            "slots": slots,
            "idle_us": idle,
            "ms": ms(without),
            "hit_rate": round(without.hit_rate, 4),
        }
        for place, most in itertools.product(("slot", "spare"), shape.most):
            row[f"{place}, {most}"] = {
                name: ms(run(guessed, list_of[..., : shape.top_k], slots, pace, most, place))
                for name, list_of in guessed.guesses.items()
            }
        yield row


def quality(shape: Shape, guessed: Guessed) -> Iterator[dict[str, Any]]:
    """How many of the guesses that are fetched are right; it does not depend on times."""
    for slots, (name, list_of) in itertools.product(shape.slots, guessed.guesses.items()):
        row: dict[str, Any] = {
            "slots": slots,
            "recall": recall(list_of[..., : shape.top_k], guessed.trace.choices),
        }
        for most in shape.most:
            found = run(guessed, list_of[..., : shape.top_k], slots, shape.pace(50), most, "spare")
            row[f"{most}"] = {
                "precision": found.precision,
                "of_misses": float(found.right.sum() / (found.right + found.misses).sum()),
            }
        in_slot = run(guessed, list_of[..., : shape.top_k], slots, shape.pace(50), 1, "slot")
        row["hit_rate"] = {"spare": found.hit_rate, "slot": in_slot.hit_rate}
        row["asked"] = name
        yield row


def ways(shape: Shape, guessed: Guessed, asked: str = "0.75") -> Iterator[dict[str, Any]]:
    """Other ways to do it, one guess at a recall of 75 %: milliseconds by idle time."""
    list_of = guessed.guesses[asked]
    guess = list_of[..., : shape.top_k]
    rng = np.random.default_rng(2)
    chance = best(rng.random((*guess.shape[:3], shape.experts), dtype=np.float32), shape.top_k)
    tried: dict[str, tuple[Array | None, str, bool, float]] = {
        "guess, spare": (guess, "spare", False, STOP_BYTES),
        "guess, spare, nothing comes after the stop": (guess, "spare", False, 0),
        "guess, spare, complete ones stay": (guess, "spare", True, STOP_BYTES),
        f"{LONGER} guesses more than top-k, spare": (list_of, "spare", False, STOP_BYTES),
        "guess, in a slot": (guess, "slot", False, STOP_BYTES),
        "guess, in a slot, complete ones stay": (guess, "slot", True, STOP_BYTES),
        "by chance, spare": (chance, "spare", False, STOP_BYTES),
        "policy's counts, spare": (None, "spare", False, STOP_BYTES),
        "policy's counts, spare, complete ones stay": (None, "spare", True, STOP_BYTES),
        "policy's counts, in a slot": (None, "slot", False, STOP_BYTES),
    }
    for slots in shape.slots:
        without = {
            str(idle): ms(run(guessed, None, slots, shape.pace(idle), 0)) for idle in IDLE_US
        }
        for title, (given, place, keep, stop_bytes) in tried.items():
            row: dict[str, Any] = {"slots": slots, "way": title, "without": without, "ms": {}}
            for idle in IDLE_US:
                pace = shape.pace(idle, stop_bytes)
                found = run(guessed, given, slots, pace, 1, place, keep)
                row["ms"][str(idle)] = ms(found)
            row["precision"] = found.precision  # at the longest idle time, if it depends on it
            yield row


def recorded(text: Path, sequences: int = 16) -> Iterator[dict[str, Any]]:
    """The repository's trained models with their routers' guesses, at the pace of Qwen3-30B."""
    shape = SHAPES["Qwen3-30B"]
    tokens = record_traces.sequences(text, sequences)
    for model in record_traces.MODELS:
        guessed = routers_guesses(
            prefetch_study.run(ROOT / f"examples/tiny_moe/{model}.onnx", tokens)
        )
        guess = guessed.guesses["router"]
        for slots in (2, 4):
            row: dict[str, Any] = {
                "model": model,
                "slots": slots,
                "recall": recall(guess[1:], guessed.trace.choices[1:]),
                "ms": {},
            }
            for idle in IDLE_US:
                pace = shape.pace(idle)
                found = {
                    "without": run(guessed, None, slots, pace, 0),
                    "spare": run(guessed, guess, slots, pace, 1, "spare"),
                    "slot": run(guessed, guess, slots, pace, 1, "slot"),
                    "counts": run(guessed, None, slots, pace, 1, "spare"),
                }
                row["ms"][str(idle)] = {name: ms(value) for name, value in found.items()}
            row["precision"] = {name: value.precision for name, value in found.items()}
            row["hit_rate"] = {name: value.hit_rate for name, value in found.items()}
            yield row


def routers_guesses(sequences: list[list[prefetch_study.Layer]]) -> Guessed:
    """Each layer's router on the hidden states of the layer before; of the first, its own."""
    choices, guesses = [], []
    for layers in sequences:
        top_k = layers[0].top_k
        before = [layers[0], *layers[:-1]]
        choices.append([layer.chosen for layer in layers])
        guesses.append(
            [
                best(last.hidden @ layer.router, top_k)
                for last, layer in zip(before, layers, strict=True)
            ]
        )
    order = (1, 0, 2, 3)
    names = tuple(layer.name for layer in sequences[0])
    experts = sequences[0][0].router.shape[1]
    trace = Trace(experts, np.array(choices).transpose(order), names)
    return Guessed(trace, {"router": np.array(guesses).transpose(order)})


def run(
    guessed: Guessed,
    guess: Array | None,
    slots: int,
    pace: Pace,
    most: int,
    place: str = "spare",
    keep: bool = False,
) -> Ahead:
    """Without the runs in which the slots fill."""
    spare = place == "spare"
    return fetch_ahead(guessed.trace, guess, slots, pace, most, spare, keep).after(WARM)


def ms(found: Ahead) -> float:
    """A token's milliseconds."""
    return round(found.us_per_run * 1e-3, 4)


if __name__ == "__main__":
    sys.exit(main())
