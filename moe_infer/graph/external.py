"""Constants of an ONNX model, read piece by piece, wherever their bytes lie.

Threats, since a model is untrusted input: a location outside the model's folder (absolute, ``..``
or a symbolic link), an offset or length outside the file, and a length that is not the tensor's.
All are refused before a byte is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

CHUNK_BYTES = 16 << 20
"""Of a streamed copy."""

WEIGHT_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
"""Types that a weight file can hold."""

_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
}


class ExternalDataError(ValueError):
    """The bytes of an external tensor are not where the model says, or may not be read."""


@dataclass(frozen=True)
class ExternalRange:
    """A range of bytes in a file, checked to lie inside the file and the model's folder."""

    path: Path
    offset: int
    length: int

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The bytes, at most ``size`` at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.length
            while left > 0:
                chunk = file.read(min(size, left))
                if not chunk:
                    raise ExternalDataError(f"{self.path}: the file became shorter while read")
                left -= len(chunk)
                yield chunk


def is_external(tensor: TensorProto) -> bool:
    """True when the tensor's bytes are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of the tensor by its type and shape.

    Raises:
        ExternalDataError: a dimension is negative, or the type has no fixed size.
    """
    if tensor.data_type not in _BITS:
        name = TensorProto.DataType.Name(tensor.data_type)
        raise ExternalDataError(f"tensor '{tensor.name}': type {name} has no fixed size")
    if any(d < 0 for d in tensor.dims):
        raise ExternalDataError(f"tensor '{tensor.name}': shape {list(tensor.dims)} is negative")
    bits: int = _BITS[tensor.data_type]
    return (int(math.prod(tensor.dims)) * bits + 7) // 8


def locate(tensor: TensorProto, base_dir: Path) -> ExternalRange:
    """Where the bytes of an external tensor lie.

    Args:
        tensor: with ``data_location`` EXTERNAL.
        base_dir: the model's folder, inside which the data must lie.

    Raises:
        ExternalDataError: see the module's list of threats.
    """
    entries = {e.key: e.value for e in tensor.external_data}
    what = f"external data of tensor '{tensor.name}'"
    location = entries.get("location", "")
    if not location:
        raise ExternalDataError(f"{what}: no location")
    base = base_dir.resolve()
    path = (base / location).resolve()
    if Path(location).is_absolute() or not path.is_relative_to(base):
        raise ExternalDataError(
            f"{what}: location '{location}' is outside the model's folder {base}; move the file"
            " there and write a relative location"
        )
    if not path.is_file():
        raise ExternalDataError(f"{what}: file {path} does not exist; put it beside the model")
    expected, size = tensor_bytes(tensor), path.stat().st_size
    offset = _number(what, "offset", entries.get("offset", "0"))
    length = _number(what, "length", entries.get("length", str(expected)))
    if length != expected:
        raise ExternalDataError(
            f"{what}: length is {length}, but shape {list(tensor.dims)} of its type takes"
            f" {expected} bytes"
        )
    if offset + length > size:
        raise ExternalDataError(
            f"{what}: bytes {offset} to {offset + length} are outside the file {path} of"
            f" {size} bytes; the file is truncated or belongs to another model"
        )
    return ExternalRange(path, offset, length)


