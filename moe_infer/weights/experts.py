"""The experts of one layer in a weight file, checked against the layer's configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from moe_infer.op import ExpertTensor, LayerConfig
from moe_infer.weights.errors import WeightFileError, listed, shown
from moe_infer.weights.file import WeightFile
from moe_infer.weights.formats import open_weight_file
from moe_infer.weights.index import TensorInfo
from moe_infer.weights.paths import resolve_weight_path

_EXPERT_KEY = re.compile(r"(0|[1-9][0-9]{0,9})/(.+)", re.S)
_CHUNK = 1 << 22
# Exponent bits: all ones mean infinity or NaN.
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


class ExpertWeights:
    """The experts of one layer; made by :func:`open_expert_weights`.

    Attributes:
        config: the layer.
        file: the weight file; None for a sub-layer without weights.
        d_model: last dimension of hidden_states that the weights fit; 0 if nothing tells it.
        form: ``stacked`` (one tensor for all experts) or ``separate`` (one for each).
    """

    def __init__(
        self,
        config: LayerConfig,
        file: WeightFile | None,
        d_model: int,
        form: Literal["stacked", "separate"],
    ) -> None:
        self.config = config
        self.file = file
        self.d_model = d_model
        self.form = form

    @property
    def dtypes(self) -> dict[str, str]:
        """Type of each of the sub-layer's tensors, by its name; the same for all experts."""
        return {t.name: self._infos(t, 0)[0].dtype for t in self.config.tensors}

    @property
    def dtype(self) -> str:
        """Type of the tensor that holds most of the weights; ``dtypes`` has all.

        ``float32`` for a sub-layer without weights.
        """
        sizes = {t.name: sum(i.nbytes for i in self._infos(t, 0)) for t in self._tensors}
        return self.dtypes[max(sizes, key=lambda n: sizes[n])] if sizes else "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of all experts in the file's types (of deflated members, once inflated)."""
        return sum(info.nbytes for _, info in self._all())

    def stacked(self, tensor_name: str) -> TensorInfo | None:
        """The tensor that holds ``tensor_name`` of all experts; None where each has its own."""
        if self.file is None or self.form != "stacked":
            return None
        return self.file.tensors.get(self.config.expert_weight_prefix + tensor_name)

    def part(self, e: int, part_name: str) -> TensorInfo | None:
        """The tensor that holds one part of expert ``e``; None where the experts are stacked."""
        if self.file is None or self.form != "separate":
            return None
        return self.file.tensors.get(f"{self.config.expert_weight_prefix}{e}/{part_name}")

    def expert(self, e: int) -> dict[str, np.ndarray[Any, Any]]:
        """The packed tensors of one expert, by name, in the file's types.

        A view of the mapped file where the file holds the packed layout, otherwise a copy.

        Args:
            e: 0 up to expert_count.

        Raises:
            IndexError: there is no such expert.
            WeightFileError: a deflated member is damaged.
        """
        if not 0 <= e < self.config.expert_count:
            raise IndexError(f"expert {e} of {self.config.expert_count}")
        return {tensor.name: self._packed(tensor, e) for tensor in self._tensors}

    def check_finite(self) -> None:
        """Reads all weights of the layer and refuses NaN and infinity.

        Raises:
            WeightFileError: the message names the tensor, the position and the value.
        """
        for what, info in self._all():
            assert self.file is not None
            flat = self.file.read(info.name).reshape(-1)
            bits = flat.view(np.uint32 if info.dtype == "float32" else np.uint16)
            exponent = _EXPONENTS[info.dtype]
            for begin in range(0, bits.size, _CHUNK):
                bad = (bits[begin : begin + _CHUNK] & exponent) == exponent
                if bad.any():
                    first = begin + int(bad.argmax())
                    index = [int(i) for i in np.unravel_index(first, info.shape)]
                    where = f"expert {index[0]} of tensor" if what is None else "tensor"
                    raise WeightFileError(
                        f"{self.file.path}: {where} {shown(info.name)} holds {float(flat[first])}"
                        f" at {index}; expected finite numbers; export the weights again"
                    )

    @property
    def _tensors(self) -> tuple[ExpertTensor, ...]:
        return self.config.tensors

    def _names(self, tensor: ExpertTensor, e: int) -> list[str]:
        prefix = self.config.expert_weight_prefix
        if self.form == "stacked":
            return [prefix + tensor.name]
        return [f"{prefix}{e}/{part}" for part in tensor.parts]

    def _infos(self, tensor: ExpertTensor, e: int) -> list[TensorInfo]:
        assert self.file is not None
        return [self.file.tensors[name] for name in self._names(tensor, e)]

    def _all(self) -> Iterator[tuple[int | None, TensorInfo]]:
        """(expert, tensor of the file); expert None for a stacked one."""
        experts = [0] if self.form == "stacked" else range(self.config.expert_count)
        for e in experts:
            for tensor in self._tensors:
                for info in self._infos(tensor, e):
                    yield (None if self.form == "stacked" else e), info

    def _packed(self, tensor: ExpertTensor, e: int) -> np.ndarray[Any, Any]:
        assert self.file is not None
        parts = [self.file.read(name) for name in self._names(tensor, e)]
        if self.form == "stacked":
            return parts[0][e]  # type: ignore[no-any-return]
        if len(parts) == 1:
            return parts[0]
        packed: np.ndarray[Any, Any] = np.stack(parts, axis=1)
        packed = packed.reshape(tensor.shape(self.d_model, self.config.hidden_size))
        packed.flags.writeable = False
        return packed


