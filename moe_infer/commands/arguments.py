"""What the commands' options have in common."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from rich.console import Console

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def pair(text: str, option: str) -> tuple[str, str]:
    """``NAME=VALUE`` in two."""
    name, equals, value = text.rpartition("=")
    if not equals or not name or not value:
        raise ValueError(f"{option} must be NAME=VALUE, got '{text}'")
    return name, value


def given_inputs(texts: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of ``--input NAME=FILE.npy`` and ``--input FILE.npz``."""
    given: dict[str, np.ndarray[Any, Any]] = {}
    for text in texts:
        if text.endswith(".npz") and "=" not in text:
            arrays = _load(text, text)
            if not isinstance(arrays, dict):
                raise ValueError(f"--input {text}: it holds one array; give NAME={text}")
            given.update(arrays)
        elif "=" not in text:
            raise ValueError(f"--input must be NAME=FILE.npy or FILE.npz, got '{text}'")
        else:
            name, path = pair(text, "--input")
            loaded = _load(path, text)
            if not isinstance(loaded, np.ndarray):
                raise ValueError(f"--input {text}: expected one .npy array; an npz takes no name")
            given[name] = loaded
    return given


def _load(path: str, text: str) -> np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]:
    """What a .npy or .npz file holds."""
    try:
        loaded = np.load(Path(path), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise ValueError(
            f"--input {text}: cannot read '{path}': {error.strerror or error}"
        ) from error
    except (ValueError, EOFError, BadZipFile, zlib.error) as error:
        # NumPy's own words may advise to trust the file.
        raise ValueError(
            f"--input {text}: '{path}' is damaged or does not hold arrays of numbers; expected what"
            " numpy.save or numpy.savez writes"
        ) from error


def given_sizes(texts: Sequence[str]) -> dict[str, int]:
    """Sizes of ``--dim NAME=3``."""
    sizes = {}
    for text in texts:
        name, value = pair(text, "--dim")
        if not value.isdecimal():
            raise ValueError(f"--dim must be like NAME=3, got '{text}'")
        sizes[name] = int(value)
    return sizes


def given_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of ``--shape NAME=1,8``."""
    shapes = {}
    for text in texts:
        name, value = pair(text, "--shape")
        numbers = value.split(",")
        if not all(n.strip().isdecimal() for n in numbers):
            raise ValueError(f"--shape must be like NAME=1,8, got '{text}'")
        shapes[name] = tuple(int(n) for n in numbers)
    return shapes


def console() -> Console:
    """For tables on standard output."""
    # A pipe has no width; a table must not be cut there.
    return Console() if sys.stdout.isatty() else Console(width=240)
