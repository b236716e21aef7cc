"""The header of an ``.npy`` array: built, and read without evaluating it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moe_infer.weights.errors import WeightFileError, shown
from moe_infer.weights.index import MAX_BYTES

MAX_HEADER = 65_536
"""Longest header in bytes; one for a plain array has 128."""
ALIGNMENT = 64

_MAGIC = b"\x93NUMPY"
# numpy knows no bfloat16; what ml_dtypes adds is saved as two opaque bytes.
_DTYPES = {
    "<f4": "float32",
    "<f2": "float16",
    "|V2": "bfloat16",
    "<V2": "bfloat16",
    "V2": "bfloat16",
    "bfloat16": "bfloat16",
}
_CODES = {"float32": "<f4", "float16": "<f2", "bfloat16": "|V2"}

# numpy writes a Python dict; evaluating it is not needed for plain arrays, so only these forms are.
_FIELD = (
    r"""(?P<key{0}>'\w+'|"\w+")\s*:\s*"""
    r"""(?P<value{0}>'[^'"\\]*'|"[^'"\\]*"|True|False|\([0-9,\s]*\))"""
)
_DICT = re.compile(
    r"\s*\{\s*" + r"\s*,\s*".join(_FIELD.format(i) for i in range(3)) + r"\s*,?\s*\}\s*"
)
_SHAPE = re.compile(r"\(\s*(?:|[0-9]{1,19}\s*,|[0-9]{1,19}(?:\s*,\s*[0-9]{1,19})+\s*,?)\s*\)")


def build_npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """Header of version 1.0 for a row-major array, padded so that the data are aligned."""
    dimensions = "".join(f"{int(s)}, " for s in shape).rstrip()
    if len(shape) > 1:
        dimensions = dimensions.rstrip(",")
    text = f"{{'descr': '{_CODES[dtype]}', 'fortran_order': False, 'shape': ({dimensions}), }}"
    padding = -(10 + len(text) + 1) % ALIGNMENT
    body = text.encode("ascii") + b" " * padding + b"\n"
    return _MAGIC + b"\x01\x00" + len(body).to_bytes(2, "little") + body


def npy_header_size(where: str, name: str, start: bytes) -> int:
    """Bytes before the data, from the array's first 12 bytes.

    Raises:
        WeightFileError: these are not the first bytes of an .npy array.
    """
    if len(start) < 12 or start[:6] != _MAGIC:
        raise WeightFileError(
            f"{where}: member {shown(name)} begins with {start[:6]!r}; expected {_MAGIC!r}, an .npy"
            " array; write the file with numpy.savez"
        )
    if start[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise WeightFileError(
            f"{where}: member {shown(name)} has .npy version {start[6]}.{start[7]}; expected 1.0,"
            " 2.0 or 3.0; write the file with numpy.savez"
        )
    width = 2 if start[6] == 1 else 4
    size = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    if size > MAX_HEADER:
        raise WeightFileError(
            f"{where}: member {shown(name)} has an .npy header of {size} bytes; at most"
            f" {MAX_HEADER} are allowed; save a plain array"
        )
    return size


def parse_npy_header(where: str, name: str, header: bytes) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a whole .npy header.

    Raises:
        WeightFileError: not a row-major little-endian array of float32, float16 or bfloat16.
    """
    text = header[10 if header[6] == 1 else 12 :].decode("utf-8", "replace")
    match = _DICT.fullmatch(text)
    found = {match[f"key{i}"][1:-1]: match[f"value{i}"] for i in range(3)} if match else {}
    if set(found) != {"descr", "fortran_order", "shape"} or not _SHAPE.fullmatch(found["shape"]):
        raise WeightFileError(
            f"{where}: member {shown(name)} has the .npy header {shown(text.strip())}; expected"
            " descr, fortran_order and shape of a plain array; save a plain array"
        )
    descr, order = found["descr"][1:-1], found["fortran_order"]
    if found["descr"][0] not in "'\"" or descr not in _DTYPES:
        raise WeightFileError(
            f"{where}: member {shown(name)} has type {shown(descr)}"
            f"{_hint(descr)}; expected little-endian float32 ('<f4'), float16 ('<f2') or bfloat16"
            " ('|V2'); convert the weights"
        )
    if order != "False":
        raise WeightFileError(
            f"{where}: member {shown(name)} has fortran_order {order} (column-major); expected"
            " False; save numpy.ascontiguousarray of it"
        )
    shape = tuple(int(s) for s in re.findall(r"[0-9]+", found["shape"]))
    if any(s > MAX_BYTES for s in shape):
        raise WeightFileError(
            f"{where}: member {shown(name)} has the shape {found['shape'][:80]}; a dimension is"
            f" over {MAX_BYTES}; write the file again"
        )
    return _DTYPES[descr], shape


def _hint(descr: str) -> str:
    if descr.endswith("O"):
        return " (Python objects, which would have to be unpickled)"
    if descr.startswith(">"):
        return " (big-endian)"
    return ""
