"""Opening a weight file by its format."""

from __future__ import annotations

import os
from pathlib import Path

from moe_infer.weights.errors import WeightFileError
from moe_infer.weights.file import WeightFile
from moe_infer.weights.npz_file import NpzFile
from moe_infer.weights.safetensors_file import SafetensorsFile

# By the name's end, not by content: a safetensors file may begin with the same bytes as a zip.
_FORMATS: dict[str, type[NpzFile] | type[SafetensorsFile]] = {
    ".npz": NpzFile,
    ".safetensors": SafetensorsFile,
}


def open_weight_file(path: str | os.PathLike[str]) -> WeightFile:
    """Maps a weight file and checks its whole index; reads no weights.

    Args:
        path: ends in ``.npz`` or ``.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        WeightFileError: the file is not what its name says, or damaged.
    """
    found = Path(os.path.abspath(path))
    if found.suffix not in _FORMATS:
        raise WeightFileError(
            f"{found}: the name of a weight file must end in .npz or .safetensors, got"
            f" '{found.suffix}'; rename or convert the file"
        )
    return _FORMATS[found.suffix](found)
