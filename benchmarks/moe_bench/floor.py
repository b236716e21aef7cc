"""How fast a layer could be: the larger of what it must read and what it must compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_bench.cases import (
    TARGET_CARD,
    TARGET_DENSE,
    TARGET_MS,
    TARGET_READ,
    TRITON_MS,
    Case,
)


@dataclass(frozen=True)
class Rates:
    """What the chip was measured to do.

    Attributes:
        read: bytes a second from device memory.
        dense: operations a second of a dense 8192^3 product, by type.
        sustained: the same after a second of nothing else, when the clock has come down to what
            the power allows.
    """

    read: float
    dense: Mapping[str, float]
    sustained: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a time reaches its target.

    Attributes:
        met: it does.
        basis: "ms" on the card for which targets are given, "time / floor" on others.
        value: what was measured, on that basis.
        limit: what it may be at most.
    """

    met: bool
    basis: str
    value: float
    limit: float


def floor_ms(case: Case, tokens: int, active_experts: float, read: float, dense: float) -> float:
    """Milliseconds for the chosen experts' bytes or for the products, whichever takes longer."""
    return 1e3 * max(active_experts * case.expert_bytes / read, case.flops(tokens) / dense)


def expected_active(case: Case, tokens: int) -> float:
    """Experts that at least one of ``tokens`` tokens chooses, when it chooses uniformly."""
    return case.experts * (1 - (1 - case.top_k / case.experts) ** tokens)


def design_floor_ms(case: Case, tokens: int) -> float:
    """The floor on the card for which targets are given, with uniform routing."""
    active = expected_active(case, tokens)
    return floor_ms(case, tokens, active, TARGET_READ, TARGET_DENSE)


def target_verdict(
    case: Case, tokens: int, milliseconds: float, floor: float, card: str
) -> Verdict | None:
    """Compares with the layer's target; None where there is none.

    Args:
        case: the layer.
        tokens: in one run.
        milliseconds: measured.
        floor: by the rates measured in the same run, milliseconds.
        card: name of the GPU.
    """
    return _verdict(TARGET_MS, case, tokens, milliseconds, floor, card)


def triton_verdict(
    case: Case, tokens: int, milliseconds: float, floor: float, card: str
) -> Verdict | None:
    """Compares with the recorded time of vLLM's Triton kernel; None where there is none."""
    return _verdict(TRITON_MS, case, tokens, milliseconds, floor, card)


def _verdict(
    limits: Mapping[str, Mapping[int, float]],
    case: Case,
    tokens: int,
    milliseconds: float,
    floor: float,
    card: str,
) -> Verdict | None:
    limit = limits.get(case.name, {}).get(tokens)
    if limit is None:
        return None
    if TARGET_CARD in card:
        return Verdict(milliseconds <= limit, "ms", milliseconds, limit)
    # Another card has another memory: what carries over is the distance from the floor.
    ratio, most = milliseconds / floor, limit / design_floor_ms(case, tokens)
    return Verdict(ratio <= most, "time / floor", ratio, most)
