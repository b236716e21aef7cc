"""Sizes in bytes as people write and read them: ``8G``, ``512M``, ``1.5 GiB``."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from numbers import Integral

ByteSize = int | float | str
"""A number of bytes, or a text such as ``8G``; see :func:`parse_bytes`."""

_LIMIT = 1 << 64
_PATTERN = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)(?: ?([KMGT])(?:i?B)?)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_bytes(value: ByteSize, what: str) -> int:
    """A size in whole bytes, rounded down.

    Takes all that the compiled library takes in ``MOE_INFER_PINNED_BYTES`` (a whole number, with K,
    M, G or T for powers of 1024, a B behind that or not), fractions, and ``GiB`` and the like.

    Args:
        value: the number or text.
        what: where it comes from, for the message.

    Raises:
        ValueError: it is no size, negative, or 2**64 or more.
        TypeError: it is neither a number nor a text.
    """
    problem = ValueError(f"{what} must be a number of bytes such as 8G or 512M, got {value!r}")
    if isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        if match is None:
            raise problem
        number = Fraction(match[1]) * (1 << _SHIFT[(match[2] or "").upper()])
    elif isinstance(value, bool) or not isinstance(value, Integral | float):
        raise TypeError(
            f"{what} must be a number of bytes or a text such as 8G, got {type(value).__name__}"
        )
    elif not math.isfinite(value):
        raise problem
    else:
        number = Fraction(value)
    if not 0 <= number < _LIMIT:
        raise problem
    return math.floor(number)


def format_bytes(nbytes: float) -> str:
    """A size for people, rounded, in the largest unit up to GiB of which it has at least one."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
