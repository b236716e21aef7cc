"""Operators that compute element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import NodeProto

from moe_infer.graph.expression import Expr, index_axis, is_index
from moe_infer.graph.match import text_attribute
from moe_infer.graph.reading.constants import ConstantReader
from moe_infer.graph.reading.value import Axis, Opaque, Value

_ARITY = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Equal", "Greater", "Less"), 2),
    "Where": 3,
}


class ArithmeticReader(ConstantReader):
    """Adds arithmetic, activations, and the alignment of axes that it needs."""

    def _align(self, values: Sequence[Value]) -> tuple[Axis, ...]:
        rank = max(len(v.axes) for v in values)
        padded = [((),) * (rank - len(v.axes)) + v.axes for v in values]
        return tuple(self._same([p[i] for p in padded]) for i in range(rank))

    def _same(self, groups: Sequence[Axis]) -> Axis:
        """The axis that several aligned axes are; size 1 is repeated."""
        present = list(dict.fromkeys(g for g in groups if g))
        if len(present) == 2:
            stored = [g for g in present if len(g) == 1 and "#" in g[0]]
            other = [g for g in present if g not in stored]
            # A stored weight's axis takes the name of the axis that it meets.
            if (
                len(stored) == 1
                and len(other) == 1
                and self._size(stored[0]) == self._size(other[0])
            ):
                return other[0]
        if len(present) > 1:
            raise Opaque(f"axes {present[0]} and {present[1]} are combined as if they were one")
        return present[0] if present else ()

    def _elementwise(
        self, node: NodeProto, combine: Callable[[list[Expr]], Expr | None]
    ) -> list[Value]:
        if len(node.input) != _ARITY.get(node.op_type, len(node.input)):
            raise Opaque(f"a {node.op_type} of {len(node.input)} values")
        values = [self._input(node, i) for i in range(len(node.input))]
        expr = combine([v.expr for v in values])
        if expr is None:
            raise Opaque(f"{node.op_type} of these values is no part of a known MoE block")
        return [Value(self._align(values), expr)]

    def _read_mul(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, self.algebra.mul)

    def _read_add(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, self.algebra.add)

    def _read_sub(self, node: NodeProto) -> list[Value]:
        a = self.algebra
        return self._elementwise(node, lambda v: a.add((v[0], a.negative(v[1]))))

    def _read_div(self, node: NodeProto) -> list[Value]:
        a = self.algebra
        return self._elementwise(node, lambda v: a.mul((v[0], a.recip(v[1]))))

    def _read_neg(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, lambda v: self.algebra.negative(v[0]))

    def _read_reciprocal(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, lambda v: self.algebra.recip(v[0]))

    def _read_pow(self, node: NodeProto) -> list[Value]:
        def power(v: list[Expr]) -> Expr | None:
            return self.algebra.power(v[0], v[1].value) if v[1].op == "const" else None

        return self._elementwise(node, power)

    def _function(self, node: NodeProto, name: str) -> list[Value]:
        return self._elementwise(node, lambda v: self.algebra.make(name, v[:1]))

    def _read_sqrt(self, node: NodeProto) -> list[Value]:
        return self._function(node, "sqrt")

    def _read_sigmoid(self, node: NodeProto) -> list[Value]:
        return self._function(node, "sigmoid")

    def _read_tanh(self, node: NodeProto) -> list[Value]:
        return self._function(node, "tanh")

    def _read_exp(self, node: NodeProto) -> list[Value]:
        return self._function(node, "exp")

    def _read_erf(self, node: NodeProto) -> list[Value]:
        return self._function(node, "erf")

    def _read_relu(self, node: NodeProto) -> list[Value]:
        return self._function(node, "relu")

    def _read_clip(self, node: NodeProto) -> list[Value]:
        bounds = []
        for position, none in ((1, -np.inf), (2, np.inf)):
            name = node.input[position] if position < len(node.input) else ""
            bound = self.view.small(name) if name else np.array(none)
            if bound is None or bound.size != 1:
                raise Opaque("a Clip between bounds that are not constant")
            bounds.append(float(bound.ravel()[0]))
        value = self._input(node, 0)
        return [Value(value.axes, self._clip(value.expr, bounds[0], bounds[1]))]

    def _clip(self, expr: Expr, low: float, high: float) -> Expr:
        """``expr`` between two numbers; the number of a choice must stay what it is."""
        last = self._last(expr)
        if last is None:
            return self.algebra.clip(expr, low, high)
        # transformers clamps them, for experts that lie on other devices have larger numbers.
        if low <= 0 and high >= last:
            return expr
        raise Opaque(
            f"the numbers of the chosen, 0 to {last}, are clipped to [{low:g}, {high:g}], which"
            " makes others of some"
        )

    def _last(self, expr: Expr) -> int | None:
        """The largest number that an index found by top-k can have; None for other expressions.

        Its smallest is 0: TopK and ArgMax count from the start.
        """
        if expr.op != "top_index" and not is_index(expr):
            return None
        size = self.sizes.get(index_axis(expr) if expr.op == "top_index" else "e")
        return None if size is None else size - 1

    def _read_gelu(self, node: NodeProto) -> list[Value]:
        tanh = text_attribute(node, "approximate", "none") == "tanh"
        return self._function(node, "gelu_tanh" if tanh else "gelu")

    def _read_swish(self, node: NodeProto) -> list[Value]:
        if any(a.name == "alpha" and a.f != 1.0 for a in node.attribute):
            raise Opaque("a Swish with an alpha other than 1")
        a = self.algebra
        return self._elementwise(node, lambda v: a.mul((v[0], a.make("sigmoid", v[:1]))))
