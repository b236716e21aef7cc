"""Where results are written: checked before the work, so that nothing half-done is left."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx

from moe_infer.graph.external import locate
from moe_infer.graph.lower_data import external_tensors
from moe_infer.graph.lower_nodes import LayerNode


def make_folder(path: Path) -> None:
    """Makes a folder for results, with its parents.

    Raises:
        NotADirectoryError: a file is in its place, or in a parent's.
        PermissionError: it cannot be written.
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(p for p in (path, *path.parents) if p.exists())
        raise NotADirectoryError(
            f"folder '{path}' cannot be made: '{file}' is a file; give another path"
        ) from None
    except OSError as error:
        raise type(error)(
            f"folder '{path}' cannot be made: {error.strerror}; give one that can be written"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"folder '{path}' cannot be written; give one that can")


def make_place(out: str | os.PathLike[str]) -> Path:
    """The path of a file to write, whose folder is made.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: its folder cannot be made or written.
    """
    path = Path(out)
    if path.is_dir():
        example = path / "model.onnx"
        raise IsADirectoryError(
            f"'{out}' is a folder; expected the path of a file to write, such as '{example}'"
        )
    make_folder(path.parent)
    return path


def refuse_overwriting(
    target: Path, model: onnx.ModelProto, layers: Iterable[LayerNode], folder: Path | None
) -> None:
    """Refuses a result in the place of one of the files that a model's weights are in.

    Raises:
        ValueError: ``target`` is one.
    """
    weights = {layer.weights.file.path for layer in layers if layer.weights.file is not None}
    weights |= {locate(tensor, folder or Path.cwd()).path for tensor in external_tensors(model)}
    if target.resolve() in {path.resolve() for path in weights}:
        raise ValueError(f"writing {target} would overwrite weights of the model; give another out")