def open_expert_weights(
    config: LayerConfig,
    d_model: int | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> ExpertWeights:
    """Opens a layer's weight file and checks that it holds exactly the layer's experts.

    Reads the index only; ``check_finite`` reads the weights. The file may hold other layers under
    other prefixes; with an empty prefix it must hold nothing else.

    Args:
        config: the layer.
        d_model: last dimension of hidden_states; taken from the file if not given.
        base_dir: the model's folder, see :func:`resolve_weight_path`.

    Raises:
        FileNotFoundError: the file is nowhere.
        WeightFileError: it is damaged, its digest is not the attribute's, an expert or tensor is
            missing or surplus, or a shape or type does not fit.
    """
    if not config.tensors:
        return ExpertWeights(config, None, d_model or _d_model_of(config), "stacked")
    file = open_weight_file(resolve_weight_path(config.expert_weight_file, base_dir))
    if config.expert_weight_digest and config.expert_weight_digest != file.digest:
        raise WeightFileError(
            f"{file.path} has digest {file.digest}, but attribute 'expert_weight_digest' is"
            f" '{config.expert_weight_digest}': the file is not the one for which the model was"
            " made; put that file back, or rewrite the model"
        )
    form = _check_names(config, file)
    if d_model is None:
        d_model = _infer_d_model(config, file, form)
    weights = ExpertWeights(config, file, d_model, form)
    _check_tensors(weights)
    return weights


def _d_model_of(config: LayerConfig) -> int:
    return config.embedding_size or len(config.expert_centroids or ()) // config.expert_count


def _check_names(config: LayerConfig, file: WeightFile) -> Literal["stacked", "separate"]:
    """Checks that each expected name is there and no other under the prefix."""
    prefix = config.expert_weight_prefix
    under = {n[len(prefix) :] for n in file.tensors if n.startswith(prefix)}
    stacked = {t.name for t in config.tensors}
    if under & stacked:
        form: Literal["stacked", "separate"] = "stacked"
        expected = sorted(stacked)
    else:
        form = "separate"
        parts = [p for t in config.tensors for p in t.parts]
        expected = [f"{e}/{p}" for e in range(config.expert_count) for p in parts]
    missing = [name for name in expected if name not in under]
    layer = f"{config.expert_count} experts of {config.expert_sublayer_type}"
    layer += " with biases" if config.expert_bias else ""
    if missing:
        names = listed([shown(prefix + name) for name in missing])
        held = listed([shown(name) for name in sorted(file.tensors)]) or "nothing"
        raise WeightFileError(
            f"{file.path}: {len(missing)} of {len(expected)} tensors for {layer} are missing:"
            f" {names}; the file holds {held}; check attributes 'expert_count',"
            " 'expert_sublayer_type', 'expert_bias' and 'expert_weight_prefix', or write the file"
            " again"
        )
    surplus = sorted(under - set(expected), key=_expert_order)
    if surplus:
        names = listed([shown(prefix + name) for name in surplus])
        raise WeightFileError(
            f"{file.path}: {len(surplus)} tensors under prefix '{prefix}' do not belong to"
            f" {layer}: {names}; check attributes 'expert_count', 'expert_sublayer_type',"
            " 'expert_bias' and 'expert_weight_prefix' (a file with more than one layer needs a"
            " prefix for each)"
        )
    return form


def _expert_order(name: str) -> tuple[int, str]:
    match = _EXPERT_KEY.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _infer_d_model(
    config: LayerConfig, file: WeightFile, form: Literal["stacked", "separate"]
) -> int:
    tensor = next(t for t in config.tensors if "d_model" in t.part_shape)
    axis = tensor.part_shape.index("d_model")
    key = tensor.name if form == "stacked" else f"0/{tensor.parts[0]}"
    shape = file.tensors[config.expert_weight_prefix + key].shape
    sizes = shape[1:] if form == "stacked" else shape
    # What does not divide or has another rank is reported as a wrong shape right after this.
    size = sizes[axis] if axis < len(sizes) else 0
    packed = len(tensor.parts) if form == "stacked" and axis == 0 else 1
    return max(size // packed, 1)


def _check_tensors(weights: ExpertWeights) -> None:
    """Checks shapes and that each tensor has one type in all experts."""
    config, file = weights.config, weights.file
    assert file is not None
    stacked = weights.form == "stacked"
    for tensor in config.tensors:
        packed = tensor.shape(weights.d_model, config.hidden_size)
        part = tensor.resolve_part_shape(weights.d_model, config.hidden_size)
        expected = (config.expert_count, *packed) if stacked else part
        first = weights._infos(tensor, 0)[0]
        for e in range(1 if stacked else config.expert_count):
            for info in weights._infos(tensor, e):
                if info.shape != expected:
                    raise WeightFileError(
                        f"{file.path}: tensor {shown(info.name)} has shape {info.shape}, expected"
                        f" {expected} (expert_count {config.expert_count}, hidden_size"
                        f" {config.hidden_size}, d_model {weights.d_model}); correct the"
                        " attributes or write the file again"
                    )
                if info.dtype != first.dtype:
                    raise WeightFileError(
                        f"{file.path}: tensor {shown(info.name)} is {info.dtype}, but"
                        f" {shown(first.name)} is {first.dtype}; the experts' tensors of one kind"
                        " must have one type, convert them"
                    )
