"""Sizes in bytes from numbers and text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_infer.byte_size import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (0, 0),
        (123, 123),
        (np.int64(7), 7),
        (1e9, 10**9),
        (1.9, 1),
        ("123", 123),
        ("1K", 1 << 10),
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("8GB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("512M", 512 << 20),
        ("2T", 2 << 40),
        ("1.5G", 3 << 29),
        ("0.3K", 307),
        (str(2**64 - 1), 2**64 - 1),
    ],
)
def test_sizes(value: Any, nbytes: int) -> None:
    assert parse_bytes(value, "it") == nbytes


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "G", "-1", "+1", "8X", "8 G B", "1e9", "0x10", "8B", "1.", ".5", "1,5G", "8G\n"),
        *("\u0663", "16777216T", "9" * 5000),
        *(-1, -0.5, float("nan"), float("inf"), 2**64),
    ],
)
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^it must be a number of bytes such as 8G or 512M, got "):
        parse_bytes(value, "it")


@pytest.mark.parametrize("value", [None, True, b"8G", [8]])
def test_what_is_neither_number_nor_text(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^it must be a number of bytes or a text such as 8G, got"):
        parse_bytes(value, "it")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert 0 <= parse_bytes(text, "it") < 2**64
    except ValueError as error:
        assert str(error).startswith("it must be a number of bytes")


@given(st.integers(0, 2**50))
def test_what_is_shown_can_be_given(nbytes: int) -> None:
    shown = format_bytes(nbytes)
    if shown.endswith("iB"):
        # Two digits behind the point of GiB, one of what is smaller: rounded to half a unit of it.
        assert parse_bytes(shown, "it") == pytest.approx(nbytes, rel=0.06)
    else:
        assert shown == f"{nbytes} B"
