"""Values of the small integer tensors with which graphs compute shapes, as far as they are known.

Exporters write a target shape as a chain of Shape, Gather, Concat and arithmetic. Shape inference
gives up on some of these (OneHot, divisions), and then every later dimension is lost. Here a value
is an array whose entries are integers or None where they depend on a symbolic dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from moe_infer.graph.match import GraphView, attribute

Entries = NDArray[np.object_]
Dims = Sequence[int | str | None]

MOST_ENTRIES = 64
"""A shape has a handful."""

_DEEPEST = 64
"""Nodes one behind the other; such a chain has about ten."""


class ShapeValues:
    """Evaluates integer tensors of a graph on demand."""

    def __init__(self, view: GraphView, dims: Callable[[str], Dims | None]) -> None:
        """``dims`` gives a tensor's dimensions; None when its rank is not known."""
        self._view, self._dims = view, dims
        self._known: dict[str, Entries | None] = {}

    def ints(self, name: str) -> list[int | None] | None:
        """Entries in order; None when the tensor cannot be evaluated at all."""
        found = self._value(name, 0)
        return None if found is None else [None if v is None else int(v) for v in found.ravel()]

    def array(self, name: str) -> NDArray[np.int64] | None:
        """The tensor, where all of its entries are known."""
        found = self._value(name, 0)
        if found is None or any(v is None for v in found.ravel()):
            return None
        return found.astype(np.int64)

    def _value(self, name: str, depth: int) -> Entries | None:
        if name not in self._known:
            self._known[name] = None  # a graph with a cycle is answered too
            found = self._compute(name, depth) if depth < _DEEPEST else None
            if found is not None and found.size <= MOST_ENTRIES:
                self._known[name] = found
        return self._known[name]

    def _compute(self, name: str, depth: int) -> Entries | None:
        small = self._view.small(name)
        if small is not None:
            integral = small.dtype.kind in "iub" and small.size <= MOST_ENTRIES
            return small.astype(object) if integral else None
        node = self._view.producer(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Shape":
            return self._shape(node)
        operation = _OPERATIONS.get(node.op_type)
        if operation is None:
            return None
        values = [self._value(i, depth + 1) if i else None for i in node.input]
        if not values or values[0] is None:
            return None
        try:
            made = operation(node, values)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
            return None  # an invalid graph, or an entry that is needed and not known
        return None if made is None else np.asarray(made, object)

    def _shape(self, node: NodeProto) -> Entries | None:
        dims = self._dims(node.input[0])
        if dims is None:
            return None
        start, end = attribute(node, "start", 0), attribute(node, "end", len(dims))
        return np.array([d if isinstance(d, int) else None for d in dims][start:end], object)


Values = Sequence[Entries | None]


def _all(values: Values) -> list[Entries]:
    found = [v for v in values if v is not None]
    if len(found) != len(values):
        raise ValueError("an operand is not known")
    return found


def _known(value: Entries | None) -> list[int]:
    """Entries of an operand that must be known."""
    if value is None or any(v is None for v in value.ravel()):
        raise ValueError("an entry is not known")
    return [int(v) for v in value.ravel()]


def _given_axes(node: NodeProto, values: Values) -> list[int]:
    for a in node.attribute:
        if a.name == "axes":
            return list(a.ints)
    return _known(values[1])


def _elementwise(function: Callable[[int, int], Any]) -> Callable[[NodeProto, Values], Entries]:
    def one(a: int | None, b: int | None) -> Any:
        return None if a is None or b is None else function(a, b)

    def run(node: NodeProto, values: Values) -> Entries:
        return np.asarray(np.frompyfunc(one, 2, 1)(*_all(values)), object)

    return run


def _quotient(a: int, b: int) -> int:
    """Towards zero, as ONNX divides integers."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _gather(node: NodeProto, values: Values) -> Entries:
    data, index = _all(values)
    if any(i is None for i in index.ravel()):
        raise ValueError("an index is not known")
    return np.asarray(np.take(data, index.astype(np.int64), attribute(node, "axis", 0)), object)


def _slice(node: NodeProto, values: Values) -> Entries:
    data = values[0]
    assert data is not None
    starts, ends = _known(values[1]), _known(values[2])
    axes = _known(values[3]) if len(values) > 3 and node.input[3] else list(range(len(starts)))
    steps = _known(values[4]) if len(values) > 4 and node.input[4] else [1] * len(starts)
    cut = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis] = slice(start, end, step)
    return data[tuple(cut)]


def _reshape(node: NodeProto, values: Values) -> Entries:
    data, target = values[0], _known(values[1])
    assert data is not None
    return data.reshape(target)


def _squeeze(node: NodeProto, values: Values) -> Entries:
    data = values[0]
    assert data is not None
    if len(values) < 2 and not node.attribute:
        return data.squeeze()
    return data.squeeze(tuple(_given_axes(node, values)))


def _unsqueeze(node: NodeProto, values: Values) -> Entries:
    data = values[0]
    assert data is not None
    return np.expand_dims(data, tuple(_given_axes(node, values)))


def _constant_of_shape(node: NodeProto, values: Values) -> Entries | None:
    shape = _known(values[0])
    if int(np.prod(shape, dtype=np.int64)) > MOST_ENTRIES or any(n < 0 for n in shape):
        return None
    given = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
    if given and given[0].dtype.kind not in "iub":
        return None
    return np.full(shape, int(given[0].ravel()[0]) if given else 0, object)


def _one_hot(node: NodeProto, values: Values) -> Entries:
    indices, depth, (off, on) = _known(values[0]), _known(values[1])[0], _all(values[2:])[0]
    if not 0 < depth <= MOST_ENTRIES or attribute(node, "axis", -1) not in (-1, 1):
        raise ValueError("not one row for each index")
    rows = [[on if c == i % depth else off for c in range(depth)] for i in indices]
    return np.array(rows, object)


def _where(node: NodeProto, values: Values) -> Entries:
    condition, a, b = np.broadcast_arrays(*_all(values))
    chosen = [
        None if c is None else x if c else y
        for c, x, y in zip(condition.ravel(), a.ravel(), b.ravel(), strict=True)
    ]
    return np.array(chosen, object).reshape(condition.shape)


def _cast(node: NodeProto, values: Values) -> Entries | None:
    integral = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
    return values[0] if attribute(node, "to", 0) in integral else None


_OPERATIONS: dict[str, Callable[[NodeProto, Values], Entries | None]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_quotient),
    "Equal": _elementwise(lambda a, b: a == b),
    "Cast": _cast,
    "Identity": lambda node, values: values[0],
    "Concat": lambda node, values: np.concatenate(_all(values), attribute(node, "axis", 0)),
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "OneHot": _one_hot,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
