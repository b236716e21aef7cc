"""Experts as a loop that was unrolled: each on the tokens that chose it.

What tracing makes of ``for expert in experts``: for each expert the rows of its one-hot mask
(NonZero) are the pairs (token, chosen expert) that it serves; the tokens are gathered, go through
the expert's own weights, are weighted and added to the rows from which they came (ScatterND,
ScatterElements). Mixtral, Qwen and OLMoE of transformers 4, optimum-onnx and Switch Transformers
are written so, with the weights of each expert as constants of their own.

Read here as: an axis ``r3`` of the rows of expert 3, on which values are what they are on the
pairs; the sum of all experts' rows is the sum over the chosen experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from onnx import NodeProto, TensorProto

from moe_infer.graph.apart import ApartInterpreter, leaves
from moe_infer.graph.expression import Expr, factors_of, terms_of
from moe_infer.graph.families.stacked import search
from moe_infer.graph.interpreter import Axis, Opaque, Value
from moe_infer.graph.match import GraphView, Match, NearMiss, attribute, describe, text_attribute

NAME = "unrolled"

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_EXACT = ("row", "row_pair", "rows", "hit_rows", "size", "picked", "kept", "within")
"""Whole numbers and masks that a Cast between types keeps, beside those known elsewhere."""


_EXPERT_NAME = re.compile(r"experts?[._/](?:expert_)?(\d+)\b")
"""As transformers names its modules: ``experts.3``, ``experts/expert_3``."""


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every block, or how far it went, in the order of the graph."""
    return search(view, NAME, LoopInterpreter)


def _list(numbers: Sequence[int]) -> str:
    shown = [str(n) for n in numbers[:12]]
    return ", ".join(shown) + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")


