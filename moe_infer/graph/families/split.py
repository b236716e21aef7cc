"""Experts on the rows of a Split: JetMoE of transformers.

The (token, chosen expert) pairs are sorted by expert, as in :mod:`.grouped`; the sum of the one-hot
masks counts the pairs of each expert, and a Split by these counts gives each expert its rows, which
go through its own Gemm; Concat puts them together again. Both projections are done so, and what is
between them for all pairs at once. ScatterND then adds the rows to their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from moe_infer.graph.expression import Expr
from moe_infer.graph.families.grouped import GroupedInterpreter
from moe_infer.graph.interpreter import Axis, Opaque, Value
from moe_infer.graph.match import GraphView, Match, NearMiss, attribute, describe, text_attribute
from moe_infer.graph.search import search

NAME = "split"

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
_EXACT = (TensorProto.INT64, TensorProto.INT32, *_FLOATS)
"""Types that hold the number of a pair, of which there are fewer than 2^24."""


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every block, or how far it went, in the order of the graph."""
    return search(view, NAME, SplitInterpreter)


class SplitInterpreter(GroupedInterpreter):
    """Adds counts of one-hot masks, Splits by them, and the sum of the pairs of each token."""

    splits = False
    baked: tuple[str, str] | None = None
    """A Split by constant counts: the node, and what is wrong with it."""

    @property
    def recognised(self) -> bool:
        """True when the sorted pairs were split."""
        return self.splits

    def wrong_export(self) -> tuple[str, str] | None:
        """Counts of the sample input that became constants."""
        return self.baked

    # Counting the pairs of each expert

    def _mask(self, expr: Expr) -> Expr | None:
        """The chosen experts of a mask (tokens, experts)."""
        hot = expr.args[0] if expr.op == "sum" else expr
        if hot.op != "one_hot":
            return None
        index: Expr = hot.args[0]
        return index if expr is self._sum_over(("k",) if "k" in index.atoms else (), hot) else None

    def _read_cast(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        numbers = ("perm", "pair_token", "pair_ratio")
        if value.expr.op in numbers and attribute(node, "to", 0) in _EXACT:
            return [value]
        return [value] if self._mask(value.expr) is not None else super()._read_cast(node)

    def _read_reducesum(self, node: NodeProto) -> list[Value]:
        mask = self._input(node, 0)
        index = self._mask(mask.expr)
        if index is None:
            return super()._read_reducesum(node)
        axes, gone = self._reduced(node, mask)
        if axes != (("e",),) or gone != self.tokens:
            return super()._read_reducesum(node)
        return [Value(axes, self.algebra.make("count", (index,), (), ("e",)))]

    def _read_gather(self, node: NodeProto) -> list[Value]:
        data = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(data.axes)
        index = self.view.small(node.input[1])
        if data.axes[axis] == () and index is not None and index.size == 1 and not index.any():
            middle = ((),) * index.ndim
            return [Value((*data.axes[:axis], *middle, *data.axes[axis + 1 :]), data.expr)]
        return super()._read_gather(node)

    def _read_concat(self, node: NodeProto) -> list[Value]:
        values = [self._input(node, i) for i in range(len(node.input))]
        counts = {v.expr.args[0] for v in values if v.expr.op == "picked"}
        if not any(c.op == "count" for c in counts):
            return super()._read_concat(node)
        order = [v.expr.params[0] for v in values if v.expr.op == "picked" and v.axes == ((),)]
        if len(counts) != 1 or order != list(range(self.sizes["e"] or 0)):
            raise Opaque("the numbers of pairs of all experts are not put together in order")
        return [Value((("e",),), counts.pop())]

    # The token of a pair: its number divided by k, in floating point, and cut

    def _read_div(self, node: NodeProto) -> list[Value]:
        values = super()._read_div(node)
        if values[0].expr.op != "pair_token":
            return values
        if self.view.types.element_type(node.input[0]) not in _FLOATS:
            return values
        return [Value(values[0].axes, self.algebra.make("pair_ratio", (), (), self.tokens))]

    def _ratio(self, node: NodeProto, made: Expr, otherwise: str) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op != "pair_ratio":
            raise Opaque(otherwise)
        return [Value(value.axes, made)]

    def _read_abs(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        return [value] if value.expr.op == "pair_ratio" else super()._read_abs(node)

    def _read_floor(self, node: NodeProto) -> list[Value]:
        token = self.algebra.make("pair_token", (), (), self.tokens)
        return self._ratio(node, token, "a Floor that no known pattern uses")

    def _read_sign(self, node: NodeProto) -> list[Value]:
        # 0 for pair 0, whose token is 0: the product with the token is the token all the same.
        return self._ratio(node, self.algebra.const(1), "a Sign that no known pattern uses")

    # Each expert's rows

    def _read_split(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(value.axes)
        if value.axes[axis] != ("p",):
            return super()._read_split(node)
        self.splits = True
        given = node.input[1] if len(node.input) > 1 else ""
        if not given or self._ints(given) is not None:
            self.baked = (
                describe(node),
                (
                    "the export is right for its sample input only: the numbers of tokens that"
                    " each expert serves are constants. Export again with"
                    " torch.onnx.export(dynamo=True), or replace the model's MoE modules by"
                    " moe_infer.torch.replace_moe"
                ),
            )
            raise Opaque(self.baked[1])
        counts = self._input(node, 1)
        if counts.expr.op != "count" or len(node.output) != self.sizes["e"]:
            raise Opaque("a Split of the pairs that is not by the number of each expert's")
        self.chosen = counts.expr.args[0]
        rest = value.axes[:axis], value.axes[axis + 1 :]
        return [
            Value((*rest[0], (f"g{e}",), *rest[1]), value.expr) for e in range(len(node.output))
        ]

    # The sum of each token's pairs

    def _read_scatternd(self, node: NodeProto) -> list[Value]:
        index = self._input(node, 1)
        adds = text_attribute(node, "reduction", "none") == "add"
        if index.expr.op != "pair_token" or index.axes != (("p",), ()) or not adds:
            return super()._read_scatternd(node)
        updates = self._input(node, 2)
        if updates.axes[:1] != (("p",),) or not self._zeros(node.input[0]):
            raise Opaque("a ScatterND that does not add the pairs to zeros")
        # It has as many rows as there are tokens, or the reshape that follows would fail.
        chosen = ("k",) if self.sizes["k"] else ()
        left: Axis = self.tokens
        return [Value((left, *updates.axes[1:]), self._sum_over(chosen, updates.expr))]
