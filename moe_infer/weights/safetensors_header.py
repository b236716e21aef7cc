"""The JSON header of a safetensors file: built, and read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moe_infer.weights.errors import WeightFileError, shown
from moe_infer.weights.index import (
    ITEM_SIZES,
    MAX_BYTES,
    TensorInfo,
    check_layout,
    clipped,
    tensor_nbytes,
)

ALIGNMENT = 256
"""The writer pads the header so that the data begin at a multiple of this; readers do not care."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _DTYPES.items()}


def build_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The header for tensors, without the 8 length bytes, padded with spaces.

    Args:
        tensors: (dtype, shape) by name. The data lie in this order, but wider types first, so that
            every tensor is aligned to its type.
        metadata: texts for ``__metadata__``.

    Raises:
        WeightFileError: a type is not float32, float16 or bfloat16, or a size overflows.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in ITEM_SIZES:
            raise WeightFileError(
                f"tensor {shown(name)} has type '{dtype}'; weight files hold float32, float16 or"
                " bfloat16, convert it"
            )
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: -ITEM_SIZES[t[1][0]]):
        if name in ("", "__metadata__"):
            raise WeightFileError(f"a tensor cannot be named {name!r}; give it another name")
        end = offset + tensor_nbytes("new file", name, dtype, shape)
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": [int(s) for s in shape],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNMENT)


def parse_header(
    where: str, header: bytes, file_size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks a header; nothing in it is trusted.

    Args:
        where: the file, for messages.
        header: the JSON bytes, without the 8 length bytes before them.
        file_size: of the whole file.

    Returns:
        The tensors, with offsets from the file's begin, and the metadata.

    Raises:
        WeightFileError: not a header by the format's rules, or a tensor has another type than
            float32, float16, bfloat16, a size that is not its shape's, or bytes that are not its
            own.
    """
    fields = _load(where, header)
    metadata = _metadata(where, fields.pop("__metadata__", {}))
    data_begin = 8 + len(header)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in fields.items():
        tensors[name] = _tensor(where, name, entry, data_begin)
    spans = [(t.offset, t.offset + t.nbytes, t.name) for t in tensors.values()]
    check_layout(where, spans, data_begin, file_size, holes=False)
    return tensors, metadata


def _load(where: str, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise WeightFileError(
            f"{where}: the safetensors header begins with {header[:1]!r}; expected b'{{'; this is"
            " no safetensors file, write it again"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, value in pairs:
            if name in names:
                raise WeightFileError(
                    f"{where}: {shown(name)} is twice in the safetensors header; names must be"
                    " unique, write the file again"
                )
            names[name] = value
        return names

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is no JSON")

    try:
        # Decoded here: json.loads would take UTF-16 and UTF-32 too.
        fields = json.loads(
            header.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant
        )
        for name in fields:
            name.encode("utf-8")  # lone surrogates, written as escapes, are no text
    except WeightFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightFileError(
            f"{where}: the safetensors header is not JSON in UTF-8 ({str(error)[:100]}); the file"
            " is damaged, copy or write it again"
        ) from None
    assert isinstance(fields, dict)  # it begins with a brace
    return fields


def _metadata(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise WeightFileError(
            f"{where}: '__metadata__' must map texts to texts; write the file again"
        )
    return value


def _tensor(where: str, name: str, entry: Any, data_begin: int) -> TensorInfo:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        found = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise WeightFileError(
            f"{where}: tensor {shown(name)} is described by {shown(str(found))}; expected"
            " exactly dtype, shape and data_offsets; write the file again"
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise WeightFileError(
            f"{where}: tensor {shown(name)} has type {shown(str(code))}; expected F32, F16 or"
            " BF16; convert the weights"
        )
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n <= MAX_BYTES for n in numbers
        ):
            raise WeightFileError(
                f"{where}: {what} of tensor {shown(name)} must be a list of integers from 0 to"
                f" {MAX_BYTES}; the header is damaged, write the file again"
            )
    if len(offsets) != 2:
        raise WeightFileError(
            f"{where}: tensor {shown(name)} has {len(offsets)} data_offsets; expected 2, begin and"
            " end; write the file again"
        )
    dtype = _DTYPES[code]
    nbytes = tensor_nbytes(where, name, dtype, shape)
    begin, end = offsets
    if end - begin != nbytes:
        raise WeightFileError(
            f"{where}: tensor {shown(name)} has {clipped(end - begin)} bytes (data_offsets"
            f" {begin} to {end}), but shape {tuple(shape)} of {dtype} needs {nbytes}; the header is"
            " damaged, write the file again"
        )
    return TensorInfo(name, dtype, tuple(shape), data_begin + begin, nbytes, stored=True)