class LoopInterpreter(ApartInterpreter):
    """Adds the rows of each expert, and constants that belong to one expert."""

    DEMANDED = (*ApartInterpreter.DEMANDED, "ConstantOfShape")

    def __init__(self, view: GraphView, hidden_states: str, logits: str) -> None:
        """As :class:`Interpreter`."""
        super().__init__(view, hidden_states, logits)
        self.shape_axes: dict[Expr, tuple[Axis, ...]] = {}
        """Axes of the value whose shape an expression is."""
        self.masks: dict[Expr, tuple[Axis, ...]] = {}
        """Axes of the mask whose rows an expression lists."""
        self.passes: dict[int, int] = {}
        """Passes of a loop that has fewer than there are experts: their numbers, and how many."""
        self.mask_names: dict[Expr, str] = {}
        """Names of masks of the chosen experts from which some are taken out."""

    @property
    def recognised(self) -> bool:
        """True when the rows of an expert were found."""
        return bool(self.masks)

    # Constants of one expert

    def _constant(self, name: str) -> Value | None:
        tensor = self.view.constants.get(name)
        apart = tensor is not None and tensor.data_type in _FLOATS and len(tensor.dims) in (1, 2)
        small = self.view.small(name) if apart else None
        if tensor is None or not apart or (small is not None and small.size == 1):
            return super()._constant(name)
        # Of rank 2 it may also be a vector for each expert, which shows when it is picked.
        atoms = [f"{name}#{i + 1}" for i in range(len(tensor.dims))]
        self.sizes.update(zip(atoms, tensor.dims, strict=True))
        expr = self.algebra.make("matrix", (), (name,), atoms)
        return Value(tuple((a,) for a in atoms), expr)

    def pick(self, value: Value, axis: int, expert: int, keep: bool) -> Value:
        """Also of vectors that are stacked in one constant."""
        if value.expr.op == "matrix" and axis == 0 and len(value.axes) == 2:
            stacked = super()._constant(str(value.expr.params[0]))
            if stacked is not None and stacked.axes[0] == ("e",):
                value = stacked
        return super().pick(value, axis, expert, keep)

    # Shapes

    def _read_shape(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if any(a.name in ("start", "end") for a in node.attribute):
            raise Opaque("a part of a shape")
        expr = self.algebra.make("shape", (), (node.output[0],), ())
        self.shape_axes[expr] = value.axes
        return [Value(((),), expr)]

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
        if like is None or len(like) < len(value.axes):
            return super()._read_expand(node)
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
        return [value] if value.expr.op in _EXACT else super()._read_cast(node)

    def _read_nonzero(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op == "hit":
            return [Value(((), ("hit",)), self._rows("hit_rows", value))]
        if value.expr.op != "picked" or value.expr.args[0].op not in ("one_hot", "mul"):
            raise Opaque("a NonZero that is not of the mask of one expert")
        row = (f"r{value.expr.params[0]}",)
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
        if value.axes[axis] == ("hit",):
            return [self._hit(value, axis, i, len(node.output)) for i in range(len(node.output))]
        return super()._read_split(node)

    # Capacity: a token whose expert has enough tokens before it is served by none

    def _read_cumsum(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = self.view.ints(node.input[1])
        plain = not attribute(node, "exclusive", 0) and not attribute(node, "reverse", 0)
        if value.expr.op != "one_hot" or self.sizes["k"] or not axis or not plain:
            raise Opaque("a running sum that does not count the tokens of each expert")
        along = value.axes[axis[0]]
        if along != (self.tokens[-1],):
            raise Opaque("a running sum that is not along the tokens")
        return [Value(value.axes, self.algebra.make("running", (value.expr,), along))]

    def _within(self, node: NodeProto, more: int) -> list[Value]:
        running, limit = self._input(node, 0), self.view.ints(node.input[1])
        if running.expr.op != "running" or not limit or len(limit) != 1:
            raise Opaque("a comparison that no known pattern uses")
        params = (*running.expr.params, limit[0] + more)
        return [Value(running.axes, self.algebra.make("within", running.expr.args, params))]

    def _read_lessorequal(self, node: NodeProto) -> list[Value]:
        return self._within(node, 0)

    def _read_less(self, node: NodeProto) -> list[Value]:
        if self._input(node, 0).expr.op != "running":
            return super()._read_less(node)
        return self._within(node, -1)

    def _read_mul(self, node: NodeProto) -> list[Value]:
        values = super()._read_mul(node)
        expr = values[0].expr
        if {e.op for e in expr.args} == {"one_hot", "within"}:
            axes = (*((t,) for t in self.tokens), ("e",))
            if values[0].axes == axes and len(expr.args) == 2:
                self.mask_names.setdefault(expr, node.output[0])
        return values

    def outside(self, expr: Expr) -> tuple[Expr, dict[str, Any]]:
        """Takes the capacity's factor off, which becomes a product outside the layer."""
        factors = list(factors_of(expr))
        kept = [f for f in factors if f.op == "kept"]
        if len(kept) != 1:
            return expr, {}
        factors.remove(kept[0])
        return self.algebra.mul(factors), {"kept": self.mask_names[kept[0].args[0]]}

    # Loops over the experts that were chosen at all

    def _read_greater(self, node: NodeProto) -> list[Value]:
        value, zero = self._input(node, 0), self._input(node, 1)
        for mask in self._chosen_masks():
            if value.axes != (("e",),) or zero.expr is not self.algebra.const(0):
                break
            atoms = (*self.tokens, *(("k",) if "k" in mask.atoms else ()))
            sums = self._sum_over(atoms, mask), self._sum_over(atoms[::-1], mask)
            if value.expr in sums:
                return [Value(value.axes, self.algebra.make("hit", (mask,), (), ("e",)))]
        return super()._read_greater(node)

    def _chosen_masks(self) -> set[Expr]:
        """Masks of the chosen experts that were read."""
        found = {v.expr for v in self.env.values() if v.expr.op in ("one_hot", "mul")}
        return {e for e in found if "one_hot" in (e.op, *(a.op for a in e.args))}

    def _hit(self, value: Value, axis: int, number: int, count: int) -> Value:
        """The expert at which pass ``number`` of the loop works.

        When there is a pass for every expert the graph runs only if all of them are chosen (the
        Split fails otherwise), and then pass ``n`` is expert ``n``. With fewer passes it is that of
        the sample input, which the graph does not tell.
        """
        axes = (*value.axes[:axis], (), *value.axes[axis + 1 :])
        return Value(axes, self.algebra.make("pass", (value.expr,), (number, count), ()))

    def _read_gather(self, node: NodeProto) -> list[Value]:
        data = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(data.axes)
        small = self.view.small(node.input[1])
        if data.axes[axis] == ("coord",) and small is not None and small.size == 1:
            return [self._coordinate(data, axis, int(small.item()), keep=small.ndim > 0)]
        if data.expr.op == "shape" and small is not None and small.size == 1:
            return [self._dimension(self.shape_axes[data.expr], int(small.item()), small.ndim)]
        if data.axes[axis] == () and small is not None and small.size == 1 and not small.any():
            return [
                Value((*data.axes[:axis], *((),) * small.ndim, *data.axes[axis + 1 :]), data.expr)
            ]
        index = None if small is not None else self._input(node, 1)
        if index is not None and index.expr.op == "pass":
            number, count = (int(p) for p in index.expr.params)
            picked = self.pick(data, axis, number, keep=False)
            if count != self.sizes["e"]:
                self.passes[number] = count
            at = axis
            return [Value((*picked.axes[:at], *index.axes, *picked.axes[at:]), picked.expr)]
        return super()._read_gather(node)

    def _dimension(self, axes: tuple[Axis, ...], number: int, rank: int) -> Value:
        size = self._size(axes[number]) if -len(axes) <= number < len(axes) else None
        if size is None:
            raise Opaque("a dimension that is not known")
        return Value(((),) * rank, self.algebra.const(size))

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
        if not all(v.expr.op == "row" and v.axes[axis] == () for v in values):
            return super()._read_concat(node)
        sources = {v.expr.args[0] for v in values}
        left = {(*v.axes[:axis], *v.axes[axis + 1 :]) for v in values}
        if len(sources) != 1 or len(left) != 1 or axis != len(values[0].axes) - 1:
            raise Opaque("a Concat of rows of several experts")
        chosen = tuple(str(v.expr.params) for v in values)
        expr = self.algebra.make("row_pair", sources, chosen, ())
        self.masks[expr] = tuple(tuple(map(str, v.expr.params)) for v in values)
        return [Value((*left.pop(), ("coord",)), expr)]

    def _read_gathernd(self, node: NodeProto) -> list[Value]:
        data, index = self._input(node, 0), self._input(node, 1)
        if not index.axes or index.axes[-1] != ("coord",) or attribute(node, "batch_dims", 0):
            return super()._read_gathernd(node)
        wanted = self.masks.get(index.expr, ())
        if not wanted or data.axes[: len(wanted)] != wanted:
            raise Opaque("rows are taken of something with other axes than their mask")
        return [Value((*index.axes[:-1], *data.axes[len(wanted) :]), data.expr)]

    # Loops in which experts are missing

    def unfinished(self, expr: Expr) -> bool:
        """Sums of some experts' rows."""
        return any(t.op == "scattered" for t in terms_of(expr))

    def wrong_export(self) -> tuple[str, str] | None:
        """A loop in which the exporter recorded only the experts that its sample input chose."""
        count = self.sizes["e"]
        sums = [(n, v.expr) for n, v in self.env.items() if n in self.view.position]
        sums = [(n, e) for n, e in sums if all(t.op == "scattered" for t in terms_of(e))]
        if count is None or not sums:
            return None
        name, total = max(sums, key=lambda s: self.view.position[s[0]])
        there = {int(t.params[0]): t for t in terms_of(total)}
        served = {int(e.args[0].params[0]) for e in self.masks if e.op == "rows"}
        if served != set(there) or len(there) >= count or self._goes_on(name):
            return None
        numbers = sorted(there) if not self.passes else self._numbers(there.values())
        left = "" if numbers is None else _list(sorted(set(range(count)) - set(numbers)))
        missing = f" (missing: {left})" if left else ""
        node = describe(self.view.nodes[self.view.position[name]])
        return node, (
            f"the export holds {len(there)} of {count} experts{missing}: its loop was recorded with"
            " a sample input that chose no others, so a token that needs another one is computed"
            " wrongly, or the run fails. Export again with transformers 5 and"
            " experts_implementation='batched_mm', as `moe-infer export` does"
        )

    def _goes_on(self, name: str) -> bool:
        """Whether more is added to a sum of rows, in a way that could not be read."""
        for user in self.view.users.get(name, ()):
            node = self.view.nodes[user]
            makers = [self.view.producer(i) for i in node.input if i != name]
            adds = [m for m in makers if m is not None and m.op_type.startswith("Scatter")]
            if node.op_type.startswith("Scatter") or (node.op_type == "Add" and adds):
                return True
        return False

    def _numbers(self, terms: Iterable[Expr]) -> list[int] | None:
        """Experts' numbers by the names of the nodes that read their weights."""
        found = []
        for term in terms:
            names = {str(e.params[0]) for e in leaves(term) if e.op == "matrix"}
            users = [u for n in names for u in self.view.users.get(n, ())]
            texts = [n for u in users for n in (self.view.nodes[u].name, *self.view.nodes[u].input)]
            numbers = [int(m.group(1)) for t in texts for m in [_EXPERT_NAME.search(t)] if m]
            if not numbers:
                return None
            found.append(numbers[0])
        return found

    # Adding the experts' rows

    def _read_scatternd(self, node: NodeProto) -> list[Value]:
        data, index, updates = (self._input(node, i) for i in range(3))
        adds = text_attribute(node, "reduction", "none") == "add"
        if not adds and self.sizes["k"]:
            raise Opaque("a ScatterND that overwrites what another expert gave")
        if index.axes[-1] == ():
            rows = index.axes[:-1]
            fits = index.expr.op == "row" and index.expr.params == self.tokens
        else:
            rows = index.axes[:-1]
            fits = self.masks.get(index.expr) == tuple((t,) for t in self.tokens)
        if not fits or updates.axes[: len(rows)] != rows:
            raise Opaque("a ScatterND that does not write rows to the tokens they came from")
        return [self._scattered(data, index.expr, updates, len(rows))]

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
        return [self._scattered(data, index.expr, updates, 1)]

    def _scattered(self, data: Value, index: Expr, updates: Value, rows: int) -> Value:
        source = index if index.op == "rows" else index.args[0]
        mask = source.args[0]
        expert = int(mask.params[0])
        if updates.axes[:rows] != ((f"r{expert}",),):
            raise Opaque("rows of one expert are written to the tokens of another")
        made = self.algebra.make(
            "scattered",
            (mask.args[0], updates.expr),
            (expert,),
            (updates.expr.atoms - {"k"}) | set(self.tokens),
        )
        leading = (self.tokens,) if len(data.axes) == 2 else tuple((t,) for t in self.tokens)
        axes = (*leading, *updates.axes[rows:])
        if data.expr.op != "const" and data.axes != axes:
            raise Opaque("rows are added to something with other axes")
        return Value(axes, self._complete(self.algebra.add((data.expr, made))))

    def _read_add(self, node: NodeProto) -> list[Value]:
        return [Value(v.axes, self._complete(v.expr)) for v in super()._read_add(node)]

    def _complete(self, total: Expr) -> Expr:
        """The sum of all experts' rows as a sum over the chosen experts; else the same."""
        terms = terms_of(total)
        count = self.sizes["e"]
        if len(terms) != count or any(t.op != "scattered" for t in terms) or self.passes:
            return total
        experts = {int(t.params[0]): t for t in terms}
        masks = {t.args[0] for t in terms}
        if len(experts) != count or len(masks) != 1:
            return total
        mask = masks.pop()
        merged = self._merged(mask, [experts[e].args[1] for e in range(count)])
        if self.sizes["k"]:
            merged = self.algebra.sum("k", self.sizes["k"], merged)
        return merged

    def _merged(self, mask: Expr, experts: Sequence[Expr]) -> Expr:
        if mask.op == "one_hot":
            return self.merged(experts, mask.args[0])
        hot = [e for e in mask.args if e.op == "one_hot"]
        within = [e for e in mask.args if e.op == "within"]
        if (
            len(mask.args) != 2
            or len(hot) != 1
            or len(within) != 1
            or within[0].args[0] is not hot[0]
        ):
            raise Opaque("the experts' rows are not those of a mask of the chosen experts")
        merged = self.merged(experts, hot[0].args[0])
        along, limit = within[0].params
        size = self.sizes[str(along)]
        if size is not None and size <= int(limit):
            return merged
        if mask not in self.mask_names:
            raise Opaque("the mask of tokens within capacity is not (..., experts)")
        return self.algebra.mul((merged, self.algebra.make("kept", (mask,), (), self.tokens)))
