"""The experts' weights as initializers of a lowered model, which stay in the weight file.

A tensor that is stored as it is becomes external data of the model: a file, an offset and a
length. While a model is being lowered the locations are absolute; ONNX Runtime takes only relative
ones, inside one folder, so ``place_*`` then moves them to where the model is used:

- for a session in this process: relative to the folder that holds all of them, which the session
  is told;
- for a model file: inside its folder, by a hard link where the weight file is elsewhere, so that
  there is no second copy on the disk (a copy only where the folder is on another file system).

A deflated tensor has no such place: it is read into memory, or written beside the model file.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from moe_infer.graph.external import all_tensors, is_external, locate
from moe_infer.graph.lower_builder import Names
from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.weights import SafetensorsWriter, TensorInfo, WeightFile, open_weight_file

ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
FOLDER_KEY = "moe_infer.external_data_folder"
"""Metadata of a lowered model that has no file yet: the folder of its external data."""

_INFLATED = "moe_infer/inflated"
"""Location of external data that are not in a file yet."""


@dataclass(frozen=True)
class Weight:
    """An initializer with one tensor, or one part of a tensor, of one expert (or all, stacked)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Source:
    """A tensor of a weight file, or its entry ``index``."""

    file: WeightFile
    info: TensorInfo
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape if self.index is None else self.info.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.info.nbytes if self.index is None else self.info.nbytes // self.info.shape[0]


@dataclass
class ExpertData:
    """Makes the initializers, and knows which of them are deflated in their file.

    Attributes:
        names: of the model that is lowered; gets the initializers.
        inflated: source of each initializer that has no bytes in a file.
    """

    names: Names
    inflated: dict[str, _Source] = field(default_factory=dict)

    @property
    def inflated_bytes(self) -> int:
        """Memory that the deflated tensors take."""
        return sum(source.nbytes for source in self.inflated.values())

    def expert(self, layer: LayerNode, e: int) -> dict[str, list[Weight]]:
        """The tensors of expert ``e`` by name: one initializer (packed), or one for each part."""
        found: dict[str, list[Weight]] = {}
        for tensor in layer.config.tensors:
            whole = layer.weights.stacked(tensor.name)
            if whole is not None:
                found[tensor.name] = [self._add(layer, f"{tensor.name}/{e}", whole, e)]
            else:
                infos = [(part, layer.weights.part(e, part)) for part in tensor.parts]
                found[tensor.name] = [
                    self._add(layer, f"{part}/{e}", info, None)
                    for part, info in infos
                    if info is not None
                ]
        return found

    def stacked(self, layer: LayerNode, tensor_name: str) -> Weight:
        """One initializer with ``tensor_name`` of all experts."""
        info = layer.weights.stacked(tensor_name)
        assert info is not None
        return self._add(layer, tensor_name, info, None)

    def arrays(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """The deflated tensors, each inflated once."""
        last: tuple[str, str] | None = None
        for name, source in self.inflated.items():
            key = (str(source.file.path), source.info.name)
            if key != last:
                values, last = source.file.read(source.info.name), key
            yield name, values if source.index is None else values[source.index]

    def _add(self, layer: LayerNode, suffix: str, info: TensorInfo, index: int | None) -> Weight:
        file = layer.weights.file
        assert file is not None
        source = _Source(file, info, index)
        tensor = TensorProto(
            name=self.names.new(f"{layer.name}/{suffix}"),
            data_type=ELEMENT_TYPES[info.dtype],
            dims=source.shape,
            data_location=TensorProto.EXTERNAL,
        )
        if info.stored:
            offset = info.offset + (index or 0) * source.nbytes
            # Symbolic links are resolved because ONNX Runtime resolves them before it compares
            # the path with the folder.
            _set(tensor, os.path.realpath(file.path), offset, source.nbytes)
        else:
            _set(tensor, _INFLATED, 0, source.nbytes)
            self.inflated[tensor.name] = source
        self.names.initializers.append(tensor)
        return Weight(tensor.name, info.dtype, source.shape)


def make_absolute(model: onnx.ModelProto, base_dir: Path | None) -> None:
    """Makes the locations of the model's own external data absolute, after checking them.

    Raises:
        ExternalDataError: external data are missing, outside the folder or of a wrong size.
    """
    for tensor in external_tensors(model):
        found = locate(tensor, base_dir or Path.cwd())
        _set(tensor, str(found.path), found.offset, found.length)


def place_in_memory(model: onnx.ModelProto) -> Path | None:
    """Makes all locations relative to one folder and returns it; None if there are none."""
    tensors = [t for t in external_tensors(model) if _location(t) != _INFLATED]
    if not tensors:
        return None
    folder = os.path.commonpath([os.path.dirname(_location(t)) for t in tensors])
    for tensor in tensors:
        _relocate(tensor, os.path.relpath(_location(tensor), folder))
    return Path(folder)


def embed_inflated(model: onnx.ModelProto, data: ExpertData) -> None:
    """Puts the deflated tensors into the model itself."""
    tensors = {t.name: t for t in model.graph.initializer if t.name in data.inflated}
    for name, values in data.arrays():
        tensor = tensors[name]
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = np.ascontiguousarray(values).tobytes()


def place_beside(model: onnx.ModelProto, data: ExpertData, out: Path) -> None:
    """Makes all locations relative to the model file ``out``, inside its folder.

    Raises:
        OSError: a link cannot be made and the file cannot be copied either.
    """
    folder = Path(os.path.realpath(out.parent))
    if data.inflated:
        _write_inflated(model, data, folder / f"{out.stem}.experts.safetensors")
    placed: dict[str, str] = {}
    for tensor in external_tensors(model):
        location = _location(tensor)
        if location not in placed:
            placed[location] = _bring(Path(location), folder, out.stem)
        _relocate(tensor, placed[location])


def external_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """All tensors of a model whose bytes are in another file."""
    return (t for t in all_tensors(model.graph) if is_external(t))


def _write_inflated(model: onnx.ModelProto, data: ExpertData, path: Path) -> None:
    header = {name: (s.info.dtype, s.shape) for name, s in data.inflated.items()}
    with SafetensorsWriter(path, header) as writer:
        for name, values in data.arrays():
            writer.write(name, values)
    written = open_weight_file(path).tensors
    for tensor in model.graph.initializer:
        if tensor.name in data.inflated:
            info = written[tensor.name]
            _set(tensor, str(path), info.offset, info.nbytes)


def _bring(source: Path, folder: Path, stem: str) -> str:
    """Where ``source`` is inside ``folder``, after linking it there if it is not."""
    if source.is_relative_to(folder):
        return str(source.relative_to(folder))
    for count in range(1000):
        target = folder / f"{stem}.{f'{count}.' if count else ''}{source.name}"
        try:
            os.link(source, target)
        except FileExistsError:
            if os.path.samefile(source, target):
                return target.name
            continue
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            warnings.warn(
                f"{source} is copied to {target}: it cannot be linked there ({error.strerror})."
                " ONNX Runtime reads external data only from the model's folder; to avoid the"
                " copy, write the model onto the file system of the weights",
                stacklevel=4,
            )
            try:
                shutil.copyfile(source, target)
            except BaseException:
                target.unlink(missing_ok=True)
                raise
        return target.name
    raise FileExistsError(f"{folder} is full of files named like {stem}.{source.name}")


def _location(tensor: TensorProto) -> str:
    return next((str(e.value) for e in tensor.external_data if e.key == "location"), "")


def _relocate(tensor: TensorProto, location: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            # ONNX's separator is a slash, on every system.
            entry.value = location.replace(os.sep, "/")


def _set(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
