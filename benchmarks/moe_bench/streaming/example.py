"""Part A: InfMoE's own example, one layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_bench import check
from moe_bench.check import WrongResultError
from moe_bench.inputs import InputSet
from moe_bench.routing import choose, make_sets
from moe_bench.streaming import traces
from moe_bench.streaming.chain import Bound, Chain, open_bound
from moe_bench.streaming.context import Context, Points
from moe_bench.streaming.files import weight_files
from moe_bench.streaming.shapes import (
    EXAMPLE,
    EXAMPLE_SKEWED_TOKENS,
    EXAMPLE_SLOTS,
    EXAMPLE_TOKENS,
    LOCALITY,
    expert_bytes,
)
from moe_bench.streaming.steps import against_floor, time_steps, times
from moe_bench.weights import TORCH_DTYPES, Experts

COLD_SAMPLES = 5
# The sample before has just given back gigabytes of GPU memory, which the driver clears for a while
# beside whatever runs; a layer in use has had no such neighbour.
SETTLE_S = 0.1
WARM_RUNS = 16


@dataclass(frozen=True)
class Calls:
    """Inputs of repeated calls.

    Attributes:
        x: (tokens, d_model), the same in all.
        chosen: (calls, tokens, top_k).
        logits: (calls, 1, tokens, experts).
        routing: "uniform" or "skewed".
    """

    x: torch.Tensor
    chosen: torch.Tensor
    logits: torch.Tensor
    routing: str

    @property
    def needed(self) -> float:
        """Experts that a call needs, averaged."""
        return float(
            traces.needed(self.chosen[:, None], self.logits.shape[-1]).sum(-1).float().mean()
        )


def points(context: Context, dtype: str, name: str) -> Points:
    """All points in one type; ``name`` is the part's."""
    case = EXAMPLE
    with weight_files(context.folder, case, dtype, 1, context.device) as (experts,):
        path = experts.path
        with (
            Chain(case, dtype, [path], 1, case.top_k),  # holds the file in pinned memory
            Chain(case, dtype, [path], 1, case.experts) as all_,
        ):
            for tokens, routing in calls_in_order():
                calls = make_calls(dtype, tokens, routing, context.device)
                resident = open_bound(all_, calls.x, calls.logits[0])
                resident_ms = measure_resident(resident, calls, experts, dtype)
                for slots in EXAMPLE_SLOTS:
                    for mode in context.modes:
                        for state in ("warm", "cold"):
                            fields = {
                                "part": name,
                                "case": case.name,
                                "dtype": dtype,
                                "layers": 1,
                                "tokens": tokens,
                                "slots": slots,
                                "routing": routing,
                                "state": state,
                                "mode": mode,
                                "all_miss_bytes": calls.needed * expert_bytes(case, dtype),
                            }
                            run = Run(path, dtype, slots, mode, calls, resident)
                            work = run.warm if state == "warm" else run.cold
                            yield context.measure(
                                fields,
                                lambda s, w=work, r=resident_ms: finish(w(s), context.bus, r),
                            )
                del resident, calls
                torch.cuda.empty_cache()


def calls_in_order() -> list[tuple[int, str]]:
    """(tokens, routing), the point with a target first."""
    first, *rest = EXAMPLE_TOKENS
    return [
        (first, "uniform"),
        (EXAMPLE_SKEWED_TOKENS, "skewed"),
        *((tokens, "uniform") for tokens in rest),
    ]


def make_calls(dtype: str, tokens: int, routing: str, device: str) -> Calls:
    """Few calls of many tokens, more of few."""
    case, kind = EXAMPLE, TORCH_DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn((tokens, case.d_model), device=device, generator=generator).to(kind)
    if routing == "skewed":
        chosen = traces.skewed(case, 1, 24, tokens, LOCALITY, seed=5, device=device)[:, 0]
        logits = traces.logits_of(chosen, case, dtype)
    else:
        count = 3 if tokens <= 4096 else 1
        sets = make_sets("uniform", count, tokens, case.experts, case.top_k, seed=5)
        logits = torch.stack([torch.from_numpy(s).to(device, kind) for s in sets])
        chosen = torch.stack([torch.from_numpy(choose(s, case.top_k)).to(device) for s in sets])
    return Calls(x, chosen, logits[:, None], routing)


