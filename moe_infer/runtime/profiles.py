"""Ranges of dynamic shapes, as TensorRT needs them before it builds an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import onnx

from moe_infer.graph.dimensions import evaluate, names_in
from moe_infer.graph.lower_nodes import is_layer
from moe_infer.graph.shapes import ValueTypes
from moe_infer.op import DOMAIN

Shape = tuple[int, ...]
Dims = Sequence[int | str | None]
"""Of a graph's input: a number, a symbol, or None."""

_NAMES = ("smallest", "usual", "largest")
_OF_TENSORRT = ("", "ai.onnx", DOMAIN)
"""Domains whose operators TensorRT's provider takes, those that TensorRT has."""


@dataclass(frozen=True)
class Profiles:
    """Smallest, usual and largest shape of every dynamic input."""

    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def __str__(self) -> str:
        return "; ".join(
            f"{name} {' to '.join('x'.join(map(str, s)) for s in (smallest, largest))}, usually"
            f" {'x'.join(map(str, usual))}"
            for name, (smallest, usual, largest) in self.shapes.items()
        )

    def provider_options(self) -> dict[str, str]:
        """Options of ONNX Runtime's TensorRT provider."""
        keys = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
        return {
            key: ",".join(
                f"{name}:{'x'.join(map(str, shapes[i]))}" for name, shapes in self.shapes.items()
            )
            for i, key in enumerate(keys)
        }


def make_profiles(inputs: Mapping[str, Dims], input_shapes: Mapping[str, Any]) -> Profiles:
    """Checks ranges against a graph's inputs.

    Args:
        inputs: dimensions of each input.
        input_shapes: either three shapes (smallest, usual, largest) under an input's name, or three
            numbers under the name of a symbolic dimension, for all inputs that have it, alone or in
            a sum such as ``past + seq``.

    Returns:
        Ranges of the dynamic inputs.

    Raises:
        ValueError: a name is unknown, a range is malformed or does not fit the input, or an input
            is left without one.
    """
    symbols: dict[str, Shape] = {}
    whole: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name, value in input_shapes.items():
        parsed = _triple(name, value)
        if isinstance(parsed[0], int):
            known = sorted(
                {
                    n
                    for dims in inputs.values()
                    for d in dims
                    if isinstance(d, str)
                    for n in (d, *names_in(d))
                }
            )
            if name not in known:
                raise ValueError(
                    f"input_shapes: no input has a dimension '{name}'; symbolic dimensions are"
                    f" {', '.join(known) or 'none'}"
                )
            symbols[name] = parsed
        elif name not in inputs:
            raise ValueError(
                f"input_shapes: the model has no input '{name}'; it has {', '.join(inputs)}"
            )
        else:
            whole[name] = parsed
    shapes = {}
    for name, dims in inputs.items():
        if name in whole:
            shapes[name] = _checked(name, dims, whole[name])
        elif any(not isinstance(d, int) for d in dims):
            shapes[name] = _from_symbols(name, dims, symbols)
    return Profiles(shapes)


def parse_range(text: str) -> tuple[Shape, Shape, Shape] | Shape:
    """``1x1,1x16,4x128`` to three shapes; ``1,16,128`` to three numbers.

    Raises:
        ValueError: it is neither.
    """
    pieces = text.split(",")
    if len(pieces) != 3 or not all(n.isdigit() for piece in pieces for n in piece.split("x")):
        raise ValueError(
            f"a range must be three shapes like 1x1,1x16,4x128, or three numbers for a symbolic"
            f" dimension, got '{text}'"
        )
    first, second, third = (tuple(int(n) for n in piece.split("x")) for piece in pieces)
    if all("x" not in piece for piece in pieces):
        return (*first, *second, *third)
    return (first, second, third)


