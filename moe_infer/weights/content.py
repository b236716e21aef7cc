"""What the environment asks to be checked of the weights themselves; off unless it does.

The library does the same for layers on a GPU (``ops/core/content_check.cpp``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from moe_infer.weights.experts import ExpertWeights

CHECK_FINITE = "MOE_INFER_CHECK_FINITE"
CHECK_CRC = "MOE_INFER_CHECK_CRC"


def check_content(layers: Iterable[ExpertWeights]) -> None:
    """Reads the layers' weights as far as the environment asks for it.

    ``MOE_INFER_CHECK_FINITE=1`` refuses NaN and infinity; ``MOE_INFER_CHECK_CRC=1`` compares the
    members of npz files with their CRC.

    Raises:
        WeightFileError: a weight is not finite, or a CRC differs.
        ValueError: a variable is neither 1 nor 0.
    """
    finite, crc = _is_on(CHECK_FINITE), _is_on(CHECK_CRC)
    verified = set()
    for weights in layers:
        file = weights.file
        if crc and file is not None and file.format == "npz" and file.path not in verified:
            file.verify_content()
            verified.add(file.path)
        if finite:
            weights.check_finite()


def _is_on(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"environment variable {variable} must be 1 (on) or 0 (off), got '{value}'"
        )
    return value == "1"
