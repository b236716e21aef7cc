"""How far two arrays are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tolerance:
    """``|found - expected| <= atol + rtol * |expected|`` for every element."""

    atol: float
    rtol: float


@dataclass(frozen=True)
class Difference:
    """Two arrays of one name.

    Attributes:
        name: of the value.
        shape: of the expected array.
        largest: largest absolute difference; infinity where the shapes or the places of NaN differ.
        mean: mean absolute difference.
        scale: largest absolute value of the expected array.
        outside: elements outside the tolerance.
        where: index of the largest difference.
        expected: value there.
        found: value there.
        problem: what makes the arrays incomparable; "" if nothing does.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    mean: float
    scale: float
    outside: int
    where: tuple[int, ...] = ()
    expected: float = 0.0
    found: float = 0.0
    problem: str = ""

    @property
    def same(self) -> bool:
        """True when every element is within the tolerance."""
        return not self.outside and not self.problem


def compare(name: str, expected: Array, found: Array, tolerance: Tolerance) -> Difference:
    """Compares two arrays element by element; NaN equals NaN, and infinity itself."""
    if expected.shape != found.shape:
        return _incomparable(name, expected, f"shape {found.shape}, expected {expected.shape}")
    if expected.dtype.kind in "OUS" or found.dtype.kind in "OUS":
        wrong = expected != found
        count = int(np.count_nonzero(wrong))
        problem = f"{count} texts differ" if count else ""
        return Difference(name, expected.shape, 0.0, 0.0, 0.0, count, problem=problem)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(b - a)
        alike = (a == b) | (np.isnan(a) & np.isnan(b))
        gap = np.where(alike, 0.0, np.where(np.isnan(gap), np.inf, gap))
        # A bound made from NaN or infinity would let everything pass.
        near = np.isfinite(a) & (gap <= tolerance.atol + tolerance.rtol * np.abs(a))
        outside = int(np.count_nonzero(~(alike | near)))
    finite = np.abs(a[np.isfinite(a)])
    if not gap.size:
        return Difference(name, expected.shape, 0.0, 0.0, 0.0, 0)
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(gap)), gap.shape))
    return Difference(
        name=name,
        shape=expected.shape,
        largest=float(gap.max()),
        mean=float(gap.mean()),
        scale=float(finite.max()) if finite.size else 0.0,
        outside=outside,
        where=place,
        expected=float(a[place]),
        found=float(b[place]),
    )


def _incomparable(name: str, expected: Array, problem: str) -> Difference:
    return Difference(
        name, expected.shape, np.inf, np.inf, 0.0, max(expected.size, 1), problem=problem
    )
