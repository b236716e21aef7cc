"""Sums along axes, and products with weights."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from moe_infer.graph.expression import Expr
from moe_infer.graph.match import attribute, text_attribute
from moe_infer.graph.reading.arithmetic import ArithmeticReader
from moe_infer.graph.reading.value import Axis, Opaque, Value, is_weight


class ProductReader(ArithmeticReader):
    """Adds reductions and contractions."""

    def _sum_over(self, atoms: Sequence[str], expr: Expr) -> Expr:
        for atom in atoms:
            expr = self.algebra.sum(atom, self.sizes.get(atom), expr)
        return expr

    def _reduced(self, node: NodeProto, value: Value) -> tuple[tuple[Axis, ...], Axis]:
        """Axes that stay, and the atoms that go."""
        axes = self._axes(node, len(value.axes))
        keep = attribute(node, "keepdims", 1)
        gone = tuple(a for i in axes for a in value.axes[i])
        left = tuple(
            () if i in axes else a for i, a in enumerate(value.axes) if keep or i not in axes
        )
        return left, gone

    def _read_reducesum(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axes, gone = self._reduced(node, value)
        if any("#" in a for a in gone):
            raise Opaque("a sum along an axis of a stored weight")
        return [Value(axes, self._sum_over(gone, value.expr))]

    def _read_reducemean(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axes, gone = self._reduced(node, value)
        size = self._size(gone)
        if size is None or any("#" in a for a in gone):
            raise Opaque("a mean along an axis whose size is not known")
        mean = (self.algebra.const(1 / size), self._sum_over(gone, value.expr))
        return [Value(axes, self.algebra.mul(mean))]

    def _read_matmul(self, node: NodeProto) -> list[Value]:
        a, b = self._input(node, 0), self._input(node, 1)
        if len(a.axes) < 2 or len(b.axes) < 2:
            raise Opaque("a MatMul with a vector")
        batch = self._align([Value(a.axes[:-2], a.expr), Value(b.axes[:-2], b.expr)])
        expr, out = self._contract(a, b, a.axes[-1], b.axes[-2])
        axes = (*batch, a.axes[-2], b.axes[-1])
        return [Value(tuple(out.get(g, g) for g in axes), expr)]

    def _read_einsum(self, node: NodeProto) -> list[Value]:
        equation = text_attribute(node, "equation", "").replace(" ", "")
        inputs, arrow, result = equation.partition("->")
        terms = inputs.split(",")
        values = [self._input(node, i) for i in range(len(node.input))]
        if not arrow or "." in equation or len(terms) != 2 or len(values) != 2:
            raise Opaque(f"an Einsum '{equation}' that is not of two operands")
        letters: dict[str, list[Axis]] = {}
        for term, value in zip(terms, values, strict=True):
            if len(term) != len(value.axes) or len(set(term)) != len(term):
                raise Opaque(f"an Einsum '{equation}' with a repeated letter")
            for letter, axis in zip(term, value.axes, strict=True):
                letters.setdefault(letter, []).append(axis)
        gone = [c for c in letters if c not in result]
        if len(gone) == 1 and len(letters[gone[0]]) == 2:
            left, right = letters[gone[0]]
            expr, out = self._contract(values[0], values[1], left, right)
        elif any(is_weight(v) for v in values):
            raise Opaque(f"an Einsum '{equation}' with weights that does not contract one axis")
        else:
            expr, out = self.algebra.mul(v.expr for v in values), {}
            for letter in gone:
                expr = self._sum_over(self._same(letters[letter]), expr)
        axes = tuple(self._same(letters[c]) for c in result)
        return [Value(tuple(out.get(g, g) for g in axes), expr)]

    def _contract(
        self, a: Value, b: Value, left: Axis, right: Axis
    ) -> tuple[Expr, dict[Axis, Axis]]:
        """Product summed along one axis, and how an axis of a stored weight is now called."""
        if is_weight(a) and is_weight(b):
            raise Opaque("a product of two weights")
        if not is_weight(a) and not is_weight(b):
            group = self._same([left, right])
            return self._sum_over(group, self.algebra.mul((a.expr, b.expr))), {}
        weight, x, stored, used = (a, b, left, right) if is_weight(a) else (b, a, right, left)
        rows = [g for g in weight.axes if g != stored and len(g) == 1 and "#" in g[0]]
        if len(stored) != 1 or "#" not in stored[0] or len(rows) != 1 or len(used) != 1:
            raise Opaque("the experts' weights are contracted along the wrong axis")
        if self._size(stored) != self._size(used):
            raise Opaque(f"axes {stored} and {used} differ in size")
        count = self._size(rows[0])
        back = used != ("d",) and count == self.sizes["d"]
        out = "d" if back else f"h{count}"
        self.sizes[out] = count
        column = int(stored[0].rpartition("#")[2])
        return self.algebra.linear(weight.expr, column, used[0], out, x.expr), {rows[0]: (out,)}
