"""Reads a part of a graph as expressions without layout.

Every axis of a value is a tuple of atoms: ``("t", "k")`` is the flattened axis of (token, chosen
expert) pairs, ``()`` an axis of size 1. A reshape keeps the order of all atoms and only regroups
them, so that Reshape, Unsqueeze, Squeeze, Expand and Transpose leave the expression as it is, and
whatever mixes axes in another way is refused with its reason.

Atoms: the tokens (``t``, or ``b`` and ``s``), ``k`` chosen experts, ``e`` experts, which are ``g``
groups of ``i`` where the graph groups them, ``d`` hidden states, ``h{size}`` intermediate,
``{weight}#{axis}`` of a stored weight.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from moe_infer.graph.expression import Algebra, Expr, chosen_atom, index_axis, is_index
from moe_infer.graph.match import GraphView, attribute, describe, text_attribute
from moe_infer.graph.shape_values import ShapeValues

Axis = tuple[str, ...]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_INDEX_OPS = ("top_index", "stack", "tokens", "arange_e", "one_hot", "const")
_NOT_READ = ("Shape", "Size")
"""They are evaluated where a shape is needed."""
_DEMANDED = (
    "Cast",
    "Transpose",
    "Identity",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Flatten",
    "Expand",
    "Tile",
    "Range",
    "Constant",
)


_ARITY = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Equal", "Greater", "Less"), 2),
    "Where": 3,
}


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


class Interpreter:
    """Reads a graph from two named values on: hidden states and router logits."""

    DEMANDED: tuple[str, ...] = _DEMANDED
    """Operators read also when only constants or shapes feed them."""
    MOST_NODES = 4000
    """Nodes read from one starting point; a MoE block on stacked weights has a few dozen."""

    def __init__(self, view: GraphView, hidden_states: str, logits: str) -> None:
        """Starts at two tensors of rank 2 or 3; logits of rank 2 may go with hidden states of 3.

        Raises:
            Opaque: their shapes are not known well enough.
        """
        self.view, self.algebra = view, Algebra()
        self.env: dict[str, Value] = {}
        self.opaque: dict[int, str] = {}
        self.top_nodes: dict[Expr, NodeProto] = {}
        self.stacks: dict[str, tuple[str, ...]] = {}
        """Names given to weights that lie apart in the graph, one constant for each expert."""
        self.shapes = ShapeValues(view, self.dims)
        shape, scores = view.types.shape(hidden_states), view.types.shape(logits)
        if (
            shape is None
            or scores is None
            or (len(shape), len(scores)) not in ((2, 2), (3, 2), (3, 3))
        ):
            raise Opaque(f"'{hidden_states}' and '{logits}' have no common rank of 2 or 3")
        d, e = shape[-1], scores[-1]
        if not isinstance(d, int) or not isinstance(e, int) or e < 2 or d < 2:
            raise Opaque(f"the last dimensions of '{hidden_states}' and '{logits}' are not known")
        self.tokens: Axis = ("t",) if len(shape) == 2 else ("b", "s")
        self.sizes: dict[str, int | None] = {"d": d, "e": e, "k": None}
        for atom, size in zip(self.tokens, shape, strict=False):
            self.sizes[atom] = size if isinstance(size, int) else None
        flat = len(scores) == 2
        apart = tuple((a,) for a in self.tokens)
        leading: tuple[Axis, ...] = (self.tokens,) if flat else apart
        self.x = self.algebra.make("hidden_states", (), (), (*self.tokens, "d"))
        self.logits = self.algebra.make("router_logits", (), (), (*self.tokens, "e"))
        self.env[hidden_states] = Value((*apart, ("d",)), self.x)
        self.env[logits] = Value((*leading, ("e",)), self.logits)
        self.output_axes = (*leading, ("d",))
        self.apart_axes = (*apart, ("d",))
        """The same with each axis of the tokens for itself, as the input may lie."""

    def expect(self, anchor: NodeProto) -> None:
        """Tells how many experts a TopK chooses, before nodes that stand in front of it are read.

        Tokens may be repeated before the experts are chosen, and with one group of experts the best
        two of it are looked for, which chooses nothing.
        """
        dims = self.view.types.shape(anchor.input[0])
        if anchor.op_type != "TopK" or len(anchor.input) < 2 or not dims:
            return
        count, axis = self._ints(anchor.input[1]), attribute(anchor, "axis", -1)
        largest = attribute(anchor, "largest", 1) and -len(dims) <= axis < len(dims)
        if count and count[0] > 1 and largest and dims[axis] == self.sizes["e"]:
            self.sizes["k"] = count[0]

    def run(self) -> None:
        """Reads every node that follows from the two values, in the graph's order."""
        heap = sorted({i for name in self.env for i in self.view.users.get(name, ())})
        seen = set(heap)
        for _ in range(self.MOST_NODES):
            if not heap:
                return
            index = heapq.heappop(heap)
            for output in self._read(index):
                for user in self.view.users.get(output, ()):
                    if user not in seen:
                        seen.add(user)
                        heapq.heappush(heap, user)

    def value(self, name: str) -> Value | None:
        """What a tensor is, if it can be read: from the start, a constant, or a token index."""
        if name in self.env:
            return self.env[name]
        constant = self._constant(name)
        if constant is not None:
            self.env[name] = constant
            return constant
        index = self.view.position.get(name)
        if index is None or self.view.nodes[index].op_type not in self.DEMANDED:
            return None
        if index not in self.opaque:
            self._read(index)
        return self.env.get(name)

    def _read(self, index: int) -> list[str]:
        node = self.view.nodes[index]
        reader: Callable[[NodeProto], list[Value]] | None = None
        if node.domain in ("", "ai.onnx"):
            reader = getattr(self, f"_read_{node.op_type.lower()}", None)
        outputs = [o for o in node.output if o]
        if reader is None and node.op_type in _NOT_READ:
            return []
        if all(o in self.env for o in outputs):
            return outputs
        try:
            if reader is None:
                raise Opaque(f"{node.op_type} is no part of a MoE block that is known")
            values = reader(node)
            for value in values:
                if len(set(value.atoms)) != len(value.atoms):
                    raise Opaque("the same axis appears twice in the result")
        except Opaque as reason:
            self.opaque[index] = str(reason)
            return []
        except (IndexError, KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            # Too few inputs, an axis that there is not: nothing has checked the model before.
            self.opaque[index] = f"the node is malformed ({type(error).__name__}: {error})"
            return []
        self.env.update(zip(node.output, values, strict=False))
        return outputs

    def _input(self, node: NodeProto, position: int) -> Value:
        name = node.input[position] if position < len(node.input) else ""
        value = self.value(name) if name else None
        if value is None:
            if name in self.view.graph_inputs:
                raise Opaque(f"its input '{name}' is an input of the graph, not a constant")
            raise Opaque(f"its input '{name}' does not come from the layer's input or a constant")
        return value

    def dims(self, name: str) -> tuple[int | str | None, ...] | None:
        """Dimensions of a tensor, from the graph's types or, where these end, from its axes."""
        stated = self.view.types.shape(name)
        value = self.env.get(name)
        if value is None:
            return stated
        sizes = tuple(map(self._size, value.axes))
        if stated is None or len(stated) != len(sizes):
            return sizes
        return tuple(n if n is not None else s for s, n in zip(stated, sizes, strict=True))

    def _size(self, axis: Axis) -> int | None:
        total = 1
        for atom in axis:
            size = self.sizes.get(atom)
            if size is None:
                return None
            total *= size
        return total

    # Constants

    def _constant(self, name: str) -> Value | None:
        view, algebra, experts = self.view, self.algebra, self.sizes["e"]
        small = view.small(name)
        if small is not None and small.size == 1:
            return Value(((),) * small.ndim, algebra.const(float(small.ravel()[0])))
        if (
            small is not None
            and small.size == experts
            and np.array_equal(small.ravel(), np.arange(experts))
        ):
            axes = tuple(("e",) if n == experts else () for n in small.shape)
            return Value(axes, algebra.make("arange_e", (), (), ("e",)))
        if small is not None and small.dtype.kind == "i":
            return self._constant_token_index(small.ravel(), small.shape)
        tensor = view.constants.get(name)
        if tensor is None or tensor.data_type not in FLOATS:
            return None
        single = tensor.data_type != TensorProto.DOUBLE
        if single and tensor.dims and list(tensor.dims) == [*[1] * (len(tensor.dims) - 1), experts]:
            axes = (*((),) * (len(tensor.dims) - 1), ("e",))
            return Value(axes, algebra.make("vector", (), (name,), ("e",)))
        if len(tensor.dims) < 2 or tensor.dims[0] != experts:
            return None
        dims = [n for n in tensor.dims[1:] if n != 1]
        atoms = ["e", *(f"{name}#{i + 1}" for i in range(len(dims)))]
        self.sizes.update(zip(atoms, (experts, *dims), strict=True))
        expr = algebra.make("weight", (), (name,), atoms)
        # An axis of size 1 is there to be repeated.
        rest = iter(atoms[1:])
        return Value((("e",), *((next(rest),) if n != 1 else () for n in tensor.dims[1:])), expr)

    def _constant_token_index(self, values: np.ndarray, shape: tuple[int, ...]) -> Value | None:
        # With static shapes the exporter folds the token of each pair into a constant.
        tokens = self._size(self.tokens)
        if not tokens or values.size % tokens:
            return None
        repeat = values.size // tokens
        if not np.array_equal(values, np.arange(tokens).repeat(repeat)):
            return None
        if repeat not in (1, self.sizes["k"]):
            return None
        flat = (*self.tokens, *(("k",) if repeat > 1 else ()))
        value = Value((flat,), self.algebra.make("tokens", (), (), self.tokens))
        return self._regroup(value, list(shape))

    def _read_constant(self, node: NodeProto) -> list[Value]:
        raise Opaque("a constant that no known pattern uses")

    def _read_range(self, node: NodeProto) -> list[Value]:
        start, step = (self.view.small(node.input[i]) for i in (0, 2))
        if start is None or step is None or start.ravel()[0] != 0 or step.ravel()[0] != 1:
            raise Opaque("a Range that does not count tokens from 0 by 1")
        # Its end is computed from shapes. If it were not the number of tokens, the original graph
        # would fail in its last reshape or give another number of rows than it was given.
        return [Value((self.tokens,), self.algebra.make("tokens", (), (), self.tokens))]

    # Layout

    def _read_identity(self, node: NodeProto) -> list[Value]:
        return [self._input(node, 0)]

    def _read_cast(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if attribute(node, "to", 0) not in FLOATS and value.expr.op not in _INDEX_OPS:
            raise Opaque("a Cast of floating-point values to another kind")
        return [value]

    def _read_transpose(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        given = [list(a.ints) for a in node.attribute if a.name == "perm"]
        order = given[0] if given else list(range(len(value.axes)))[::-1]
        return [Value(tuple(value.axes[i] for i in order), value.expr)]

    def _ints(self, name: str) -> list[int] | None:
        """Values of a small integer tensor, constant or computed from known dimensions."""
        found = self.shapes.ints(name)
        if found is None or any(v is None for v in found):
            return None
        return [v for v in found if v is not None]

    def _target(self, node: NodeProto) -> list[int | None] | None:
        """Dimensions that a node's second input asks for, or else those of its output."""
        asked = self.shapes.ints(node.input[1])
        stated = self.view.types.shape(node.output[0])
        known = None if stated is None else [n if isinstance(n, int) else None for n in stated]
        if asked is None or known is None or len(asked) != len(known):
            return known if asked is None else asked
        return [k if a is None else a for a, k in zip(asked, known, strict=True)]

    def _axes(self, node: NodeProto, rank: int, position: int = 1) -> list[int]:
        given = [list(a.ints) for a in node.attribute if a.name == "axes"]
        axes = given[0] if given else None
        if axes is None and len(node.input) > position and node.input[position]:
            axes = self._ints(node.input[position])
            if axes is None:
                raise Opaque("axes that are not constant")
        if axes is None:
            raise Opaque("no axes are given")
        if any(not -rank <= a < rank for a in axes):
            raise Opaque(f"axes {axes} are outside rank {rank}")
        return sorted(a % rank for a in axes)

    def _read_unsqueeze(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        count = (
            len(self._axes(node, 64))
            if len(node.input) < 2
            else len(self._ints(node.input[1]) or ())
        )
        axes = self._axes(node, len(value.axes) + count)
        rest = iter(value.axes)
        return [
            Value(
                tuple(() if i in axes else next(rest) for i in range(len(value.axes) + count)),
                value.expr,
            )
        ]

    def _read_squeeze(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axes = self._axes(node, len(value.axes))
        if any(value.axes[a] for a in axes):
            raise Opaque("a Squeeze of an axis that is not known to have size 1")
        return [Value(tuple(a for i, a in enumerate(value.axes) if i not in axes), value.expr)]

    def _read_reshape(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        target = self._target(node)
        if target is None:
            raise Opaque("a Reshape whose result has no known shape")
        if not attribute(node, "allowzero", 0):
            # A 0 copies the input's dimension.
            for i, n in enumerate(target):
                if n == 0:
                    target[i] = self._size(value.axes[i]) if i < len(value.axes) else None
        return [self._regroup(value, target)]

    def _read_flatten(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        rank, axis = len(value.axes), attribute(node, "axis", 1)
        if not -rank <= axis <= rank:
            raise Opaque(f"a Flatten at axis {axis} of rank {rank}")
        axis = axis % rank if axis < rank else rank
        halves = (value.axes[:axis], value.axes[axis:])
        return [Value(tuple(_joined(a for g in half for a in g) for half in halves), value.expr)]

    def _regroup(self, value: Value, target: Sequence[int | None]) -> Value:
        atoms = list(_joined(value.atoms))
        dims = [None if n is None or n < 0 else n for n in target]
        right: list[Axis] = []
        while dims and dims[-1] is not None:
            right.insert(0, self._take(atoms, dims.pop(), -1))
        left: list[Axis] = []
        while dims and dims[0] is not None:
            left.append(self._take(atoms, dims.pop(0), 0))
        if not dims:
            if atoms:
                raise Opaque(f"a Reshape to {list(target)} leaves out axes {atoms}")
            return Value((*left, *right), value.expr)
        if len(dims) == 1:
            return Value((*left, tuple(atoms), *right), value.expr)
        if len(dims) == len(atoms) and all(n is None for n in dims):
            return Value((*left, *((a,) for a in atoms), *right), value.expr)
        raise Opaque(f"a Reshape to {list(target)} regroups axes {value.axes} in a way not known")

    def _take(self, atoms: list[str], size: int | None, end: int) -> Axis:
        taken: list[str] = []
        product = 1
        while size is not None and product < size:
            if not atoms:
                raise Opaque("a Reshape to more elements than there are")
            atom = atoms.pop(end)
            known = self.sizes.get(atom)
            if known is None:
                raise Opaque(f"a Reshape that gives the axis {atom} a fixed size")
            if atom == "e" and not taken and size < known:
                kept, rest = self._grouped(size, end)
                atoms.insert(len(atoms) if end == -1 else 0, rest)
                atom, known = kept, size
            taken.append(atom)
            product *= known
        if product != size:
            raise Opaque(f"a Reshape that cuts the axis {taken} into pieces of {size}")
        return tuple(taken if end == 0 else taken[::-1])

    def _grouped(self, size: int, end: int) -> tuple[str, str]:
        """Cuts the axis of the experts into groups; the part of this size, and the other one."""
        experts = self.sizes["e"]
        assert experts is not None
        if size < 1 or experts % size:
            raise Opaque(f"a Reshape that cuts {experts} experts into pieces of {size}")
        groups, members = (size, experts // size) if end == 0 else (experts // size, size)
        if self.sizes.setdefault("g", groups) != groups:
            raise Opaque(f"the experts are grouped by {groups} and by {self.sizes['g']}")
        self.sizes["i"] = members
        return ("g", "i") if end == 0 else ("i", "g")

    def _read_expand(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        shape = self._target(node)
        if shape is None or len(shape) < len(value.axes):
            raise Opaque("an Expand whose result has no known shape")
        return [self._repeated(value, shape)]

    def _read_tile(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        repeats = self.shapes.ints(node.input[1])
        if repeats is None or len(repeats) != len(value.axes):
            raise Opaque("a Tile with repetitions that are not known")
        whole, left = list(value.axes), list(repeats)
        for i, (axis, count) in enumerate(zip(value.axes, repeats, strict=True)):
            if axis and count == self.sizes["e"] and "e" not in value.atoms:
                whole[i], left[i] = ("e", *axis), 1  # all of it for each expert, in their order
            elif axis and count != 1:
                raise Opaque(f"a Tile that repeats the axis {axis}")
        return [self._repeated(Value(tuple(whole), value.expr), left)]

    def _repeated(self, value: Value, shape: Sequence[int | None]) -> Value:
        """Repeats axes of size 1 to the sizes given; None: a size that depends on the tokens."""
        axes = [()] * (len(shape) - len(value.axes)) + list(value.axes)
        for i, size in enumerate(shape):
            if axes[i] or size == 1:
                continue
            if i and axes[i - 1] == ("g",) and size == self.sizes["i"]:
                axes[i] = ("i",)
            elif size is not None and size in (self.sizes["k"], self.sizes["e"]):
                atom = "k" if size == self.sizes["k"] and "k" not in value.atoms else "e"
                axes[i] = (atom,)
            elif size is None and i == 0 and not set(self.tokens) & set(value.atoms):
                axes[i] = self.tokens
            else:
                raise Opaque(f"values are repeated to {list(shape)}, along an axis not known")
        return Value(tuple(axes), value.expr)

    def _half(self, value: Value, axis: int, start: int, step: int, count: int) -> Value:
        group = value.axes[axis]
        size = self._size(group)
        if size is None or len(group) != 1:
            raise Opaque("a part is taken of an axis whose size is not known")
        if (start, step, count) == (0, 1, size):
            return value
        if count * 2 != size or (step, start) not in ((1, 0), (1, count), (2, 0), (2, 1)):
            raise Opaque(f"{count} of {size} are taken, from {start} by {step}: not one half")
        if group[0] in ("t", "b", "s", "k", "e", "d") or "#" in group[0]:
            raise Opaque(f"a half of the axis {group[0]} is taken")
        atom = f"h{count}"
        self.sizes[atom] = count
        atoms = value.expr.atoms - set(group) | {atom}
        expr = self.algebra.make("half", (value.expr,), (start, step, count), atoms)
        return Value((*value.axes[:axis], (atom,), *value.axes[axis + 1 :]), expr)

    def _read_split(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(value.axes)
        sizes = self._ints(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        total = self._size(value.axes[axis])
        if (
            len(node.output) != 2
            or total is None
            or (sizes is not None and sizes != [total // 2] * 2)
        ):
            raise Opaque("a Split that is not into two halves")
        return [self._half(value, axis, start, 1, total // 2) for start in (0, total // 2)]

    def _read_slice(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        starts, ends = (self._ints(node.input[i]) for i in (1, 2))
        if starts is None or ends is None or len(starts) != 1 or len(node.input) < 4:
            raise Opaque("a Slice of more than one axis, or with bounds that are not constant")
        axis = self._axes(node, len(value.axes), 3)[0]
        steps = self._ints(node.input[4]) if len(node.input) > 4 else [1]
        size = self._size(value.axes[axis])
        if size is None or not steps or steps[0] < 1:
            raise Opaque("a Slice of an axis whose size is not known")
        start, stop, step = slice(starts[0], ends[0], steps[0]).indices(size)
        return [self._half(value, axis, start, step, len(range(start, stop, step)))]

    # Arithmetic

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

    # Reductions and products

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
        elif any(_is_weight(v) for v in values):
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
        if _is_weight(a) and _is_weight(b):
            raise Opaque("a product of two weights")
        if not _is_weight(a) and not _is_weight(b):
            group = self._same([left, right])
            return self._sum_over(group, self.algebra.mul((a.expr, b.expr))), {}
        weight, x, stored, used = (a, b, left, right) if _is_weight(a) else (b, a, right, left)
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

    # Routing

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

    def _zeros(self, name: str) -> bool:
        return self._filled(name) == 0

    def _filled(self, name: str) -> float | None:
        """The number of which a tensor consists, of whatever shape."""
        small = self.view.small(name)
        if small is not None:
            values = set(small.ravel().tolist())
            return float(values.pop()) if len(values) == 1 else None
        node = self.view.producer(name)
        if node is None:
            return None
        if node.op_type in ("Expand", "Cast", "Identity", "Reshape"):
            return self._filled(node.input[0])
        if node.op_type == "ConstantOfShape":
            given = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
            return float(given[0].ravel()[0]) if given and given[0].size else 0.0
        return None

    @property
    def recognised(self) -> bool:
        """Whether what makes the family was there; otherwise it has nothing to say."""
        return True

    def unfinished(self, expr: Expr) -> bool:
        """Whether a value is known to be a step on the way to a layer's output."""
        return False

    def wrong_export(self) -> tuple[str, str] | None:
        """Whether the exporter left a part of the layer out: the node that shows it, and how."""
        return None

    def outside(self, expr: Expr) -> tuple[Expr, dict[str, Any]]:
        """A layer's output without what stays outside the layer, and what that is.

        Returns:
            the rest, and fields of :class:`moe_infer.graph.match.Match`.
        """
        return expr, {}

    def describe_opaque(self, index: int) -> tuple[str, str]:
        """A node that was not read: its description and the reason."""
        return describe(self.view.nodes[index]), self.opaque[index]


def _is_weight(value: Value) -> bool:
    return value.expr.op in ("weight", "gathered", "picked", "matrix")


def _joined(atoms: Iterable[str]) -> Axis:
    """Atoms in order, groups and their members together as experts again."""
    joined: list[str] = []
    for atom in atoms:
        if atom == "i" and joined[-1:] == ["g"]:
            joined[-1] = "e"
        else:
            joined.append(atom)
    return tuple(joined)
