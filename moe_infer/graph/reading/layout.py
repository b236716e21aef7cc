"""Operators that only move, cut or repeat what a tensor holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnx import NodeProto

from moe_infer.graph.match import attribute
from moe_infer.graph.reading.reader import Reader
from moe_infer.graph.reading.value import FLOATS, Axis, Opaque, Value

_INDEX_OPS = ("top_index", "stack", "tokens", "arange_e", "one_hot", "const")
"""Of values that stay what they are in a type of whole numbers."""


class LayoutReader(Reader):
    """Adds layout: expressions stay, their axes are regrouped."""

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


def _joined(atoms: Iterable[str]) -> Axis:
    """Atoms in order, groups and their members together as experts again."""
    joined: list[str] = []
    for atom in atoms:
        if atom == "i" and joined[-1:] == ["g"]:
            joined[-1] = "e"
        else:
            joined.append(atom)
    return tuple(joined)
