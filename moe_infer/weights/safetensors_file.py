"""Reading safetensors: 8 length bytes, a JSON header, then the tensors without gaps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

from moe_infer.weights.errors import WeightFileError
from moe_infer.weights.file import WeightFile, index_digest
from moe_infer.weights.index import MAX_INDEX_BYTES, TensorInfo
from moe_infer.weights.safetensors_header import parse_header

CONTENT_KEY = "content_sha256"
"""Key in ``__metadata__``: sha256 over the sha256 of every tensor, in the order of the data.

It puts the contents into the index, so that the file's digest changes with any weight.
"""


class SafetensorsFile(WeightFile):
    """A safetensors file, mapped and checked."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self.size < 10:
            raise WeightFileError(
                f"{path} has {self.size} bytes; a safetensors file has at least 10; it is"
                " truncated, copy or write it again"
            )
        length = int.from_bytes(self.bytes_at(0, 8), "little")
        if length > self.size - 8:
            raise WeightFileError(
                f"{path}: the safetensors header has {length} bytes by its length field, but only"
                f" {self.size - 8} follow; the file is truncated or no safetensors file, copy or"
                " write it again"
            )
        if length > MAX_INDEX_BYTES:
            raise WeightFileError(
                f"{path}: the safetensors header has {length} bytes; at most {MAX_INDEX_BYTES} are"
                " allowed; split the file"
            )
        header = self.bytes_at(8, 8 + length)
        self.tensors, self.metadata = parse_header(str(path), header, self.size)
        self.digest = index_digest(header, self.size)

    def verify_content(self) -> None:
        """Compares the data with the digest in ``__metadata__``, where there is one."""
        expected = self.metadata.get(CONTENT_KEY)
        if expected is None:
            return
        digests = []
        for info in data_order(self.tensors):
            data = self._data[info.offset : info.offset + info.nbytes]
            digests.append(hashlib.sha256(data.data).digest())
        found = content_digest(digests)
        if found != expected:
            raise WeightFileError(
                f"{self.path}: the weights' sha256 is {found}, but the header says"
                f" {expected[:64]!r}; the file is damaged, copy or write it again"
            )

    def _inflate(self, info: TensorInfo) -> NoReturn:
        raise AssertionError("safetensors are never deflated")


def data_order(tensors: dict[str, TensorInfo]) -> list[TensorInfo]:
    """Tensors as their data lie in the file; the name decides between empty ones."""
    return sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes, t.name))


def content_digest(tensor_digests: list[bytes]) -> str:
    """The value of ``CONTENT_KEY`` for the tensors' sha256, in the order of the data."""
    total = hashlib.sha256()
    for digest in tensor_digests:
        total.update(digest)
    return total.hexdigest()
