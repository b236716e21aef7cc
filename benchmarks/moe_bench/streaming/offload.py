"""Part C: four Mixtral layers and one token, beside accelerate's cpu_offload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_bench import check
from moe_bench.inputs import InputSet
from moe_bench.peers.peer import UnavailableError
from moe_bench.streaming import traces
from moe_bench.streaming.chain import Bound, Chain, open_bound
from moe_bench.streaming.context import Context, Points
from moe_bench.streaming.files import weight_files
from moe_bench.streaming.shapes import (
    MIXTRAL,
    MIXTRAL_LAYERS,
    MIXTRAL_SLOTS,
    expert_bytes,
)
from moe_bench.streaming.steps import against_floor, time_steps, times
from moe_bench.weights import TORCH_DTYPES, Experts

DTYPE = "bfloat16"
STATES = ("cold", "warm")
STEPS = 24
PEERS = ("transformers", "accelerate")


@dataclass(frozen=True)
class Tokens:
    """One token a step, which every layer gets; all layers have the same router.

    Attributes:
        gate: (experts, d_model), the router's weight.
        x: (steps, 1, d_model).
        logits: (steps, layers, 1, experts), what the router makes of x.
        chosen: (steps, 1, top_k); no step chooses an expert of the step before it.
    """

    gate: torch.Tensor
    x: torch.Tensor
    logits: torch.Tensor
    chosen: torch.Tensor


def points(context: Context) -> Points:
    """Ours cold and warm, then the peers."""
    case = MIXTRAL
    with weight_files(context.folder, case, DTYPE, MIXTRAL_LAYERS, context.device) as experts:
        files = [own.path for own in experts]
        tokens = make_tokens(context.device)
        fields = {
            "part": "C",
            "case": case.name,
            "dtype": DTYPE,
            "layers": MIXTRAL_LAYERS,
            "tokens": 1,
            "slots": MIXTRAL_SLOTS,
            "routing": "changing",
        }
        moved = MIXTRAL_LAYERS * case.top_k * expert_bytes(case, DTYPE)
        with (
            Chain(case, DTYPE, files, MIXTRAL_LAYERS, case.top_k),  # keeps the files pinned
            Chain(case, DTYPE, files, MIXTRAL_LAYERS, case.experts) as all_,
        ):
            resident = open_bound(all_, tokens.x[0].clone(), tokens.logits[0])
            check_resident(resident, tokens, experts)
            found = time_steps(lambda i: resident.step(*step_of(tokens, i)), 40, 1.0, 3)
            resident_ms = float(times(found[1:], alike=True)["ms"])
            for mode, state in in_order(context.modes):
                if state == "peer":
                    yield context.measure(
                        {**fields, "slots": None, "state": state, "mode": mode},
                        lambda s, n=mode: measure_peer(n, tokens, experts, s, context.device),
                    )
                    continue
                run = Run(files, mode, tokens, resident, resident_ms)
                yield context.measure(
                    {**fields, "state": state, "mode": mode, "all_miss_bytes": moved},
                    lambda s, r=run, t=state: r.measure(t, s, context.bus),
                )


def in_order(modes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(mode, state): what the targets compare first, then the other modes."""
    first, *others = modes
    return [
        *((first, state) for state in STATES),
        *((peer, "peer") for peer in PEERS),
        *((mode, state) for mode in others for state in STATES),
    ]


def make_tokens(device: str) -> Tokens:
    """Tokens that the router sends where ``traces.changing`` says."""
    case, kind = MIXTRAL, TORCH_DTYPES[DTYPE]
    generator = torch.Generator(device).manual_seed(3)
    raw = torch.randn((case.d_model, case.experts), device=device, generator=generator)
    rows = torch.linalg.qr(raw).Q.T  # orthonormal: what a token has along them are its logits
    chosen = traces.changing(case, 1, STEPS, 3, device)[:, 0]
    wanted = traces.logits_of(chosen, case, "float32")
    noise = torch.randn((STEPS, 1, case.d_model), device=device, generator=generator)
    x = (noise + (wanted - noise @ rows.T) @ rows).to(kind)
    gate = rows.to(kind)
    logits = x @ gate.T
    if not torch.equal(logits.topk(case.top_k, dim=-1).indices, chosen):
        raise RuntimeError("rounding changed what the tokens choose")
    return Tokens(gate, x, logits[:, None].expand(-1, MIXTRAL_LAYERS, -1, -1).contiguous(), chosen)