def measure_resident(resident: Bound, calls: Calls, experts: Experts, dtype: str) -> float:
    """Milliseconds of a call with all experts resident; its results are compared with float64.

    Raises:
        WrongResultError: a result is not the layer's; the text says of which calls.
    """
    for chosen, logits in zip(calls.chosen[:3], calls.logits[:3], strict=True):
        given = InputSet(calls.x, logits[0], chosen, len(chosen.unique()))
        expected = check.expect(EXAMPLE, experts, given)
        resident.poison()
        resident.step(logits)
        error = check.compare(resident.outputs[0], expected, dtype)
        try:
            check.judge(error, dtype, peer=False)
        except WrongResultError as wrong:  # it ends the part, so no point says what it was about
            raise WrongResultError(f"{len(calls.x)} tokens, {calls.routing}: {wrong}") from wrong
    found = time_steps(lambda i: resident.step(calls.logits[i % len(calls.logits)]), 20, 1.0, 3)
    return float(times(found, alike=True)["ms"])


@dataclass(frozen=True)
class Run:
    """One way to run the calls."""

    path: Path
    dtype: str
    slots: int
    mode: str
    calls: Calls
    resident: Bound

    def cold(self, seconds: float) -> dict[str, Any]:
        """Every call on a layer that was just made, in whose slots nothing lies.

        Where a CUDA graph has to be captured first, the run before it brings one expert in.
        """
        found: list[float] = []
        fetched = 0
        begin_logits = traces.logits_of(
            torch.zeros_like(self.calls.chosen[:1]), EXAMPLE, self.dtype
        )
        for sample in range(1 + COLD_SAMPLES):
            if sample > 2 and sum(found) > 1e3 * seconds:
                break
            with self._chain() as chain:
                bound = open_bound(chain, self.calls.x, begin_logits)
                time.sleep(SETTLE_S)
                before = chain.counters()
                bound.poison()
                (ms,) = time_steps(lambda _, b=bound: b.step(self.calls.logits[0]), 1, 0, 1)
                bytes_fetched = (chain.counters() - before).bytes_fetched
                self._check(bound, 0)
                if sample:  # the first one loads kernels
                    found.append(ms)
                    fetched += bytes_fetched
        return times(found, alike=True) | {"bytes": fetched / len(found), "hit_rate": None}

    def warm(self, seconds: float) -> dict[str, Any]:
        """Calls one after the other on one layer that has seen the last of them."""
        count = len(self.calls.logits)
        with self._chain() as chain:
            bound = open_bound(chain, self.calls.x, self.calls.logits[0])
            for logits in self.calls.logits[-8:].repeat(1 if count > 1 else 2, 1, 1, 1):
                bound.step(logits)
            before = chain.counters()
            bound.poison()
            most = max(WARM_RUNS, count)
            found = time_steps(
                lambda i: bound.step(self.calls.logits[i % count]), most, seconds, min(count, 3)
            )
            counted = chain.counters() - before
            self._check(bound, (len(found) - 1) % count)
        return times(found, alike=False) | {
            "bytes": counted.bytes_fetched / len(found),
            "hit_rate": counted.hit_rate,
        }

    def _chain(self) -> Chain:
        return Chain(EXAMPLE, self.dtype, [self.path], 1, self.slots, self.mode)

    def _check(self, bound: Bound, call: int) -> None:
        self.resident.step(self.calls.logits[call])
        bound.must_equal(self.resident)


def finish(found: dict[str, Any], bus: float, resident_ms: float) -> dict[str, Any]:
    """Puts the floor beside a time."""
    moved = found.pop("bytes")
    return found | against_floor(found["ms"], moved, bus, resident_ms)


def planned(modes: int) -> int:
    """Number of points."""
    return len(calls_in_order()) * len(EXAMPLE_SLOTS) * modes * 2
