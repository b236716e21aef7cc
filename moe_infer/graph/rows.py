"""Reads the rows of single experts: the pairs of token and chosen expert that a mask names.

An axis ``r3`` is the rows of expert 3, on which values are what they are on the pairs. ``coord`` is
the axis of a row's coordinates, as NonZero gives them: one for each axis of the mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnx import NodeProto, TensorProto

from moe_infer.graph.apart import ApartInterpreter
from moe_infer.graph.expression import Expr, is_index
from moe_infer.graph.interpreter import Axis, Opaque, Value
from moe_infer.graph.match import GraphView, attribute, text_attribute

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_EXACT = ("row", "row_pair", "rows", "hit_rows", "size", "picked", "kept", "within")
"""Whole numbers and masks that a Cast between types keeps, beside those known elsewhere."""

_ROW = re.compile(r"r\d+")


class RowsInterpreter(ApartInterpreter):
    """Adds the rows of each expert, and constants that belong to one expert."""

    DEMANDED = (*ApartInterpreter.DEMANDED, "ConstantOfShape", "Shape")

    def __init__(self, view: GraphView, hidden_states: str, logits: str) -> None:
        """As :class:`moe_infer.graph.interpreter.Interpreter`."""
        super().__init__(view, hidden_states, logits)
        self.loops = False
        """True when a mask of the chosen experts is taken apart."""
        self.chosen_masks: set[Expr] = set()
        """Masks of the chosen experts that were read."""
        self.shape_axes: dict[Expr, tuple[Axis, ...]] = {}
        """Axes of the value whose shape an expression is."""
        self.shape_dims: dict[Expr, Sequence[int | str | None] | None] = {}
        """Its dimensions, as far as they are known."""
        self.masks: dict[Expr, tuple[Axis, ...]] = {}
        """Axes of the mask whose rows an expression lists."""

    @property
    def recognised(self) -> bool:
        """True when the rows of an expert were looked for."""
        return self.loops

    def _read_onehot(self, node: NodeProto) -> list[Value]:
        index, depth = self._input(node, 0), self._ints(node.input[1])
        values, count = self.view.small(node.input[2]), self.sizes["e"]
        if (
            count is None
            or depth not in ([count], [count + 1])
            or not is_index(index.expr)
            or values is None
            or list(values.ravel()) != [0, 1]
        ):
            return self._noted(super()._read_onehot(node))
        # transformers 5 leaves room for a number that stands for no expert; no choice has it here.
        axis = attribute(node, "axis", -1) % (len(index.axes) + 1)
        axes = (*index.axes[:axis], ("e",), *index.axes[axis:])
        return self._noted([Value(axes, self.algebra.one_hot(index.expr))])

    def _read_equal(self, node: NodeProto) -> list[Value]:
        return self._noted(super()._read_equal(node))

    def _noted(self, values: list[Value]) -> list[Value]:
        self.chosen_masks |= {v.expr for v in values if v.expr.op == "one_hot"}
        return values

    # Constants of one expert

    def _constant(self, name: str) -> Value | None:
        # Of rank 2 it may also be a vector for each expert, which shows when it is picked.
        return self.apart(name) or super()._constant(name)

    def pick(self, value: Value, axis: int, expert: int, keep: bool) -> Value:
        """Also of vectors that are stacked in one constant."""
        if value.expr.op == "matrix" and axis == 0 and len(value.axes) == 2:
            stacked = super()._constant(str(value.expr.params[0]))
            if stacked is not None and stacked.axes[0] == ("e",):
                value = stacked
        return super().pick(value, axis, expert, keep)

    def _contract(
        self, a: Value, b: Value, left: Axis, right: Axis
    ) -> tuple[Expr, dict[Axis, Axis]]:
        """Constants of one expert multiply rows of one expert; those of attention do not matter."""
        apart = [v for v in (a, b) if v.expr.op == "matrix"]
        rows = any(_ROW.fullmatch(atom) for v in (a, b) for g in v.axes for atom in g)
        if apart and not rows:
            raise Opaque("")
        return super()._contract(a, b, left, right)

    # Shapes

    def _read_shape(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if any(a.name in ("start", "end") for a in node.attribute):
            raise Opaque("a part of a shape")
        expr = self.algebra.make("shape", (), (node.output[0],), ())
        self.shape_axes[expr] = value.axes
        self.shape_dims[expr] = self._dims(node.input[0], value)
        return [Value(((),), expr)]

    def _dims(self, name: str, value: Value) -> Sequence[int | str | None] | None:
        made = self.view.producer(name)
        if value.expr.op == "const" and made is not None and made.op_type == "ConstantOfShape":
            return self.shapes.ints(made.input[0])
        return self.dims(name)

    def _read_constantofshape(self, node: NodeProto) -> list[Value]:
        if not self._zeros(node.output[0]):
            raise Opaque("a ConstantOfShape that is not zero")
        return [Value(self._untold(node), self.algebra.const(0))]

    def _untold(self, node: NodeProto) -> tuple[Axis, ...]:
        """Axes of a constant, each as if of size 1: what it meets tells their names."""
        shape = self.view.types.shape(node.output[0])
        if shape is None:
            raise Opaque("a constant whose rank is not known")
        return ((),) * len(shape)

    def _read_expand(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op == "const":
            return [Value(self._untold(node), value.expr)]
        shape = self.value(node.input[1])
        like = self.shape_axes.get(shape.expr) if shape is not None else None
        if shape is None or like is None or len(like) < len(value.axes):
            return super()._read_expand(node)
        dims = self.shape_dims[shape.expr]
        if like[-1:] == value.axes[-1:] == ((),) and dims and dims[-1] == self.sizes["d"]:
            like = (*like[:-1], ("d",))
        known = Value(like, self.algebra.const(1))
        return [Value(self._align([value, known]), value.expr)]

    def _read_flatten(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = attribute(node, "axis", 1) % (len(value.axes) + 1)
        left, right = value.axes[:axis], value.axes[axis:]
        axes = (tuple(a for g in left for a in g), tuple(a for g in right for a in g))
        return [Value(axes, value.expr)]

    def _read_slice(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        starts, ends = (self.view.ints(node.input[i]) for i in (1, 2))
        end = None if ends is not None else self.value(node.input[2])
        if starts == [0] and end is not None and end.expr.op == "size":
            axis = self._axes(node, len(value.axes), 3)[0]
            if value.axes[axis] == end.expr.params and len(node.input) < 5:
                return [value]  # all of it
        if value.axes and any("coord" in g for g in value.axes) and starts and ends:
            axis = self._axes(node, len(value.axes), 3)[0]
            if value.axes[axis] == ("coord",) and len(starts) == 1 and ends[0] == starts[0] + 1:
                return [self._coordinate(value, axis, starts[0], keep=True)]
        whole = starts == [0, 0] and ends is not None and ends[0] == 1 and ends[1] >= 2**31 - 1
        if whole and len(value.axes) == 2:
            # The first row: only its shape is used, to widen what is scattered.
            expr = self.algebra.make("first_row", (value.expr,), (), ())
            return [Value(((), value.axes[1]), expr)]
        return super()._read_slice(node)

    # Rows of an expert

    def _read_cast(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        mask = value.expr.args[0] if value.expr.op == "picked" else value.expr
        if value.expr.op in _EXACT or (mask.op == "mul" and mask in self.chosen_masks):
            return [value]
        return super()._read_cast(node)

    def _read_nonzero(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op != "picked" or value.expr.args[0].op not in ("one_hot", "mul"):
            raise Opaque("a NonZero that is not of the mask of one expert")
        # An axis on which the mask is only repeated goes with each of the rows.
        own = [g for g in value.axes if not g or set(g) <= value.expr.atoms]
        rest = value.axes[len(own) :]
        if value.axes != (*own, *rest) or any(set(g) & value.expr.atoms for g in rest):
            raise Opaque("a NonZero of a mask that is repeated before the tokens")
        row = (f"r{value.expr.params[0]}", *(a for g in rest for a in g))
        return [Value((("coord",), row), self._rows("rows", value))]

    def _rows(self, op: str, mask: Value) -> Expr:
        expr = self.algebra.make(op, (mask.expr,), tuple(map(str, mask.axes)), ())
        self.masks[expr] = mask.axes
        return expr

    def _coordinate(self, value: Value, axis: int, number: int, keep: bool) -> Value:
        """One coordinate of the rows: their tokens, say."""
        axes = self.masks.get(value.expr)
        if axes is None or not -len(axes) <= number < len(axes):
            raise Opaque("a coordinate of something that is no list of rows")
        atom = axes[number]
        middle = ((),) if keep else ()
        left = (*value.axes[:axis], *middle, *value.axes[axis + 1 :])
        if not atom:
            return Value(left, self.algebra.const(0))  # of an axis of size 1
        return Value(left, self.algebra.make("row", (value.expr,), atom, ()))

    def _read_split(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(value.axes)
        if value.axes[axis] == ("coord",):
            if len(node.output) != len(self.masks.get(value.expr, ())):
                raise Opaque("a Split of rows that is not into single coordinates")
            return [self._coordinate(value, axis, i, keep=True) for i in range(len(node.output))]
        return super()._read_split(node)

    def _read_gather(self, node: NodeProto) -> list[Value]:
        data = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(data.axes)
        small = self.view.small(node.input[1])
        self.loops |= data.axes[axis] == ("e",) and data.expr in self.chosen_masks
        if data.axes[axis] == ("coord",) and small is not None and small.size == 1:
            return [self._coordinate(data, axis, int(small.item()), keep=small.ndim > 0)]
        if data.expr.op == "shape" and small is not None and small.size == 1:
            return [self._dimension(self.shape_axes[data.expr], int(small.item()), small.ndim)]
        if data.axes[axis] == () and small is not None and small.size == 1 and not small.any():
            return [
                Value((*data.axes[:axis], *((),) * small.ndim, *data.axes[axis + 1 :]), data.expr)
            ]
        return super()._read_gather(node)

    def _dimension(self, axes: tuple[Axis, ...], number: int, rank: int) -> Value:
        if not -len(axes) <= number < len(axes):
            raise Opaque("a dimension that there is not")
        size = self._size(axes[number])
        known = self.algebra.make("size", (), axes[number], ())
        return Value(((),) * rank, known if size is None else self.algebra.const(size))

    def _select(self, data: Value, index_axes: tuple[Axis, ...], index: Expr, axis: int) -> Value:
        rest = data.axes[:axis], data.axes[axis + 1 :]
        if index.op == "row" and data.axes[axis] == index.params:
            return Value((*rest[0], *index_axes, *rest[1]), data.expr)
        if index.op == "add" and data.axes[axis] == (*self.tokens, "k"):
            # token * k + number of the choice
            parts = [e for e in index.args if e.op == "row"]
            wide = [e for e in index.args if e.op == "mul"]
            if len(index.args) == 2 and len(parts) == len(wide) == 1:
                token = self.algebra.make("row", parts[0].args, self.tokens, ())
                scaled = self.algebra.mul((token, self.algebra.const(self.sizes["k"] or 1)))
                if parts[0].params == ("k",) and wide[0] is scaled:
                    return Value((*rest[0], *index_axes, *rest[1]), data.expr)
        return super()._select(data, index_axes, index, axis)

    def _read_concat(self, node: NodeProto) -> list[Value]:
        values = [self._input(node, i) for i in range(len(node.input))]
        axis = attribute(node, "axis", 0) % len(values[0].axes)
        rows = [v for v in values if v.expr.op == "row"]
        # Of an axis of size 1 the coordinate is 0.
        rest = {v.expr for v in values if v.expr.op != "row"}
        if not rows and not all(v.expr.atoms for v in values):
            raise Opaque("")  # of dimensions, which are known where they are needed
        if not rows or rest - {self.algebra.const(0)} or any(v.axes[axis] for v in values):
            return super()._read_concat(node)
        sources = {v.expr.args[0] for v in rows}
        left = {(*v.axes[:axis], *v.axes[axis + 1 :]) for v in rows}
        if len(sources) != 1 or len(left) != 1 or axis != len(values[0].axes) - 1:
            raise Opaque("a Concat of rows of several experts")
        chosen = [tuple(map(str, v.expr.params)) if v in rows else () for v in values]
        expr = self.algebra.make("row_pair", sources, tuple(map(str, chosen)), ())
        self.masks[expr] = tuple(chosen)
        return [Value((*left.pop(), ("coord",)), expr)]

    def _read_gathernd(self, node: NodeProto) -> list[Value]:
        data, index = self._input(node, 0), self._input(node, 1)
        if not index.axes or index.axes[-1] != ("coord",) or attribute(node, "batch_dims", 0):
            return super()._read_gathernd(node)
        wanted = self.masks.get(index.expr, ())
        if not wanted or data.axes[: len(wanted)] != wanted:
            raise Opaque("rows are taken of something with other axes than their mask")
        return [Value((*index.axes[:-1], *data.axes[len(wanted) :]), data.expr)]

    # Adding the experts' rows

    def _read_scatternd(self, node: NodeProto) -> list[Value]:
        data, index, updates = (self._input(node, i) for i in range(3))
        adds = text_attribute(node, "reduction", "none") == "add"
        if not adds and self.sizes["k"]:
            raise Opaque("a ScatterND that overwrites what another expert gave")
        rows = index.axes[:-1]
        if index.axes[-1] == ():
            fits = index.expr.op == "row" and index.expr.params == self.tokens
        else:
            found = self.masks.get(index.expr, ())
            fits = found[: len(self.tokens)] == tuple((t,) for t in self.tokens)
        if not fits or len(rows) != 1 or updates.axes[:1] != rows:
            raise Opaque("a ScatterND that does not write rows to the tokens they came from")
        # Single elements of rows are rows, flattened.
        whole = (rows[0][:1], *((a,) for a in rows[0][1:]), *updates.axes[1:])
        return [self._scattered(data, index.expr, Value(whole, updates.expr))]

    def _read_scatterelements(self, node: NodeProto) -> list[Value]:
        index = self._input(node, 1)
        if index.expr.op != "row":
            return super()._read_scatterelements(node)
        data, updates = self._input(node, 0), self._input(node, 2)
        adds = text_attribute(node, "reduction", "none") == "add"
        if index.axes != updates.axes or index.expr.params != self.tokens:
            raise Opaque("a ScatterElements that does not write rows to the tokens they came from")
        if attribute(node, "axis", 0) != 0 or not (adds or self._zeros(node.input[0])):
            raise Opaque("a ScatterElements that overwrites what another expert gave")
        return [self._scattered(data, index.expr, updates)]

    def _scattered(self, data: Value, index: Expr, updates: Value) -> Value:
        source = index if index.op == "rows" else index.args[0]
        mask = source.args[0]
        expert = int(mask.params[0])
        if updates.axes[:1] != ((f"r{expert}",),):
            raise Opaque("rows of one expert are written to the tokens of another")
        made = self.algebra.make(
            "scattered",
            (mask.args[0], updates.expr),
            (expert,),
            (updates.expr.atoms - {"k"}) | set(self.tokens),
        )
        leading = (self.tokens,) if len(data.axes) == 2 else tuple((t,) for t in self.tokens)
        axes = (*leading, *updates.axes[1:])
        if data.expr.op != "const" and data.axes != axes:
            raise Opaque("rows are added to something with other axes")
        return Value(axes, self._complete(self.algebra.add((data.expr, made))))

    def _complete(self, total: Expr) -> Expr:
        """A sum of experts' rows as it is to be read on; here as it is."""
        return total
