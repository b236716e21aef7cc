"""Routing traces: which experts each token chose in each layer, and the calls that follow."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_infer.weights.atomic import AtomicFile

FORMAT = "moe-infer trace 1"
MOST_BYTES = 1 << 30
"""Of a trace file's arrays together, inflated."""
MOST_EXPERTS = 1 << 16

_NAMES = ("format", "source", "layers", "expert_count", "choices")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Calls:
    """The calls of one expert cache.

    Attributes:
        expert_count: experts that there are.
        offsets: (calls + 1) int64 from 0 on.
        experts: (offsets[-1]) int32; call c needs ``experts[offsets[c]:offsets[c + 1]]``, which are
            ascending and each there once.
        tokens: (calls) int64, tokens in each call.
    """

    expert_count: int
    offsets: Array
    experts: Array
    tokens: Array

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Trace:
    """What the tokens of some sequences chose.

    Attributes:
        expert_count: experts of each layer.
        choices: (layers, sequences, tokens, top_k) integers from 0 to expert_count - 1; the experts
            of one token differ.
        layers: names, one for each layer.
        source: where it comes from, for people.

    Raises:
        ValueError: an array has another shape or type, or an expert does not exist.
    """

    expert_count: int
    choices: Array
    layers: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        choices = self.choices
        if not 0 < self.expert_count <= MOST_EXPERTS:
            raise ValueError(
                f"trace: expert_count must be 1 to {MOST_EXPERTS}, got {self.expert_count}"
            )
        if choices.ndim != 4 or choices.dtype.kind not in "iu" or 0 in choices.shape:
            raise ValueError(
                "trace: choices must be integers (layers, sequences, tokens, top_k), none of them"
                f" 0, got {choices.dtype} {choices.shape}"
            )
        if len(self.layers) != len(choices):
            raise ValueError(f"trace: {len(choices)} layers have {len(self.layers)} names")
        least, most = int(choices.min()), int(choices.max())
        if least < 0 or most >= self.expert_count:
            raise ValueError(
                f"trace: experts must be 0 to {self.expert_count - 1}, got {least} to {most}"
            )
        ordered = np.sort(choices, axis=-1)
        if np.any(ordered[..., 1:] == ordered[..., :-1]):
            raise ValueError("trace: a token chose the same expert twice in a layer")

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.choices.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens of each sequence."""
        return int(self.choices.shape[2])

    @property
    def top_k(self) -> int:
        """Experts of each token."""
        return int(self.choices.shape[3])

    def calls(self, layer: int, batch: int = 1, prefill: int = 0) -> Calls:
        """The calls of one layer.

        ``batch`` sequences run together: first one call with the first ``prefill`` tokens of each,
        then one call for each further position, with one token of each. The next ``batch``
        sequences follow; the last group may be smaller.

        Args:
            layer: its index.
            batch: sequences in a call, at least 1.
            prefill: tokens of a prompt, 0 for none, at most ``tokens``.

        Raises:
            ValueError: a number is out of its range.
        """
        if batch < 1 or not 0 <= prefill <= self.tokens:
            raise ValueError(
                f"batch must be at least 1 and prefill 0 to {self.tokens}, got {batch} and"
                f" {prefill}"
            )
        parts: list[Array] = []
        tokens: list[int] = []
        for first in range(0, self.sequences, batch):
            group = self.choices[layer, first : first + batch]
            steps = [group[:, t] for t in range(prefill, self.tokens)]
            if prefill:
                steps.insert(0, group[:, :prefill])
            parts += [np.unique(step) for step in steps]
            tokens += [step.size // self.top_k for step in steps]
        return _joined(self.expert_count, parts, tokens)

    def shared_calls(self, batch: int = 1, prefill: int = 0) -> Calls:
        """The calls of one cache that all layers share, in the order in which a model makes them.

        Expert e of layer l is number ``l * expert_count + e``; see :meth:`calls`.
        """
        layers = [self.calls(layer, batch, prefill) for layer in range(len(self.layers))]
        parts = [
            calls.experts[calls.offsets[i] : calls.offsets[i + 1]] + layer * self.expert_count
            for i in range(len(layers[0]))
            for layer, calls in enumerate(layers)
        ]
        tokens = np.repeat(layers[0].tokens, len(layers)).tolist()
        return _joined(self.expert_count * len(layers), parts, tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a compressed npz file; another file of that name stays until it is whole."""
        small = np.uint8 if self.expert_count <= 256 else np.uint16
        with AtomicFile(Path(path)) as output:
            np.savez_compressed(
                output.file,
                format=np.array(FORMAT),
                source=np.array(self.source),
                layers=np.array(self.layers, np.str_),
                expert_count=np.array(self.expert_count, np.int64),
                choices=self.choices.astype(small),
            )
            output.commit()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads what :meth:`save` wrote. The file is not trusted.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, larger than ``MOST_BYTES``, or no trace.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                sizes = {info.filename: info.file_size for info in archive.infolist()}
            expected = {f"{name}.npy" for name in _NAMES}
            if set(sizes) != expected or sum(sizes.values()) > MOST_BYTES:
                raise ValueError(
                    f"expected the arrays {', '.join(_NAMES)} of at most {MOST_BYTES} bytes, found"
                    f" {', '.join(sorted(sizes)[:8])} of {sum(sizes.values())}"
                )
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in _NAMES}
            kinds = {"format": "U", "source": "U", "layers": "U", "expert_count": "i"}
            for name, kind in kinds.items():
                if found[name].dtype.kind != kind or found[name].ndim != (name == "layers"):
                    raise ValueError(f"{name} is {found[name].dtype} {found[name].shape}")
            if str(found["format"]) != FORMAT:
                raise ValueError(f"format must be '{FORMAT}', got '{str(found['format'])[:80]}'")
            return cls(
                int(found["expert_count"]),
                found["choices"],
                tuple(str(name) for name in found["layers"]),
                str(found["source"]),
            )
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # numpy and zipfile raise what their parsers happen to meet
            raise ValueError(
                f"{os.fspath(path)} is no trace that can be read: {error}; write it again with"
                " Trace.save or `moe-infer simulate --save`"
            ) from error


def _joined(expert_count: int, parts: Sequence[Array], tokens: Sequence[int]) -> Calls:
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    experts = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
    return Calls(expert_count, offsets, experts, np.asarray(tokens, np.int64))
