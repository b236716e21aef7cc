"""Constants, and the small tensors that are computed from nothing else."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from moe_infer.graph.reading.layout import LayoutReader
from moe_infer.graph.reading.value import FLOATS, Opaque, Value


class ConstantReader(LayoutReader):
    """Adds weights stacked over the experts, numbers, and the numbers of tokens and experts."""

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