def step_of(tokens: Tokens, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states of a step."""
    return tokens.logits[i % STEPS], tokens.x[i % STEPS]


def check_resident(resident: Bound, tokens: Tokens, experts: list[Experts]) -> None:
    """Compares all layers with float64, on two steps.

    Raises:
        WrongResultError: a result is not the layer's.
    """
    for step in (0, 1):
        resident.poison()
        resident.step(*step_of(tokens, step))
        for output, expected in zip(resident.outputs, expect(tokens, experts, step), strict=True):
            check.judge(check.compare(output, expected, DTYPE), DTYPE, peer=False)


def expect(tokens: Tokens, experts: list[Experts], step: int) -> list[check.Expected]:
    """Every layer's output in float64."""
    logits, x = step_of(tokens, step)
    given = InputSet(x, logits[0], tokens.chosen[step], MIXTRAL.top_k)
    return [check.expect(MIXTRAL, own, given) for own in experts]


@dataclass(frozen=True)
class Run:
    """One way to run the four layers."""

    files: list[Path]
    mode: str
    tokens: Tokens
    resident: Bound
    resident_ms: float

    def measure(self, state: str, seconds: float, bus: float) -> dict[str, Any]:
        """Cold: every step needs other experts. Warm: the same step again and again."""
        first = 2 if state == "cold" else 0

        def inputs(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return step_of(self.tokens, first + i if state == "cold" else 0)

        with Chain(MIXTRAL, DTYPE, self.files, MIXTRAL_LAYERS, MIXTRAL_SLOTS, self.mode) as chain:
            x = self.tokens.x[0].clone()  # each step's is copied into it
            bound = open_bound(chain, x, self.tokens.logits[0])
            for step in range(2):
                bound.step(*step_of(self.tokens, step if state == "cold" else 0))
            before = chain.counters()
            bound.poison()
            found = time_steps(lambda i: bound.step(*inputs(i)), 60, seconds, 3)
            counted = chain.counters() - before
            self.resident.step(*inputs(len(found) - 1))
            bound.must_equal(self.resident)
        told = times(found, alike=True)
        floor = against_floor(told["ms"], counted.bytes_fetched / len(found), bus, self.resident_ms)
        return {**told, **floor, "hit_rate": counted.hit_rate}


def measure_peer(
    name: str, tokens: Tokens, experts: list[Experts], seconds: float, device: str
) -> dict[str, Any]:
    """The MoE blocks of transformers, resident or moved by accelerate; the same tokens.

    Raises:
        UnavailableError: a package is not installed.
    """
    from moe_bench.streaming import blocks

    try:
        made = blocks.make(MIXTRAL, tokens.gate, experts)
        layers = blocks.offload(made, device) if name == "accelerate" else made
        version = blocks.version(name)
    except ImportError as error:
        raise UnavailableError(f"{name}: {error}") from error
    outputs: list[torch.Tensor] = []

    def step(i: int) -> None:
        x = step_of(tokens, i)[1][None]
        outputs[:] = [layer(x).view(1, -1) for layer in layers]

    note = run_and_check(step, outputs, tokens, experts)
    found = time_steps(step, 20, min(seconds, 8.0), 2)
    run_and_check(step, outputs, tokens, experts)
    return {**times(found, alike=True), "note": "; ".join(filter(None, (version, note)))}


def run_and_check(
    step: Callable[[int], None],
    outputs: list[torch.Tensor],
    tokens: Tokens,
    experts: list[Experts],
) -> str:
    """Runs step 1, compares all layers with float64; a note, "" if there is nothing to say.

    Raises:
        WrongResultError: a result is not the layer's.
    """
    step(1)
    notes = [
        check.judge(check.compare(output, expected, DTYPE), DTYPE, peer=True)
        for output, expected in zip(outputs, expect(tokens, experts, 1), strict=True)
    ]
    return max(notes)


def planned(modes: int) -> int:
    """Number of points."""
    return modes * len(STATES) + len(PEERS)
