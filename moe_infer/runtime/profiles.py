"""Ranges of dynamic shapes, as TensorRT needs them before it builds an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Dims = Sequence[int | str | None]
"""Of a graph's input: a number, a symbol, or None."""

_NAMES = ("smallest", "usual", "largest")


@dataclass(frozen=True)
class Profiles:
    """Smallest, usual and largest shape of every dynamic input."""

    shapes: dict[str, tuple[Shape, Shape, Shape]]

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
            numbers under the name of a symbolic dimension, for all inputs that have it.

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
            known = sorted({d for dims in inputs.values() for d in dims if isinstance(d, str)})
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
    missing = [str(d) for d in dims if not isinstance(d, int) and d not in symbols]
    if missing:
        raise ValueError(
            f"input_shapes: input '{name}' of shape {tuple(dims)} is dynamic and has no range; give"
            f" three shapes for '{name}', or three numbers for each of its dimensions"
        )
    smallest, usual, largest = (
        tuple(d if isinstance(d, int) else symbols[str(d)][i] for d in dims) for i in range(3)
    )
    return smallest, usual, largest
