"""Experts as one product each on the pairs sorted by expert: transformers' OnnxExporter.

Its default for ``experts_implementation="grouped_mm"``. The (token, chosen expert) pairs are sorted
by expert (TopK of the smallest, over all); counts of each expert (a histogram, CumSum) give the
rows of each; each expert multiplies its rows (Range and Gather, or in transformers 5.17 a Slice;
MatMul with its slice of the stacked weight, or with a constant of its own where the exporter folded
the slice); Concat puts them one below the other, and the inverse permutation restores the order.

Read here as: an axis ``p`` of the sorted pairs, on which values are what they are on the pairs; a
Concat of all experts' products in order is the product with the gathered weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from moe_infer.graph.apart import ApartInterpreter
from moe_infer.graph.expression import Expr, is_index
from moe_infer.graph.interpreter import Axis, Opaque, Value
from moe_infer.graph.match import GraphView, Match, NearMiss, attribute, text_attribute
from moe_infer.graph.search import search

NAME = "grouped"

_WHOLE = (TensorProto.INT64, TensorProto.INT32)
_EXACT = ("top_index", "stack", "tokens", "arange_e", "one_hot", "const", "count", "ends", "picked")
"""Whole numbers small enough that a Cast between types keeps them, and what is picked of them."""

_ROWS = re.compile(r"g\d+")
"""Axes of the rows of one expert."""
_OTHER_ROWS = "rows that do not go from one expert's first pair to its last"


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every block, or how far it went, in the order of the graph."""
    return search(view, NAME, GroupedInterpreter)


