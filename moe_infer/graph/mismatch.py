"""How a pattern says that it does not match, and how far it went."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from moe_infer.graph.expression import Expr

_LONGEST = 160


class Stage(IntEnum):
    """How far a pattern went."""

    ROUTER = 0
    ROUTED = 1
    WEIGHTS = 2
    UP = 3
    DOWN = 4
    COMBINED = 5


class Mismatch(Exception):  # noqa: N818 - a signal inside this package, not an error
    """An expression is not the pattern's; the text says where it differs."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage, self.reason = stage, reason


def short(e: Expr | Iterable[Expr]) -> str:
    """An expression for a message; several are a sum."""
    text = str(e) if isinstance(e, Expr) else " + ".join(map(str, e))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
