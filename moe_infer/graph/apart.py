"""Reads experts that stand apart in a graph: each computed by nodes of its own.

Each expert's part is read as an expression of its own, on the (token, chosen expert) pairs that
chose it. Once all experts are there and agree but for their weights, they become one expression on
stacked weights, the same that a graph with gathered weights gives, so that the patterns of
:mod:`moe_infer.graph.patterns` need not know how the experts were laid out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from onnx import NodeProto

from moe_infer.graph.expression import Algebra, Expr
from moe_infer.graph.interpreter import FLOATS, Opaque, Value
from moe_infer.graph.match import attribute
from moe_infer.graph.routing import RoutingInterpreter


class ApartInterpreter(RoutingInterpreter):
    """Adds one expert's slice of a stacked weight, and the merging of experts."""

    DEMANDED = (*RoutingInterpreter.DEMANDED, "Split", "Slice", "Gather")
    MOST_NODES = 200_000
    """An expert has up to 40 nodes in a traced graph, and a layer up to 1,024 experts."""

    def apart(self, name: str) -> Value | None:
        """A constant of one expert alone: a matrix or a vector; None if it is none."""
        tensor = self.view.constants.get(name)
        if tensor is None or tensor.data_type not in FLOATS or len(tensor.dims) not in (1, 2):
            return None
        elements, last = np.prod(tensor.dims, dtype=np.int64), tensor.dims[-1]
        if elements in (1, self.sizes["e"]) and last in (1, self.sizes["e"]):
            return None  # one number, or one for each expert: of the router
        atoms = [f"{name}#{i + 1}" for i in range(len(tensor.dims))]
        self.sizes.update(zip(atoms, tensor.dims, strict=True))
        expr = self.algebra.make("matrix", (), (name,), atoms)
        return Value(tuple((a,) for a in atoms), expr)

    def pick(self, value: Value, axis: int, expert: int, keep: bool) -> Value:
        """``value`` at one expert; the axis of the experts becomes one of size 1, or goes."""
        count = self.sizes["e"]
        if value.axes[axis] != ("e",) or count is None or not -count <= expert < count:
            raise Opaque("one entry is taken of an axis that is not that of the experts")
        middle = ((),) if keep else ()
        axes = (*value.axes[:axis], *middle, *value.axes[axis + 1 :])
        atoms = value.expr.atoms - {"e"}
        made = self.algebra.make("picked", (value.expr,), (expert % count,), atoms)
        return Value(axes, made)

    def _read_split(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(value.axes)
        if value.axes[axis] != ("e",):
            return super()._read_split(node)
        if len(node.output) != self.sizes["e"]:
            raise Opaque("a Split of the experts that is not into single ones")
        return [self.pick(value, axis, e, keep=True) for e in range(len(node.output))]

    def _read_slice(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        bounds = [self.view.ints(node.input[i]) for i in (1, 2, 3) if i < len(node.input)]
        if len(bounds) == 3 and all(b is not None and len(b) == 1 for b in bounds):
            start, end, axis = (b[0] for b in bounds if b)
            axis %= len(value.axes)
            if value.axes[axis] == ("e",) and start >= 0 and end == start + 1:
                return [self.pick(value, axis, start, keep=True)]
        return super()._read_slice(node)

    def _read_gather(self, node: NodeProto) -> list[Value]:
        data = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(data.axes)
        index = self.view.small(node.input[1])
        if data.axes[axis] == ("e",) and index is not None and index.size == 1:
            return [self.pick(data, axis, int(index.ravel()[0]), keep=index.ndim > 0)]
        return super()._read_gather(node)

    def _read_gemm(self, node: NodeProto) -> list[Value]:
        factors = {a.name: a.f for a in node.attribute if a.name in ("alpha", "beta")}
        if any(f != 1.0 for f in factors.values()) or attribute(node, "transA", 0):
            raise Opaque("a Gemm with a factor or a transposed first operand")
        a, b = self._input(node, 0), self._input(node, 1)
        if attribute(node, "transB", 0):
            b = Value(b.axes[::-1], b.expr)
        if len(a.axes) != 2 or len(b.axes) != 2:
            raise Opaque("a Gemm of operands that are not matrices")
        expr, out = self._contract(a, b, a.axes[-1], b.axes[-2])
        axes = tuple(out.get(g, g) for g in (a.axes[0], b.axes[1]))
        product = Value(axes, expr)
        if len(node.input) < 3 or not node.input[2]:
            return [product]
        bias = self._input(node, 2)
        return [Value(self._align([product, bias]), self.algebra.add((expr, bias.expr)))]

    # Merging

    def merged(self, experts: Sequence[Expr], index: Expr) -> Expr:
        """One expression on stacked weights, of each expert's expression on its own.

        Args:
            experts: expression of expert ``e`` at position ``e``.
            index: the chosen expert, with which the stacked weights are gathered.

        Raises:
            Opaque: the experts differ in more than their weights.
        """
        weights = [leaves(e) for e in experts]
        if not weights[0]:
            raise Opaque("an expert without constant weights of its own")
        users = Counter(str(e.params[0]) for own in weights for e in own if e.op == "matrix")
        shared = [name for name, count in users.items() if count > 1]
        if shared:
            raise Opaque(f"several experts read the weight '{shared[0]}'")
        if len({len(each) for each in weights}) != 1:
            raise Opaque("the experts have different numbers of weights")
        stacked = [
            self.algebra.gathered(self._stack(column), index)
            for column in zip(*weights, strict=True)
        ]
        first: Expr | None = None
        for e, (expert, own) in enumerate(zip(experts, weights, strict=True)):
            made = substituted(self.algebra, expert, dict(zip(own, stacked, strict=True)))
            if first is not None and made is not first:
                raise Opaque(f"expert {e} computes something else than expert 0")
            first = made
        assert first is not None
        return first

    def _stack(self, entries: Sequence[Expr]) -> Expr:
        """The stacked weight whose entries these are; made here when they are constants apart."""
        if all(entry.op == "picked" for entry in entries):
            sources = {entry.args[0] for entry in entries}
            order = [entry.params[0] for entry in entries]
            if len(sources) != 1 or order != list(range(len(entries))):
                raise Opaque(f"the experts read the slices {order} of their stacked weights")
            source = sources.pop()
            if source.op != "weight":
                raise Opaque("the experts' weights are slices of something not constant")
            return source
        if any(entry.op == "picked" for entry in entries):
            raise Opaque("some experts' weights are stacked and others are not")
        names = tuple(str(entry.params[0]) for entry in entries)
        ranks = {len(entry.atoms) for entry in entries}
        shapes = {tuple(self.sizes[f"{name}#{i + 1}"] for i in range(min(ranks))) for name in names}
        if len(ranks) != 1 or len(shapes) != 1:
            raise Opaque(f"the weights {names[0]}, {names[1]}, ... differ in shape")
        return self._virtual(names, shapes.pop())

    def _virtual(self, names: tuple[str, ...], shape: tuple[int | None, ...]) -> Expr:
        name = f"{names[0]} and {len(names) - 1} more"
        self.stacks[name] = names
        atoms = ["e", *(f"{name}#{i + 1}" for i in range(len(shape)))]
        self.sizes.update(zip(atoms[1:], shape, strict=True))
        return self.algebra.make("weight", (), (name,), atoms)


def leaves(expr: Expr) -> list[Expr]:
    """One expert's own constants, in the order in which they were read first."""
    found: set[Expr] = set()
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        e = stack.pop()
        if e in seen:
            continue
        seen.add(e)
        if e.op == "matrix" or (e.op == "picked" and e.args[0].op == "weight"):
            found.add(e)
        else:
            stack += e.args
    return sorted(found, key=lambda e: e.serial)


def substituted(algebra: Algebra, expr: Expr, mapping: dict[Expr, Expr]) -> Expr:
    """The expression with weights replaced, in normal form.

    A new weight brings the axes of the index that chooses it, and its stored axes take the place of
    the old one's.
    """
    done: dict[Expr, Expr] = dict(mapping)
    renamed: dict[str, str] = {}
    grown: set[str] = set()
    for old, new in mapping.items():
        stored = sorted(a for a in new.atoms if "#" in a)
        renamed.update(zip(sorted(a for a in old.atoms if "#" in a), stored, strict=True))
        grown |= {a for a in new.atoms if "#" not in a}
    again: dict[str, Callable[[list[Expr]], Expr]] = {"mul": algebra.mul, "add": algebra.add}

    def visit(e: Expr) -> Expr:
        if e not in done:
            args = [visit(a) for a in e.args]
            if all(a is b for a, b in zip(args, e.args, strict=True)):
                done[e] = e
            elif e.op in again:
                done[e] = again[e.op](args)
            else:
                atoms = {renamed.get(a, a) for a in e.atoms} | grown
                done[e] = algebra.make(e.op, args, e.params, atoms)
        return done[e]

    return visit(expr)