class GroupedInterpreter(ApartInterpreter):
    """Adds the sorted pairs."""

    sorts = False
    chosen: Expr | None = None
    """The experts by which the pairs are sorted; the router chooses once."""

    @property
    def recognised(self) -> bool:
        """True when something was sorted by expert."""
        return self.sorts

    @property
    def pairs(self) -> Axis:
        """The flattened axis of (token, chosen expert) pairs."""
        return (*self.tokens, "k") if self.sizes["k"] else self.tokens

    # Sorting

    def _read_topk(self, node: NodeProto) -> list[Value]:
        value = self.value(node.input[0])
        if value is None or not is_index(value.expr) or attribute(node, "largest", 1):
            return super()._read_topk(node)
        again, self.sorts = self.sorts, True
        if again or not attribute(node, "sorted", 1):
            raise Opaque("a second sort by expert, or one that does not sort (sorted=0)")
        if value.axes != (self.pairs,) or not self._all_of(node.input[1], node.input[0]):
            raise Opaque("a sort by expert that is not of all pairs of token and chosen expert")
        perm = self.algebra.make("perm", (), (), self.pairs)
        return [Value((("p",),), value.expr), Value((("p",),), perm)]

    def _all_of(self, count: str, name: str) -> bool:
        """Whether ``count`` is the number of elements of the vector ``name``."""
        given = self.view.ints(count)
        if given is not None:
            return given == [self._size(self.env[name].axes[0])]
        for _ in range(8):
            node = self.view.producer(count)
            if node is None:
                return False
            if node.op_type in ("Shape", "Size"):
                return self._of_one_size(node.input[0], name)
            if node.op_type not in ("Reshape", "Squeeze", "Unsqueeze", "Cast", "Gather"):
                return False
            count = node.input[0]
        return False

    def _of_one_size(self, a: str, b: str) -> bool:
        """Whether two vectors have one length: exporters take equal shapes from other layers."""
        first, second = self.view.types.shape(a), self.view.types.shape(b)
        return a == b or (first == second and bool(first) and None not in (first or ()))

    def _read_div(self, node: NodeProto) -> list[Value]:
        left, right = self._input(node, 0), self._input(node, 1)
        if left.expr.op == "perm" and right.expr.op == "const":
            if right.expr.value != (self.sizes["k"] or 1):
                raise Opaque("the pair's number is not divided by the number of chosen experts")
            return [Value(left.axes, self.algebra.make("pair_token", (), (), self.tokens))]
        return super()._read_div(node)

    # Floor division as it is written for numbers that may be negative; a pair's number is not.

    def _read_less(self, node: NodeProto) -> list[Value]:
        left, right = self._input(node, 0), self._input(node, 1)
        if left.expr.op == "perm" and right.expr.op == "const" and right.expr.value <= 0:
            return [Value(left.axes, self.algebra.const(0))]
        return super()._read_less(node)

    def _read_equal(self, node: NodeProto) -> list[Value]:
        left, right = self._input(node, 0), self._input(node, 1)
        if left.expr.op == right.expr.op == "const":
            same = left.expr.value == right.expr.value
            return [Value(self._align([left, right]), self.algebra.const(float(same)))]
        return super()._read_equal(node)

    def _read_and(self, node: NodeProto) -> list[Value]:
        for name in node.input:
            value = self.value(name)
            if value is not None and value.expr.op == "const" and value.expr.value == 0:
                return [value]
        raise Opaque("a logical and that no known pattern uses")

    # Counting

    def _read_cast(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op in _EXACT:
            return [value]
        if value.expr.op == "mul" and attribute(node, "to", 0) in _WHOLE:
            index = [e for e in value.expr.args if is_index(e)]
            numbers = [e for e in value.expr.args if e.op == "const"]
            if len(index) == len(numbers) == 1 and len(value.expr.args) == 2:
                return [Value(value.axes, self.algebra.make("bin", (value.expr,)))]
        return super()._read_cast(node)

    def _read_clip(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op != "bin":
            return super()._read_clip(node)
        low, high = (self.view.small(n) for n in (*node.input[1:3], "", "")[:2])
        count = self.sizes["e"]
        if count is None or low is None or high is None:
            raise Opaque("a Clip that no known pattern uses")
        factors = {"index" if is_index(e) else e.op: e for e in value.expr.args[0].args}
        # Bins of a histogram of the numbers 0 to E-1: number n falls into bin n, the last one by
        # the Clip.
        width = count / (count - 1)
        if [int(low.item()), int(high.item())] != [0, count - 1] or not (
            abs(factors["const"].value - width) < 1e-3 / count**2
        ):
            raise Opaque("a histogram of other bins than one for each expert")
        return [Value(value.axes, factors["index"])]

    def _read_scatterelements(self, node: NodeProto) -> list[Value]:
        index = self._input(node, 1)
        if index.axes not in ((("p",),), (self.pairs,)) or not is_index(index.expr):
            return super()._read_scatterelements(node)
        adds = text_attribute(node, "reduction", "none") == "add"
        zeros = self._zeros(node.input[0]) and self.view.types.shape(node.output[0]) in (
            None,
            (self.sizes["e"],),
        )
        if not adds or not zeros or self._filled(node.input[2]) != 1:
            raise Opaque("a scatter by chosen expert that does not count the pairs of each")
        return [Value((("e",),), self.algebra.make("count", (index.expr,), (), ("e",)))]

    def _read_cumsum(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if (
            value.expr.op != "count"
            or self.view.ints(node.input[1]) not in ([0], [-1])
            or attribute(node, "exclusive", 0)
            or attribute(node, "reverse", 0)
        ):
            raise Opaque("a running sum that is not of the number of pairs of each expert")
        return [Value(value.axes, self.algebra.make("ends", (value.expr,), (), ("e",)))]

    # Each expert's rows

    def _constant(self, name: str) -> Value | None:
        # One of rank 2 may also hold a vector for each expert, which shows when it is indexed.
        return self.apart(name) or super()._constant(name)

    def _contract(
        self, a: Value, b: Value, left: Axis, right: Axis
    ) -> tuple[Expr, dict[Axis, Axis]]:
        """A constant of its own is an expert's only if it multiplies that expert's rows."""
        rows = any(_ROWS.fullmatch(atom) for v in (a, b) for axis in v.axes for atom in axis)
        if not rows and any(v.expr.op == "matrix" for v in (a, b)):
            raise Opaque("")
        return super()._contract(a, b, left, right)

    def _rows(self, start: Expr, end: Expr) -> int | None:
        """The expert whose rows lie between two running sums; None if ``end`` is none.

        Raises:
            Opaque: they begin elsewhere than where those of the expert before it end.
        """
        if end.op != "picked" or end.args[0].op != "ends":
            return None
        expert = int(end.params[0])
        wanted = (
            self.algebra.const(0)
            if expert == 0
            else self.algebra.make("picked", end.args, (expert - 1,), ())
        )
        if start is not wanted:
            raise Opaque(_OTHER_ROWS)
        self.chosen = end.args[0].args[0].args[0]
        return expert

    def _read_range(self, node: NodeProto) -> list[Value]:
        end = self.value(node.input[1])
        if end is None or end.expr.op != "picked":
            return super()._read_range(node)
        expert, step = (
            self._rows(self._input(node, 0).expr, end.expr),
            self.view.small(node.input[2]),
        )
        if expert is None:
            return super()._read_range(node)
        if step is None or step.item() != 1:
            raise Opaque(_OTHER_ROWS)
        rows = self.algebra.make("group", end.expr.args[0].args, (expert,), ())
        return [Value(((f"g{expert}",),), rows)]

    def _read_slice(self, node: NodeProto) -> list[Value]:
        data = self._input(node, 0)
        if ("p",) not in data.axes or len(node.input) < 4:
            return super()._read_slice(node)
        (axis,), step = self._axes(node, len(data.axes), 3), self.view.ints((*node.input, "")[4])
        if data.axes[axis] != ("p",):
            return super()._read_slice(node)
        expert = self._rows(self._input(node, 1).expr, self._input(node, 2).expr)
        if expert is None or (len(node.input) > 4 and step != [1]):
            raise Opaque(_OTHER_ROWS)
        axes = (*data.axes[:axis], (f"g{expert}",), *data.axes[axis + 1 :])
        return [Value(axes, data.expr)]

    def _select(self, data: Value, index_axes: tuple[Axis, ...], index: Expr, axis: int) -> Value:
        wanted: dict[str, Axis] = {
            "group": ("p",),
            "perm": self.pairs,
            "inverse": ("p",),
            "pair_token": self.tokens,
        }
        if index.op not in wanted:
            if data.expr.op == "matrix" and is_index(index):
                data = super()._constant(str(data.expr.params[0])) or data
            return super()._select(data, index_axes, index, axis)
        if data.axes[axis] != wanted[index.op]:
            raise Opaque("rows are taken of something that is not in the order of the pairs")
        return Value((*data.axes[:axis], *index_axes, *data.axes[axis + 1 :]), data.expr)

    def _read_concat(self, node: NodeProto) -> list[Value]:
        values = [self._input(node, i) for i in range(len(node.input))]
        count = self.sizes["e"]
        if not any(_ROWS.fullmatch(atom) for axis in values[0].axes[:1] for atom in axis):
            return super()._read_concat(node)
        if attribute(node, "axis", 0) != 0 or len(values) != count:
            raise Opaque("a Concat that is not of one result for each expert")
        for e, value in enumerate(values):
            if value.axes[:1] != ((f"g{e}",),):
                raise Opaque(f"part {e} of the Concat is not expert {e}'s")
        assert self.chosen is not None
        rest = values[0].axes[1:]
        if any(v.axes[1:] != rest for v in values) or any("#" in a for g in rest for a in g):
            raise Opaque("the experts' results differ in their axes")
        return [Value((("p",), *rest), self.merged([v.expr for v in values], self.chosen))]

    # Restoring the order

    def _read_scatternd(self, node: NodeProto) -> list[Value]:
        index = self._input(node, 1)
        if index.expr.op != "perm" or index.axes != (("p",), ()):
            raise Opaque("a ScatterND that does not invert the order of the sorted pairs")
        if not self._counts(node.input[2]):
            raise Opaque("the inverse order is not made of the numbers 0, 1, 2, ...")
        if not self._as_many_as_pairs(node.input[0]):
            raise Opaque("the inverse order may have another length than there are pairs")
        return [Value((self.pairs,), self.algebra.make("inverse", (), (), self.pairs))]

    def _counts(self, name: str) -> bool:
        """Whether a vector is 0, 1, 2, ..."""
        small = self.view.small(name)
        if small is not None:
            return bool(small.ndim == 1 and (small == np.arange(small.size)).all())
        node = self.view.producer(name)
        if node is None or node.op_type != "Range":
            return False
        start, step = (self.view.small(node.input[i]) for i in (0, 2))
        return start is not None and step is not None and start.item() == 0 and step.item() == 1

    def _as_many_as_pairs(self, name: str) -> bool:
        """Whether what is scattered into has one element for each pair."""
        small = self.view.small(name)
        if small is not None:
            return small.shape == (self._size(self.pairs),)
        node = self.view.producer(name)
        if node is None or node.op_type not in ("Expand", "ConstantOfShape"):
            return False
        shape = self.view.producer(node.input[-1])
        like = (
            self.value(shape.input[0]) if shape is not None and shape.op_type == "Shape" else None
        )
        return like is not None and like.axes in ((("p",),), (self.pairs,))
