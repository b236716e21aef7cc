"""Writes a model with its external data copied in a stream, atomically."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto

from moe_infer.graph.external import all_tensors, is_external, locate, tensor_bytes
from moe_infer.weights.atomic import AtomicFile

EMBEDDED_BYTES = 1024
"""Up to this size a tensor that was external is stored in the graph itself."""

MOST_EMBEDDED = 1 << 30
"""Bytes of embedded tensors from which these, too, go to the data file: protobuf ends at 2 GiB."""

_ALIGNMENT = 4096
"""Of each tensor in the data file, so that it can be mapped."""


def tensors_to_move(model: onnx.ModelProto) -> list[TensorProto]:
    """Tensors whose bytes go to the data file or into the graph, in the graph's order."""
    tensors = list(all_tensors(model.graph))
    embedded = [t for t in tensors if not is_external(t)]
    moved = [t for t in tensors if is_external(t)]
    if sum(t.ByteSize() for t in embedded) > MOST_EMBEDDED:
        moved += [t for t in embedded if t.HasField("raw_data") and t.ByteSize() > EMBEDDED_BYTES]
    return moved


def bytes_to_move(model: onnx.ModelProto) -> int:
    """Their size, for a progress bar."""
    return sum(tensor_bytes(t) for t in tensors_to_move(model))


def save_model(
    model: onnx.ModelProto, path: Path, base_dir: Path, advance: Callable[[int], None]
) -> Path | None:
    """Writes ``path`` and, if the model has external data, ``path.data`` beside it.

    Args:
        model: changed so that it refers to the new data file.
        path: of the ONNX file.
        base_dir: folder of the model's present external data.
        advance: called with the number of bytes done.

    Returns:
        The data file, or None when everything is in the ONNX file.

    Raises:
        ExternalDataError: external data is refused, see :mod:`moe_infer.graph.external`.
    """
    moved = tensors_to_move(model)
    data_path: Path | None = None
    if any(tensor_bytes(t) > EMBEDDED_BYTES for t in moved):
        data_path = path.with_name(path.name + ".data")
        with AtomicFile(data_path) as data:
            for tensor in moved:
                _move(tensor, base_dir, data, data_path.name, advance)
            data.commit()
    else:
        for tensor in moved:
            _embed(tensor, base_dir)
    with AtomicFile(path) as file:
        file.file.write(model.SerializeToString())
        file.commit()
    return data_path


def _move(
    tensor: TensorProto,
    base_dir: Path,
    data: AtomicFile,
    location: str,
    advance: Callable[[int], None],
) -> None:
    size = tensor_bytes(tensor)
    if size <= EMBEDDED_BYTES:
        _embed(tensor, base_dir)
        return
    chunks = locate(tensor, base_dir).chunks() if is_external(tensor) else iter([tensor.raw_data])
    file = data.file
    file.seek(-file.tell() % _ALIGNMENT, 1)
    offset = file.tell()
    for chunk in chunks:
        file.write(chunk)
        advance(len(chunk))
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)


def _embed(tensor: TensorProto, base_dir: Path) -> None:
    if is_external(tensor):
        raw = b"".join(locate(tensor, base_dir).chunks())
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = raw
