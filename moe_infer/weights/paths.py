"""Where a weight file is looked for."""

from __future__ import annotations

import os
from pathlib import Path

from moe_infer.weights.errors import WeightFileError

WEIGHT_DIR_VARIABLE = "MOE_INFER_WEIGHT_DIR"


def resolve_weight_path(
    path: str | os.PathLike[str], base_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Finds the file that attribute ``expert_weight_file`` names.

    An absolute path is taken as it is. A relative one is tried against ``base_dir`` (the model's
    folder) if given, then the environment's ``MOE_INFER_WEIGHT_DIR``, then the working directory;
    the first that exists is taken. The C++ side has no ``base_dir`` and is the same otherwise.

    Args:
        path: absolute or relative; ``..`` and symbolic links are followed (docs/weight-files.md
            tells what that means for a model from a stranger).
        base_dir: folder of the model that names the file.

    Returns:
        The absolute path, with symbolic links as they are.

    Raises:
        FileNotFoundError: it is nowhere; the message lists what was tried.
        WeightFileError: the path is empty or holds a NUL.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise WeightFileError(
            f"weight file: the path must be a non-empty text without NUL, got {text!r}; set"
            " attribute 'expert_weight_file'"
        )
    if os.path.isabs(text):
        candidates = [text]
    else:
        folders = [base_dir, os.environ.get(WEIGHT_DIR_VARIABLE) or None, os.getcwd()]
        candidates = [os.path.join(os.path.abspath(f), text) for f in folders if f is not None]
    for candidate in candidates:
        if os.path.exists(candidate):
            return Path(candidate)
    raise FileNotFoundError(
        f"weight file '{text}' not found; tried {', '.join(candidates)}; set"
        f" {WEIGHT_DIR_VARIABLE} to its folder, or give an absolute path"
    )
