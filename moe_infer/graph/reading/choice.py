"""The choice of experts, and what is taken or written at the chosen ones."""

from __future__ import annotations

from onnx import NodeProto

from moe_infer.graph.expression import Expr, chosen_atom, index_axis, is_index
from moe_infer.graph.match import attribute, text_attribute
from moe_infer.graph.reading.products import ProductReader
from moe_infer.graph.reading.value import Axis, Opaque, Value


class ChoiceReader(ProductReader):
    """Adds softmax, the largest scores, gathers and scatters."""

    def _read_softmax(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = value.axes[attribute(node, "axis", -1)]
        if not axis:
            return [Value(value.axes, self.algebra.const(1))]
        if axis not in (("e",), ("k",)):
            raise Opaque("a Softmax along an axis that is neither all experts nor the chosen ones")
        return [Value(value.axes, self.algebra.softmax(axis[0], value.expr))]

    def _top(self, node: NodeProto, axis: int, k: int, keep: bool) -> list[Value]:
        value = self._input(node, 0)
        axis %= len(value.axes)
        along = value.axes[axis]
        if along not in (("e",), ("g",), ("i",)):
            raise Opaque("the largest are not taken along the axis of the experts")
        size = self._size(along)
        if size is not None and k > size:
            raise Opaque(f"the {k} largest of {size} are taken")
        atom = chosen_atom(along[0])
        if k > 1 and self.sizes.get(atom) not in (None, k):
            raise Opaque(f"a second selection, of {k} experts beside {self.sizes[atom]}")
        if k > 1:
            self.sizes[atom] = k
        chosen: tuple[Axis, ...] = ((atom,),) if k > 1 else ((),) if keep else ()
        axes = (*value.axes[:axis], *chosen, *value.axes[axis + 1 :])
        index = self.algebra.top_index(value.expr, k, along[0])
        self.top_nodes.setdefault(index, node)
        return [Value(axes, self.algebra.at(value.expr, index)), Value(axes, index)]

    def _read_topk(self, node: NodeProto) -> list[Value]:
        count = self._ints(node.input[1])
        if not attribute(node, "largest", 1):
            raise Opaque("TopK takes the smallest scores (largest=0)")
        if not count or count[0] < 1:
            raise Opaque("the number of experts a token is not constant")
        return self._top(node, attribute(node, "axis", -1), count[0], keep=True)

    def _read_argmax(self, node: NodeProto) -> list[Value]:
        if attribute(node, "select_last_index", 0):
            raise Opaque("ArgMax gives ties to the last expert; MoELayer gives them to the first")
        return self._top(node, attribute(node, "axis", 0), 1, bool(attribute(node, "keepdims", 1)))[
            1:
        ]

    def _read_reducemax(self, node: NodeProto) -> list[Value]:
        axes = self._axes(node, len(self._input(node, 0).axes))
        if len(axes) != 1:
            raise Opaque("a maximum along several axes")
        return self._top(node, axes[0], 1, bool(attribute(node, "keepdims", 1)))[:1]

    def _read_equal(self, node: NodeProto) -> list[Value]:
        def equal(v: list[Expr]) -> Expr | None:
            ops = {e.op: e for e in v}
            found = "top_index" in ops and "arange_e" in ops
            return self.algebra.one_hot(ops["top_index"]) if found else None

        return self._elementwise(node, equal)

    def _read_onehot(self, node: NodeProto) -> list[Value]:
        index = self._input(node, 0)
        depth, values = self._ints(node.input[1]), self.view.small(node.input[2])
        if index.expr.op != "top_index" or depth != [self.sizes["e"]]:
            raise Opaque("a OneHot that is not of the chosen expert over all experts")
        if values is None or list(values.ravel()) != [0, 1]:
            raise Opaque("a OneHot with values other than 0 and 1")
        axis = attribute(node, "axis", -1) % (len(index.axes) + 1)
        axes = (*index.axes[:axis], ("e",), *index.axes[axis:])
        return [Value(axes, self.algebra.one_hot(index.expr))]

    def _read_gather(self, node: NodeProto) -> list[Value]:
        data, index = self._input(node, 0), self._input(node, 1)
        axis = attribute(node, "axis", 0) % len(data.axes)
        return [self._select(data, index.axes, index.expr, axis)]

    def _read_gathernd(self, node: NodeProto) -> list[Value]:
        data, index = self._input(node, 0), self._input(node, 1)
        if attribute(node, "batch_dims", 0) or not index.axes or index.axes[-1]:
            raise Opaque("a GatherND with more than one index, or with batch_dims")
        return [self._select(data, index.axes[:-1], index.expr, 0)]

    def _select(self, data: Value, index_axes: tuple[Axis, ...], index: Expr, axis: int) -> Value:
        axes = (*data.axes[:axis], *index_axes, *data.axes[axis + 1 :])
        if index.op == "tokens":
            if data.axes[axis] != self.tokens:
                raise Opaque("rows are taken by token of something that has no row for each token")
            return Value(axes, data.expr)
        if not is_index(index):
            raise Opaque("an index that is neither the chosen expert nor the token")
        if data.axes[axis] != ("e",):
            raise Opaque("the chosen expert indexes an axis that is not that of the experts")
        if data.expr.op != "weight":
            raise Opaque("the chosen expert indexes something that is no constant stacked weight")
        return Value(axes, self.algebra.gathered(data.expr, index))

    def _read_gatherelements(self, node: NodeProto) -> list[Value]:
        data, index = self._input(node, 0), self._input(node, 1)
        axis = attribute(node, "axis", 0) % len(data.axes)
        rest = [i for i in range(len(data.axes)) if i != axis]
        if (
            not is_index(index.expr)
            or data.axes[axis] != ("e",)
            or len(index.axes) != len(data.axes)
        ):
            raise Opaque("values are not taken at the chosen experts")
        if any(data.axes[i] != index.axes[i] for i in rest):
            raise Opaque("values and chosen experts lie along different axes")
        return [Value(index.axes, self.algebra.at(data.expr, index.expr))]

    def _read_scatterelements(self, node: NodeProto) -> list[Value]:
        only = self._written_everywhere(node)
        if only is not None:
            return [only]
        index = self._input(node, 1)
        axis = attribute(node, "axis", 0) % len(index.axes)
        along = index_axis(index.expr)
        atom = chosen_atom(along)
        chosen = (atom,) if index.expr.atoms & {atom} else ()
        if index.expr.op != "top_index" or index.axes[axis] != chosen:
            raise Opaque("a scatter that does not write at the chosen experts")
        number = self._filled(node.input[2])
        if number is None:
            updates = self._input(node, 2)
            if index.axes != updates.axes:
                raise Opaque("a scatter that does not write the chosen experts' values")
            written = updates.expr
        else:
            written = self.algebra.const(number)
        axes = (*index.axes[:axis], (along,), *index.axes[axis + 1 :])
        hot = self.algebra.one_hot(index.expr)
        reduction = text_attribute(node, "reduction", "none")
        if self._zeros(node.input[0]) and reduction in ("none", "add"):
            expr = self.algebra.mul((hot, written))
            return [Value(axes, self._sum_over(chosen, expr))]
        if chosen or reduction != "none":
            raise Opaque("a scatter into something that is not known to be zero")
        data = self._input(node, 0)
        if data.axes != axes:
            raise Opaque("a scatter into something that has no value for each expert")
        return [Value(axes, self.algebra.where(hot, written, data.expr))]

    def _written_everywhere(self, node: NodeProto) -> Value | None:
        """One number scattered along an axis of one place: the mask of the only group."""
        data, index = (self.view.types.shape(node.input[i]) for i in (0, 1))
        axis, number = attribute(node, "axis", 0), self._filled(node.input[2])
        if not data or number is None or data != index or None in data:
            return None
        if not -len(data) <= axis < len(data) or data[axis] != 1:
            return None
        if text_attribute(node, "reduction", "none") != "none":
            return None
        return Value(((),) * len(data), self.algebra.const(number))