def _number(what: str, key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ExternalDataError(f"{what}: {key} '{text}' is no non-negative number")
    return int(text)


def _read_into(file: FileIO, target: memoryview, path: Path) -> None:
    while len(target):
        count = file.readinto(target)
        if not count:
            raise ExternalDataError(f"{path}: the file became shorter while read")
        target = target[count:]


class Constant:
    """A constant tensor whose first axis can be read one entry at a time."""

    def __init__(self, tensor: TensorProto, base_dir: Path) -> None:
        """Checks where the bytes lie; reads nothing.

        Raises:
            ExternalDataError: the type cannot be a weight, or the external data is refused.
        """
        self.name = tensor.name
        self.shape = tuple(tensor.dims)
        if tensor.data_type not in WEIGHT_DTYPES:
            raise ExternalDataError(
                f"weight '{tensor.name}' has type {TensorProto.DataType.Name(tensor.data_type)};"
                f" a weight file holds {', '.join(WEIGHT_DTYPES.values())}"
            )
        self.dtype = WEIGHT_DTYPES[tensor.data_type]
        self._tensor = tensor
        self._copy: bytes | None = None
        self._range = locate(tensor, base_dir) if is_external(tensor) else None
        stored = len(tensor.raw_data) if tensor.HasField("raw_data") else None
        if self._range is None and stored not in (None, tensor_bytes(tensor)):
            raise ExternalDataError(
                f"weight '{tensor.name}': {stored} bytes, but shape {list(tensor.dims)} takes"
                f" {tensor_bytes(tensor)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self._tensor)

    def squeeze(self) -> None:
        """Leaves axes of size 1 out of the shape, but for the first."""
        self.shape = (self.shape[0], *(n for n in self.shape[1:] if n != 1))

    def entry(self, index: int) -> NDArray[np.generic]:
        """``tensor[index]``; only these bytes are read."""
        shape = self.shape[1:]
        count = math.prod(shape)
        return self._elements(index * count, count).reshape(shape)

    def rows(self, index: int, begin: int, end: int) -> NDArray[np.generic]:
        """``tensor[index, begin:end]``; only these bytes are read."""
        row = math.prod(self.shape[2:])
        first = index * math.prod(self.shape[1:]) + begin * row
        return self._elements(first, (end - begin) * row).reshape(-1, *self.shape[2:])

    def announce(self, index: int, begin: int, end: int) -> None:
        """Says that :meth:`rows` will be asked for these; does not wait for them."""
        row = math.prod(self.shape[2:])
        self._announce(index * math.prod(self.shape[1:]) + begin * row, (end - begin) * row)

    def announce_leading(self, begin: int, end: int) -> None:
        """Says that :meth:`leading` will be asked for these; does not wait for them."""
        row = math.prod(self.shape[1:])
        self._announce(begin * row, (end - begin) * row)

    def leading(self, begin: int, end: int) -> NDArray[np.generic]:
        """``tensor[begin:end]``; only these bytes are read."""
        row = math.prod(self.shape[1:])
        return self._elements(begin * row, (end - begin) * row).reshape(-1, *self.shape[1:])

    def whole(self) -> NDArray[np.generic]:
        """The whole tensor."""
        if not self.shape or self.shape[0] == 0:
            raise ExternalDataError(f"weight '{self.name}' has shape {list(self.shape)}")
        return self._elements(0, math.prod(self.shape)).reshape(self.shape)

    def _announce(self, first: int, count: int) -> None:
        if self._range is None or not hasattr(os, "posix_fadvise"):
            return
        size = numpy_dtype(self.dtype).itemsize
        with open(self._range.path, "rb", buffering=0) as file:
            begin, length = self._range.offset + first * size, count * size
            os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)

    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        """Elements in row-major order."""
        dtype = numpy_dtype(self.dtype)
        if self._range is not None:
            values: NDArray[np.generic] = np.empty(count, dtype)
            with open(self._range.path, "rb", buffering=0) as file:
                file.seek(self._range.offset + first * dtype.itemsize)
                _read_into(file, values.view(np.uint8).data, self._range.path)
            return values
        if self._tensor.HasField("raw_data"):
            # A view of the protobuf's bytes would be made by copying all of them each time.
            return np.frombuffer(self._raw(), dtype, count, first * dtype.itemsize)
        flat: NDArray[np.generic] = numpy_helper.to_array(self._tensor).reshape(-1)
        return flat[first : first + count]

    def release(self) -> None:
        """Drops what is kept in memory between entries."""
        self._copy = None

    def _raw(self) -> bytes:
        if self._copy is None:
            self._copy = self._tensor.raw_data
        return self._copy


class ConstantStack:
    """Constants of one shape, one for each expert, read like one tensor with the experts on axis 0.

    The constants are read one at a time, and nothing is kept of them.
    """

    def __init__(self, name: str, entries: Sequence[Constant]) -> None:
        """Checks that they fit together; reads nothing.

        Raises:
            ExternalDataError: their shapes or types differ.
        """
        self.name, self._entries = name, tuple(entries)
        kinds = {(entry.shape, entry.dtype) for entry in entries}
        if len(kinds) != 1:
            told = ", ".join(f"{dtype} {list(shape)}" for shape, dtype in sorted(kinds))
            raise ExternalDataError(f"weights {name} differ in shape or type: {told}")
        shape, self.dtype = kinds.pop()
        self.shape = (len(self._entries), *shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(entry.nbytes for entry in self._entries)

    def entry(self, index: int) -> NDArray[np.generic]:
        """The tensor of one expert."""
        return self._entries[index].whole()

    def rows(self, index: int, begin: int, end: int) -> NDArray[np.generic]:
        """Rows of the tensor of one expert; only these bytes are read."""
        return self._entries[index].leading(begin, end)

    def announce(self, index: int, begin: int, end: int) -> None:
        """Says that :meth:`rows` will be asked for these; does not wait for them."""
        self._entries[index].announce_leading(begin, end)

    def release(self) -> None:
        """There is nothing to drop."""


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """Type in numpy by a weight type's name."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def all_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor with bytes in a graph: initializers, attributes, and those of subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from all_tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from all_tensors(subgraph)


def model_dir(path: os.PathLike[str] | str) -> Path:
    """The folder in which a model's external data must lie."""
    return Path(path).resolve().parent
