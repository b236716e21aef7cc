"""What a tensor of a graph is read as."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from moe_infer.graph.expression import Expr

Axis = tuple[str, ...]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
"""Element types of hidden states, scores and weights."""


class Opaque(Exception):  # noqa: N818 - a signal inside this package, not an error
    """A node that cannot be read; the text says why."""


@dataclass(frozen=True)
class Value:
    """What a tensor is: an expression, and the layout in which it lies."""

    axes: tuple[Axis, ...]
    expr: Expr

    @property
    def atoms(self) -> Axis:
        """Atoms in memory order."""
        return tuple(a for axis in self.axes for a in axis)


def is_weight(value: Value) -> bool:
    """Whether a value holds experts' constants, of all experts or of some."""
    return value.expr.op in ("weight", "gathered", "picked", "matrix")
