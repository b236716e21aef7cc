"""Graphs of older releases of transformers that tools/make_export_fixtures.py made."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent / "exports"


def unpack(name: str, folder: Path) -> Path:
    """The graph as a file of its own."""
    path = folder / "in" / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.decompress((FOLDER / f"{name}.onnx.gz").read_bytes()))
    return path


def recorded(name: str) -> tuple[dict[str, Any], Any]:
    """Inputs, and PyTorch's output for them."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as archive:
        feeds = dict(archive)
    return feeds, feeds.pop("logits")
