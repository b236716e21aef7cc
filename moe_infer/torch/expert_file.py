"""Writes the experts of PyTorch modules to a weight file and frees them on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from moe_infer.graph.experts_file import layer_prefix
from moe_infer.op import ExpertTensor, LayerConfig
from moe_infer.torch.adapter import MoEDescription
from moe_infer.weights import SafetensorsWriter

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """One layer to write.

    Attributes:
        name: of the module, for messages.
        config: its attributes; the weight file's do not matter yet.
        description: where the weights are.
    """

    name: str
    config: LayerConfig
    description: MoEDescription

    def tensors(self, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape by name in the file."""
        return {
            prefix + t.name: (self.dtype(t), (self.config.expert_count, *self.shape(t)))
            for t in self.config.tensors
        }

    def shape(self, tensor: ExpertTensor) -> tuple[int, ...]:
        """Packed shape for one expert."""
        return tensor.shape(self.description.d_model, self.config.hidden_size)

    def dtype(self, tensor: ExpertTensor) -> str:
        """Type of a tensor in the file: its parts', float32 if they differ."""
        kinds = {p.dtype for part in tensor.parts for p in self.weights(part)}
        return _DTYPES[kinds.pop()] if len(kinds) == 1 else "float32"

    def weights(self, part: str) -> tuple[Tensor, ...]:
        """What holds a part."""
        return self.description.weights[part].parameters

    @property
    def nbytes(self) -> int:
        """Of the layer's experts in the file."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2}
        return sum(width[d] * int(np.prod(s)) for d, s in self.tensors("").values())


def check(source: Source) -> None:
    """Checks that every part is there, of the right shape and of a type that a file can hold.

    Raises:
        ValueError: names the module, the part, what was found and what is needed.
    """
    config, description = source.config, source.description
    for tensor in config.tensors:
        wanted = tensor.resolve_part_shape(description.d_model, config.hidden_size)
        for part in tensor.parts:
            if part not in description.weights:
                raise ValueError(
                    f"module '{source.name}': the adapter gives no '{part}', which sub-layer"
                    f" '{config.expert_sublayer_type}' has; it gives"
                    f" {', '.join(description.weights) or 'nothing'}"
                )
            for parameter in source.weights(part):
                _check_parameter(source.name, part, parameter)
            for e in (0, config.expert_count - 1):
                found = tuple(description.weights[part].expert(e).shape)
                if found != wanted:
                    raise ValueError(
                        f"module '{source.name}': '{part}' of expert {e} has shape {found}, needed"
                        f" is {wanted} (hidden_size {config.hidden_size}, d_model"
                        f" {description.d_model})"
                    )


def _check_parameter(module: str, part: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise ValueError(
            f"module '{module}': '{part}' is on the meta device, it has no values; load the model"
            " without offloading"
        )
    if parameter.dtype not in _DTYPES:
        raise ValueError(
            f"module '{module}': '{part}' is {parameter.dtype}; a weight file holds float32,"
            " float16 or bfloat16, so quantised experts must be dequantised first"
        )


def write(path: Path, sources: Sequence[Source], advance: Callable[[int], None]) -> str:
    """Writes all layers and frees each parameter once all that it holds has been written.

    Beside the model, memory holds one tensor of one expert.

    Args:
        path: the safetensors file, which appears when it is whole.
        sources: the layers, in the order of the prefixes.
        advance: called with the number of bytes done.

    Returns:
        The file's digest.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i, source in enumerate(sources):
        tensors.update(source.tensors(layer_prefix(i)))
    left = _Uses(sources)
    with SafetensorsWriter(path, tensors) as writer:
        for i, source in enumerate(sources):
            for tensor in source.config.tensors:
                pieces = _experts(source, tensor, left, advance)
                writer.write(layer_prefix(i) + tensor.name, pieces)
    assert writer.digest is not None
    return writer.digest


class _Uses:
    """Counts how often each parameter is still to be read, and frees it after the last time."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._left: Counter[int] = Counter()
        for source in sources:
            for tensor in source.config.tensors:
                for part in tensor.parts:
                    for parameter in self._of(source, part):
                        self._left[id(parameter)] += 1

    def done(self, source: Source, part: str, e: int) -> None:
        """One part of one expert is written."""
        parameters = source.weights(part)
        parameter = parameters[e if len(parameters) > 1 else 0]
        self._left[id(parameter)] -= 1
        if not self._left[id(parameter)]:
            # Whoever still holds the parameter holds no memory by it.
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def _of(self, source: Source, part: str) -> Iterator[Tensor]:
        parameters = source.weights(part)
        count = source.config.expert_count
        yield from parameters if len(parameters) > 1 else parameters * count


def _experts(
    source: Source, tensor: ExpertTensor, left: _Uses, advance: Callable[[int], None]
) -> Iterator[np.ndarray[Any, Any]]:
    dtype = source.dtype(tensor)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for e in range(source.config.expert_count):
        packed = np.empty(source.shape(tensor), kind)
        for i, part in enumerate(tensor.parts):
            value = source.description.weights[part].expert(e)
            packed[i :: len(tensor.parts)] = _array(value).astype(kind, copy=False)
            del value
            left.done(source, part, e)
        yield packed
        advance(packed.nbytes)


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    value = value.detach().cpu()
    if value.dtype != torch.bfloat16:
        return value.numpy()  # type: ignore[no-any-return]
    return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