def _triple(name: str, value: Any) -> Any:
    problem = ValueError(
        f"input_shapes: '{name}' must have three shapes (smallest, usual, largest), or three"
        f" numbers if it is a symbolic dimension, got {value!r}"
    )
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise problem
    if all(_is_size(v) for v in value):
        numbers: Shape = tuple(int(v) for v in value)
        _check_order(name, numbers)
        return numbers
    if not all(
        isinstance(v, Sequence) and not isinstance(v, str) and all(_is_size(n) for n in v)
        for v in value
    ):
        raise problem
    return tuple(tuple(int(n) for n in v) for v in value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_order(name: str, numbers: Shape) -> None:
    if not numbers[0] <= numbers[1] <= numbers[2]:
        raise ValueError(
            f"input_shapes: '{name}' must go from the smallest to the largest, got {numbers}"
        )


def _checked(
    name: str, dims: Dims, shapes: tuple[Shape, Shape, Shape]
) -> tuple[Shape, Shape, Shape]:
    for label, shape in zip(_NAMES, shapes, strict=True):
        fits = len(shape) == len(dims) and all(
            d == n for d, n in zip(dims, shape, strict=True) if isinstance(d, int)
        )
        if not fits:
            raise ValueError(
                f"input_shapes: the {label} shape {shape} does not fit input '{name}' of shape"
                f" {tuple(dims)}"
            )
    for i in range(len(dims)):
        _check_order(f"{name}' at dimension '{i}", tuple(shape[i] for shape in shapes))
    return shapes


def _from_symbols(
    name: str, dims: Dims, symbols: Mapping[str, Shape]
) -> tuple[Shape, Shape, Shape]:
    missing = [str(d) for d in dims if not isinstance(d, int) and not _known(d, symbols)]
    if missing:
        raise ValueError(
            f"input_shapes: input '{name}' of shape {tuple(dims)} is dynamic and has no range; give"
            f" three shapes for '{name}', or three numbers for each of its dimensions"
        )
    smallest, usual, largest = (
        tuple(d if isinstance(d, int) else _size(str(d), symbols, i) for d in dims)
        for i in range(3)
    )
    return smallest, usual, largest


def _known(dim: int | str | None, symbols: Mapping[str, Shape]) -> bool:
    return dim in symbols or (dim is not None and set(names_in(str(dim))) <= set(symbols))


def _size(symbol: str, symbols: Mapping[str, Shape], which: int) -> int:
    """Smallest, usual or largest size of a dimension that may be a sum or product of others."""
    if symbol in symbols:
        return symbols[symbol][which]
    names = names_in(symbol)
    if which == 1:
        return evaluate(symbol, {name: symbols[name][1] for name in names})
    # A difference is smallest where what is subtracted is largest, so all corners are looked at.
    corners = product(*((symbols[name][0], symbols[name][2]) for name in names))
    sizes = [evaluate(symbol, dict(zip(names, corner, strict=True))) for corner in corners]
    return min(sizes) if which == 0 else max(sizes)


def border_profiles(
    model: onnx.ModelProto,
    input_shapes: Mapping[str, Any],
    profiles: Profiles,
    layers_only: bool = False,
) -> Profiles:
    """Adds the values at which ONNX Runtime has to cut the graph for TensorRT.

    With given ranges TensorRT's provider wants one for every dynamic input of each of its parts,
    and where an operator of another domain lies between them, such an input is that operator's
    output. Values whose dimensions do not follow from the ranges are left out.

    Args:
        model: with value_info.
        input_shapes: as for :func:`make_profiles`.
        profiles: of the graph's inputs.
        layers_only: TensorRT gets the MoELayer nodes alone.
    """
    symbols = {n: tuple(v) for n, v in input_shapes.items() if all(_is_size(x) for x in v)}
    stated = {info.name: info for info in (*model.graph.value_info, *model.graph.output)}
    types = ValueTypes(stated)
    shapes = dict(profiles.shapes)
    for node in model.graph.node:
        if is_layer(node) if layers_only else node.domain in _OF_TENSORRT:
            continue
        for name in node.output:
            dims = types.shape(name)
            if dims is None or all(isinstance(d, int) for d in dims):
                continue
            if all(isinstance(d, int) or _known(d, symbols) for d in dims):
                shapes[name] = _from_symbols(name, dims, symbols)
    return Profiles(shapes)


class ShapeWatch:
    """Looks at the shapes that a session on TensorRT is run with.

    Args:
        inputs: dimensions of each input.
        profiles: the ranges; None: TensorRT makes its own from the first run and widens them.
    """

    def __init__(self, inputs: Mapping[str, Dims], profiles: Profiles | None) -> None:
        self._dynamic = [n for n, d in inputs.items() if any(not isinstance(x, int) for x in d)]
        self._profiles = profiles
        self._seen: dict[str, tuple[Shape, Shape]] = {}
        self._warned = False

    def look(self, shapes: Mapping[str, Shape]) -> str:
        """What to warn of because of a run with these shapes, "" for nothing; warns once.

        Raises:
            ValueError: a shape is outside the ranges.
        """
        for name in self._dynamic:
            if name in shapes and self._profiles is not None:
                self._check(name, shapes[name], self._profiles)
        if self._profiles is not None:
            return ""
        grown = [name for name in self._dynamic if name in shapes and self._grow(name, shapes)]
        if not grown or self._warned:
            return ""
        self._warned = True
        name = grown[0]
        return (
            f"input '{name}' has shape {shapes[name]}, outside of what came before: TensorRT builds"
            " its engine again, which takes long, each time this happens; give the ranges when the"
            ' session is made, such as dims={"batch": (1, 1, 8), "seq": (1, 1, 4096)}'
        )

    def _check(self, name: str, shape: Shape, profiles: Profiles) -> None:
        smallest, _, largest = profiles.shapes[name]
        inside = len(shape) == len(smallest) and all(
            low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
        )
        if not inside:
            raise ValueError(
                f"input '{name}' has shape {shape}, but the session was made for {smallest} to"
                f" {largest}; make it with wider ranges"
            )

    def _grow(self, name: str, shapes: Mapping[str, Shape]) -> bool:
        """Widens what was seen; True if it had to, and not for the first run."""
        shape = shapes[name]
        if name not in self._seen or len(shape) != len(self._seen[name][0]):
            self._seen[name] = (shape, shape)
            return False
        low, high = self._seen[name]
        low, high = tuple(map(min, low, shape)), tuple(map(max, high, shape))
        grown = (low, high) != self._seen[name]
        self._seen[name] = (low, high)
        return grown
