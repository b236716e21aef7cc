"""Inputs of a model and the ranges that a caller gives for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort


def ranges_of(
    input_shapes: Mapping[str, Any] | None, dims: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Ranges by the name of an input or of a symbolic dimension; see the session's arguments.

    Raises:
        ValueError: a name is given twice, or a dimension without three whole numbers.
    """
    ranges = dict(input_shapes or {})
    for name, numbers in (dims or {}).items():
        if name in ranges:
            raise ValueError(f"'{name}' has a range both in input_shapes and in dims; give one")
        whole = isinstance(numbers, Sequence) and all(isinstance(n, int) for n in numbers)
        if not whole or len(numbers) != 3:
            raise ValueError(
                f"dims: '{name}' must have three numbers (smallest, usual, largest), got"
                f" {numbers!r}; whole shapes go to input_shapes"
            )
        ranges[name] = tuple(numbers)
    return ranges


def dimensions_of(model: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Dimensions of each input that is no initializer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: [
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in value.type.tensor_type.shape.dim
        ]
        for value in model.graph.input
        if value.name not in constants
    }


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of an input as a caller gives it: an array, a list or an OrtValue."""
    return tuple(value.shape()) if isinstance(value, ort.OrtValue) else np.shape(value)
