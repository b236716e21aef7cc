"""Reads routers that do more than take the largest scores: groups, masks, repeated choices."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from moe_infer.graph.expression import Expr, is_index
from moe_infer.graph.interpreter import Interpreter, Opaque, Value
from moe_infer.graph.match import attribute

_CONDITIONS = ("greater", "one_hot", "not", "nonzero")


class RoutingInterpreter(Interpreter):
    """Adds conditions, masks and the joining of choices."""

    DEMANDED = (*Interpreter.DEMANDED, "Not", "ScatterElements")

    def _read_cast(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if attribute(node, "to", 0) != TensorProto.BOOL:
            return super()._read_cast(node)
        if value.expr.op in _CONDITIONS:
            return [value]
        if value.expr.op == "const":
            return [Value(value.axes, self.algebra.const(float(value.expr.value != 0)))]
        return [Value(value.axes, self.algebra.make("nonzero", (value.expr,)))]

    def _read_not(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op == "not":
            return [Value(value.axes, value.expr.args[0])]
        if value.expr.op == "const":
            return [Value(value.axes, self.algebra.const(float(not value.expr.value)))]
        return [Value(value.axes, self.algebra.make("not", (value.expr,)))]

    def _read_greater(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, lambda v: self._greater(v[0], v[1]))

    def _read_less(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, lambda v: self._greater(v[1], v[0]))

    def _read_greaterorequal(self, node: NodeProto) -> list[Value]:
        def not_less(v: list[Expr]) -> Expr | None:
            less = self._greater(v[1], v[0])
            return self.algebra.const(1 - less.value) if less.op == "const" else None

        return self._elementwise(node, not_less)

    def _greater(self, a: Expr, b: Expr) -> Expr:
        """Whether ``a`` is greater; of a choice's number and a constant it may be known.

        Exporters add the size to negative numbers, and set aside those beyond the last: choices by
        top-k are neither.
        """
        last = self._last(a)
        if last is not None and b.op == "const" and (b.value < 0 or b.value >= last):
            return self.algebra.const(float(b.value < 0))
        last = self._last(b)
        if last is not None and a.op == "const" and (a.value <= 0 or a.value > last):
            return self.algebra.const(float(a.value > last))
        return self.algebra.make("greater", (a, b))

    def _read_abs(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, lambda v: self.algebra.make("abs", v))

    def _read_max(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, self._largest)

    def _largest(self, values: list[Expr]) -> Expr:
        numbers = [v.value for v in values if v.op == "const"]
        rest = [v for v in values if v.op != "const"]
        if numbers and len(rest) == 1:
            return self._clip(rest[0], max(numbers), float("inf"))
        return self.algebra.largest(values)

    def _read_min(self, node: NodeProto) -> list[Value]:
        def smallest(values: list[Expr]) -> Expr | None:
            numbers = [v.value for v in values if v.op == "const"]
            rest = [v for v in values if v.op != "const"]
            if not numbers or len(rest) != 1:
                return None
            return self._clip(rest[0], float("-inf"), min(numbers))

        return self._elementwise(node, smallest)

    def _read_where(self, node: NodeProto) -> list[Value]:
        return self._elementwise(node, lambda v: self.algebra.where(*v))

    def _read_concat(self, node: NodeProto) -> list[Value]:
        values = [self._input(node, i) for i in range(len(node.input))]
        first = values[0].axes
        axis = attribute(node, "axis", 0) % len(first)
        if any(v.axes != first for v in values) or first[axis]:
            raise Opaque("a Concat of other things than one choice of each token after another")
        kinds = {is_index(v.expr) for v in values}
        if len(kinds) != 1 or any("k" in v.expr.atoms for v in values):
            raise Opaque("a Concat of other things than one choice of each token after another")
        if self.sizes["k"] not in (None, len(values)):
            raise Opaque(f"a Concat of {len(values)} choices beside {self.sizes['k']}")
        self.sizes["k"] = len(values)
        axes = (*first[:axis], ("k",), *first[axis + 1 :])
        return [Value(axes, self.algebra.stack(v.expr for v in values))]
