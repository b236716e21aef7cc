"""What a weight file's index says, and the checks that reading and writing share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from moe_infer.weights.errors import WeightFileError, shown

MAX_BYTES = 2**63 - 1
"""Largest size or offset; the C++ side keeps them in 64 bits."""
MAX_RANK = 8
MAX_INDEX_BYTES = 100_000_000
"""Longest safetensors header (as the format's own library has it) or zip directory."""
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types that weights can have; all little-endian."""

_NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weight file, as its index describes it."""

    name: str
    dtype: str
    """``float32``, ``float16`` or ``bfloat16``."""
    shape: tuple[int, ...]
    offset: int
    """Where in the file the data begin; of a deflated npz member, the compressed data."""
    nbytes: int
    """Bytes of the tensor in memory."""
    stored: bool
    """True: the data lie in the file as they are, ``nbytes`` at ``offset``, row-major."""


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type (``ml_dtypes.bfloat16`` for ``bfloat16``)."""
    return _NUMPY[dtype]


def tensor_nbytes(where: str, name: str, dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; refuses what cannot be.

    Raises:
        WeightFileError: the rank is over 8, a dimension is negative, or the size overflows.
    """
    if len(shape) > MAX_RANK:
        raise WeightFileError(
            f"{where}: tensor {shown(name)} has {len(shape)} dimensions; at most {MAX_RANK} are"
            " expected; write the file again"
        )
    count = ITEM_SIZES[dtype]
    largest = count
    for size in shape:
        if not 0 <= size <= MAX_BYTES:
            raise WeightFileError(
                f"{where}: tensor {shown(name)} has a dimension of {clipped(size)}; expected 0 to"
                f" {MAX_BYTES}; write the file again"
            )
        count *= size
        # A zero elsewhere must not hide dimensions whose product overflows 64 bits.
        largest *= max(size, 1)
    if largest > MAX_BYTES:
        dimensions = " x ".join(clipped(s) for s in shape)
        raise WeightFileError(
            f"{where}: tensor {shown(name)} of shape {dimensions} and type {dtype} overflows; its"
            f" size must be at most {MAX_BYTES} bytes; write the file again"
        )
    return count


def check_layout(
    where: str, spans: Iterable[tuple[int, int, str]], begin: int, end: int, *, holes: bool
) -> None:
    """Checks that spans of bytes lie in a region without overlap and, unless allowed, holes.

    Args:
        where: the file, for the message.
        spans: (begin, end, name) of each tensor or member.
        begin: where the region begins.
        end: where it ends.
        holes: whether bytes of the region may belong to no span.

    Raises:
        WeightFileError: a span leaves the region or overlaps another, or there is a hole.
    """
    position, previous = begin, "the header"
    for first, last, name in sorted(spans):
        if first > last:
            raise WeightFileError(
                f"{where}: tensor {shown(name)} ends at byte {clipped(last)}, before its begin at"
                f" {clipped(first)}; the index is damaged, write the file again"
            )
        if last > end:
            raise WeightFileError(
                f"{where}: tensor {shown(name)} ends at byte {clipped(last)}, but the data end at"
                f" {end}; the file is truncated or its index is damaged, copy or write it again"
            )
        if first < position:
            raise WeightFileError(
                f"{where}: tensor {shown(name)} begins at byte {clipped(first)}, inside"
                f" {previous}, which ends at {position}; tensors must not overlap, write the file"
                " again"
            )
        if first > position and not holes:
            raise WeightFileError(
                f"{where}: {first - position} bytes before tensor {shown(name)}, from byte"
                f" {position} on, belong to no tensor; holes are not allowed, write the file again"
            )
        position, previous = last, f"tensor {shown(name)}"
    if position < end and not holes:
        raise WeightFileError(
            f"{where}: the last {end - position} bytes, from byte {position} on, belong to no"
            " tensor; expected the data to end there, write the file again"
        )


def clipped(value: int) -> str:
    """An integer from an untrusted file, in bounded length (huge ones refuse to be printed)."""
    return str(value) if -(2**127) < value < 2**127 else "a number over 2^127"
