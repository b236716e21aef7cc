"""Part F: part B's decoder, each layer of which is told a guess of what the next one needs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from moe_bench.guesses import by_recall
from moe_bench.streaming import decoder, traces
from moe_bench.streaming.chain import open_bound
from moe_bench.streaming.context import Context, Points
from moe_bench.streaming.decoder import Run, Steps
from moe_bench.streaming.shapes import (
    AHEAD_BUDGETS,
    AHEAD_PAUSES_US,
    AHEAD_RECALLS,
    DECODER,
    DECODER_LAYERS,
    LOCALITY,
    slots_of,
)
from moe_bench.timing import cycles_a_us


def points(context: Context) -> Points:
    """All points; those without guesses first, as the others are compared with them."""
    steps = decoder.make_steps(1, "skewed", context.device)
    told = guesses(steps)
    with decoder.opened(context) as (experts, files, all_):
        cycles = cycles_a_us()
        for pause_us in AHEAD_PAUSES_US:
            pause = round(pause_us * cycles)
            resident = open_bound(all_, steps.x, steps.logits[0], pause=pause)
            decoder.check_resident(resident, steps, experts)
            resident_ms = decoder.resident_time(resident, steps)
            for percent in AHEAD_BUDGETS:
                slots = slots_of(DECODER, percent)
                without = None
                for recall, guessed in told.items():
                    given = replace(steps, guesses=guessed)
                    run = Run(files, slots, "host", given, resident, resident_ms, pause)
                    fields = {
                        **run.about("F", percent, "skewed"),
                        "recall": recall,
                        "pause_us": pause_us,
                        "pause_cycles": pause,
                    }
                    point = context.measure(
                        fields, lambda _, r=run, w=without: measure(r, w, context.bus)
                    )
                    if recall is None:
                        without = point.get("ms")
                    yield point


def guesses(steps: Steps) -> dict[float | None, torch.Tensor | None]:
    """By recall, logits of every step: part B's trace again, its scores with noise.

    First, for a recall of None, none.
    """
    case = DECODER
    scores = traces.scores(case, DECODER_LAYERS, len(steps.logits), LOCALITY, decoder.SEED)
    found: dict[float | None, torch.Tensor | None] = {None: None}
    for recall, guess in by_recall(scores, case.top_k, AHEAD_RECALLS, case.top_k).items():
        chosen = torch.from_numpy(guess).permute(2, 0, 1, 3).to(steps.chosen)
        found[recall] = traces.logits_of(chosen, case, decoder.DTYPE)
    return found


def measure(run: Run, without: float | None, bus: float) -> dict[str, Any]:
    """Takes all steps, however little time there is: points are compared with each other.

    Args:
        run: what is measured.
        without: milliseconds without guesses; None: not known, or these.
        bus: bytes a second.
    """
    timed = run.timed(math.inf)
    told = run.told(timed, bus)
    names = (
        "bytes_fetched",
        "prefetches_used",
        "prefetches_wasted",
        "prefetch_bytes_used",
        "prefetch_bytes_wasted",
    )
    a_run = {name: getattr(timed.counted, name) / len(timed.ms) for name in names}
    return {**told, "gain": without and without / told["ms"], **a_run}


def planned(_: int) -> int:
    """Number of points, whatever the modes: the host fetches ahead."""
    return len(AHEAD_PAUSES_US) * len(AHEAD_BUDGETS) * (1 + len(AHEAD_RECALLS))
