"""Part B: the MoE layers of a decoder, with slots for a part of the experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_bench import check
from moe_bench.inputs import InputSet
from moe_bench.streaming import predicted, traces
from moe_bench.streaming.chain import Bound, Chain, Counters, open_bound
from moe_bench.streaming.context import Context, Points
from moe_bench.streaming.files import weight_files
from moe_bench.streaming.shapes import (
    DECODER,
    DECODER_BUDGETS,
    DECODER_FILES,
    DECODER_LAYERS,
    DECODER_TOKENS,
    LOCALITY,
    expert_bytes,
    slots_of,
)
from moe_bench.streaming.steps import against_floor, time_steps, times
from moe_bench.weights import TORCH_DTYPES, Experts

DTYPE = "bfloat16"
STEPS = {1: (64, 64), 8: (8, 12), 64: (2, 4), 4096: (1, 3)}
"""By tokens a step: steps before the time counts, and those that count at most."""
FEWEST = 2
SEED = 7
"""Of the choices."""


@dataclass(frozen=True)
class Steps:
    """Inputs of the steps.

    Attributes:
        x: (tokens, d_model), the same in all steps and layers.
        chosen: (steps, layers, tokens, top_k).
        logits: (steps, layers, tokens, experts).
        warm_up: steps before the time counts.
        guesses: as logits, what each layer's are guessed to be; None: nothing is guessed.
    """

    x: torch.Tensor
    chosen: torch.Tensor
    logits: torch.Tensor
    warm_up: int
    guesses: torch.Tensor | None = None


def points(context: Context) -> Points:
    """All points, the one with a target first."""
    with opened(context) as (experts, files, all_):
        made: dict[tuple[int, str], tuple[Steps, Bound, float]] = {}
        for tokens, percent, routing in in_order():
            if (tokens, routing) not in made:
                made.clear()
                torch.cuda.empty_cache()
                steps = make_steps(tokens, routing, context.device)
                resident = open_bound(all_, steps.x, steps.logits[0])
                check_resident(resident, steps, experts)
                made[tokens, routing] = (steps, resident, resident_time(resident, steps))
            steps, resident, resident_ms = made[tokens, routing]
            slots = slots_of(DECODER, percent)
            for mode in context.modes if slots < DECODER.experts else ("host",):
                run = Run(files, slots, mode, steps, resident, resident_ms)
                fields = run.about("B", percent, routing)
                yield context.measure(fields, lambda s, r=run: r.measure(s, context.bus))


@contextlib.contextmanager
def opened(context: Context) -> Iterator[tuple[list[Experts], list[Path], Chain]]:
    """Weights, their files, and layers with all experts resident."""
    case = DECODER
    with weight_files(context.folder, case, DTYPE, DECODER_FILES, context.device) as experts:
        files = [own.path for own in experts]
        with (
            Chain(case, DTYPE, files, DECODER_FILES, case.top_k),  # keeps the files pinned
            Chain(case, DTYPE, files, DECODER_LAYERS, case.experts) as all_,
        ):
            yield experts, files, all_


def in_order() -> list[tuple[int, int, str]]:
    """(tokens, budget in percent, routing); points on the same inputs stand together."""
    first, *others = DECODER_TOKENS
    found = [(first, percent, "skewed") for percent in DECODER_BUDGETS]
    found.append((first, DECODER_BUDGETS[0], "all hits"))
    return found + [(t, percent, "skewed") for t in others for percent in DECODER_BUDGETS]


def make_steps(tokens: int, routing: str, device: str) -> Steps:
    """A trace, or choices among no more experts than the first budget has slots for."""
    case = DECODER
    warm_up, count = STEPS[tokens]
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn((tokens, case.d_model), device=device, generator=generator)
    if routing == "all hits":
        held = slots_of(case, DECODER_BUDGETS[0])
        chosen = traces.few(case, DECODER_LAYERS, warm_up + count, held, SEED, device)
    else:
        count += warm_up
        chosen = traces.skewed(case, DECODER_LAYERS, count, tokens, LOCALITY, SEED, device)
    logits = traces.logits_of(chosen, case, DTYPE)
    return Steps(x.to(TORCH_DTYPES[DTYPE]), chosen, logits, warm_up)


def all_miss_bytes(steps: Steps) -> float:
    """Bytes of the experts that a step needs, averaged over those that count."""
    needed = traces.needed(steps.chosen[steps.warm_up :], DECODER.experts)
    return float(needed.sum((1, 2)).double().mean()) * expert_bytes(DECODER, DTYPE)


def check_resident(resident: Bound, steps: Steps, experts: list[Experts]) -> None:
    """Compares the first layers, one for each weight file, with float64.

    Raises:
        WrongResultError: a result is not the layer's.
    """
    resident.poison()
    resident.step(steps.logits[0])
    for i, own in enumerate(experts):
        chosen = steps.chosen[0, i]
        given = InputSet(steps.x, steps.logits[0, i], chosen, len(chosen.unique()))
        error = check.compare(resident.outputs[i], check.expect(DECODER, own, given), DTYPE)
        check.judge(error, DTYPE, peer=False)


def resident_time(resident: Bound, steps: Steps) -> float:
    """Milliseconds of a step with all experts resident, in a CUDA graph."""
    count = len(steps.logits)
    found = time_steps(lambda i: resident.step(steps.logits[i % count]), 40, 1.0, 3)
    return float(times(found[1:], alike=True)["ms"])


@dataclass(frozen=True)
class Timed:
    """Steps that were timed.

    Attributes:
        ms: of each.
        counted: meanwhile.
        first: their first one's number.
    """

    ms: list[float]
    counted: Counters
    first: int


@dataclass(frozen=True)
class Run:
    """One way to run the steps.

    Attributes:
        pause: cycles after each layer, for the resident layers too.
    """

    files: list[Path]
    slots: int
    mode: str
    steps: Steps
    resident: Bound
    resident_ms: float
    pause: int = 0

    def about(self, part: str, percent: int, routing: str) -> dict[str, Any]:
        """Fields that say what a point is about."""
        return {
            "part": part,
            "case": DECODER.name,
            "dtype": DTYPE,
            "layers": DECODER_LAYERS,
            "tokens": len(self.steps.x),
            "slots": self.slots,
            "percent": percent,
            "routing": routing,
            "state": "warm",
            "mode": self.mode,
            "coverage": traces.coverage(self.steps.chosen, DECODER.experts),
            "all_miss_bytes": all_miss_bytes(self.steps),
        }

    def measure(self, seconds: float, bus: float) -> dict[str, Any]:
        """What is found in about so many seconds."""
        return self.told(self.timed(seconds), bus)

    def timed(self, seconds: float) -> Timed:
        """Steps before, then those that count; the last ones' results must be the resident's."""
        steps, guesses = self.steps, self.steps.guesses
        with Chain(DECODER, DTYPE, self.files, DECODER_LAYERS, self.slots, self.mode) as chain:
            bound = open_bound(chain, steps.x, steps.logits[0], guesses is not None, self.pause)

            def step(i: int) -> None:
                bound.step(steps.logits[i], guesses=None if guesses is None else guesses[i])

            bound.poison()
            for i in range(bound.ran, max(steps.warm_up, bound.ran + 1)):
                step(i)
            self._check(bound, bound.ran - 1)
            before = chain.counters()
            bound.poison()
            first = bound.ran
            most = len(steps.logits) - first
            found = time_steps(lambda i: step(first + i), most, seconds, FEWEST)
            counted = chain.counters() - before
            self._check(bound, bound.ran - 1)
        return Timed(found, counted, first)

    def told(self, timed: Timed, bus: float) -> dict[str, Any]:
        """Fields of the point; of the bus only what was needed counts."""
        steps, found, counted = self.steps, timed.ms, timed.counted
        told = times(found, alike=False)
        floor = against_floor(told["ms"], counted.bytes_needed / len(found), bus, self.resident_ms)
        rates = {}
        if self.slots < DECODER.experts:
            needed = traces.needed(steps.chosen[: timed.first + len(found)], DECODER.experts)
            rates = predicted.hit_rates(needed, self.slots, timed.first)
        return {
            **told,
            **floor,
            "ms_a_token": told["ms"] / len(steps.x),
            "over_resident": told["ms"] / self.resident_ms,
            "hit_rate": counted.hit_rate,
            **rates,
        }

    def _check(self, bound: Bound, step: int) -> None:
        self.resident.step(self.steps.logits[step])
        bound.must_equal(self.resident)


def planned(modes: int) -> int:
    """Number of points."""
    return sum(1 if percent == 100 else modes for _, percent, _ in in_order())
