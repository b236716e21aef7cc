"""The experts of matched blocks, written as one stacked safetensors file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_infer.graph.external import Constant, ConstantStack, numpy_dtype
from moe_infer.graph.match import GraphView, Match, Part
from moe_infer.op import ExpertTensor
from moe_infer.weights import SafetensorsWriter

_BLOCK_BYTES = 4 << 20
"""Of a packed piece of a matrix."""

_AHEAD_BYTES = 32 << 20
"""The kernel is told what will be read so far ahead."""

Source = Constant | ConstantStack
Constants = Mapping[str, Source]
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def layer_prefix(index: int) -> str:
    """Prefix of a layer's tensors in the file."""
    return f"layers.{index}."


def open_constants(view: GraphView, match: Match) -> dict[str, Source]:
    """The match's weights, checked but not read.

    Raises:
        ExternalDataError: a weight cannot be read or has the wrong type.
        ValueError: a shape does not fit the match.
    """
    names = dict.fromkeys(part.constant for part in match.parts.values())
    constants = {name: _open(view, match, name) for name in names}
    for tensor in match.tensors:
        wanted = tensor.resolve_part_shape(match.d_model, match.hidden_size)
        for name in tensor.parts:
            part = match.parts[name]
            constant = constants[part.constant]
            if isinstance(constant, Constant) and len(constant.shape) > 1 + len(wanted):
                constant.squeeze()
            shape = constant.shape
            entry = shape[1:][::-1] if part.transpose else shape[1:]
            rows = len(range(part.start, entry[0], part.step))
            if shape[0] != match.expert_count or entry[1:] != wanted[1:] or rows < wanted[0]:
                raise ValueError(
                    f"weight '{part.constant}' has shape {shape}; for {name} of"
                    f" {match.expert_count} experts (…, {', '.join(map(str, wanted))}) is needed"
                )
    return constants


def _open(view: GraphView, match: Match, name: str) -> Source:
    if name not in match.stacks:
        return Constant(view.constants[name], view.base_dir)
    apart = [Constant(view.constants[n], view.base_dir) for n in match.stacks[name]]
    return ConstantStack(name, apart)


def _dtype(match: Match, tensor: ExpertTensor, constants: Constants) -> str:
    """Type of a tensor in the file: that of its parts in the graph, float32 if they differ."""
    found = {constants[match.parts[name].constant].dtype for name in tensor.parts}
    return found.pop() if len(found) == 1 else "float32"


def layer_tensors(
    match: Match, prefix: str, constants: Constants
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of a layer's tensors by their names in the file."""
    return {
        prefix + t.name: (
            _dtype(match, t, constants),
            (match.expert_count, *t.shape(match.d_model, match.hidden_size)),
        )
        for t in match.tensors
    }


def write_experts(
    path: str | os.PathLike[str],
    layers: list[tuple[Match, dict[str, Source]]],
    advance: Callable[[int], None],
) -> str:
    """Writes all layers' experts; holds at most one tensor of one expert at a time.

    Args:
        path: the safetensors file, written atomically.
        layers: matches and their weights, in the order of the prefixes.
        advance: called with the number of bytes done.

    Returns:
        The file's digest.
    """
    tensors: Tensors = {}
    for i, (match, constants) in enumerate(layers):
        tensors.update(layer_tensors(match, layer_prefix(i), constants))
    with SafetensorsWriter(Path(path), tensors) as writer:
        for i, (match, constants) in enumerate(layers):
            for tensor in match.tensors:
                pieces = _experts(match, tensor, constants, advance)
                writer.write(layer_prefix(i) + tensor.name, pieces)
                for constant in constants.values():
                    constant.release()
    assert writer.digest is not None
    return writer.digest


def _experts(
    match: Match, tensor: ExpertTensor, constants: Constants, advance: Callable[[int], None]
) -> Iterator[NDArray[np.generic]]:
    dtype = numpy_dtype(_dtype(match, tensor, constants))
    rows, *columns = tensor.resolve_part_shape(match.d_model, match.hidden_size)
    parts = [match.parts[name] for name in tensor.parts]
    count = len(parts)
    # A transposed matrix is read whole: its rows lie scattered.
    block = rows if any(part.transpose for part in parts) else _block_rows(columns, dtype, count)
    blocks = [
        (e, begin, min(begin + block, rows))
        for e in range(match.expert_count)
        for begin in range(0, rows, block)
    ]
    ahead = max(1, _AHEAD_BYTES // (block * math.prod(columns) * dtype.itemsize * count))
    for number, (e, begin, end) in enumerate(blocks):
        for place in blocks[:ahead] if not number else blocks[number + ahead : number + ahead + 1]:
            for part in parts:
                _announce(constants[part.constant], part, *place)
        packed = np.empty(((end - begin) * count, *columns), dtype)
        for i, part in enumerate(parts):
            packed[i::count] = _rows(constants[part.constant], part, e, begin, end)
        yield packed
        advance(packed.nbytes)


def _block_rows(columns: Sequence[int], dtype: np.dtype[np.generic], parts: int) -> int:
    """Rows of each part that are packed at once: few enough to stay in the processor's cache."""
    return max(1, _BLOCK_BYTES // (math.prod(columns) * dtype.itemsize * parts))


def _announce(constant: Source, part: Part, expert: int, begin: int, end: int) -> None:
    """Lets the kernel read what will be needed while other blocks are packed and written."""
    if not part.transpose:
        constant.announce(expert, *_span(part, begin, end))


def _span(part: Part, begin: int, end: int) -> tuple[int, int]:
    """Rows of the constant that hold the part's rows ``begin`` to ``end``."""
    return part.start + begin * part.step, part.start + (end - 1) * part.step + 1


def _rows(constant: Source, part: Part, expert: int, begin: int, end: int) -> NDArray[np.generic]:
    """Rows ``begin`` to ``end`` of one part of one expert."""
    if part.transpose:
        matrix: NDArray[np.generic] = constant.entry(expert).T
        return matrix[part.start :: part.step][begin:end]
    return constant.rows(expert, *_span(part, begin, end))[:: part.step]
