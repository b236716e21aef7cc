"""A mapped, checked weight file; the two formats derive from it."""

from __future__ import annotations

import os
import stat
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_infer.weights.errors import WeightFileError, listed, shown
from moe_infer.weights.index import TensorInfo, numpy_dtype


def index_digest(index: bytes, size: int) -> str:
    """Digest of a weight file: crc32 of the bytes of its index and its size, as in C++."""
    return f"{zlib.crc32(index):08x}-{size}"


class WeightFile(ABC):
    """A weight file, mapped read-only, its index checked; made by ``open_weight_file``.

    The mapping is of the file as it was opened: writers replace a file by renaming, so it survives
    that. Shortening a mapped file in place ends the process that reads it (SIGBUS).
    """

    format: Literal["npz", "safetensors"]
    tensors: dict[str, TensorInfo]
    """By name; npz names without ``.npy``."""
    digest: str
    """crc32 of the index and size of the file; attribute ``expert_weight_digest`` holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise WeightFileError(
                    f"{path} is not a regular file; expected an .npz or .safetensors file"
                )
            if status.st_size == 0:
                raise WeightFileError(f"{path} is empty (0 bytes); copy or write it again")
            self._identity = _identity(status)
            self.size = status.st_size
            with open(descriptor, "rb", closefd=False) as file:
                self._data: np.memmap[Any, np.dtype[np.uint8]] = np.memmap(
                    file, dtype=np.uint8, mode="r", shape=(status.st_size,)
                )
        finally:
            os.close(descriptor)

    def bytes_at(self, begin: int, end: int) -> bytes:
        """A copy of the file's bytes from ``begin`` up to ``end``."""
        return self._data[begin:end].tobytes()

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor: a read-only view of the mapped file where stored, else inflated.

        A view may be unaligned: neither format aligns its data. bfloat16 comes as
        ``ml_dtypes.bfloat16``.

        Raises:
            KeyError: there is no such tensor.
            WeightFileError: an inflated member's size or CRC is not what the index says.
        """
        if name not in self.tensors:
            known = listed([shown(n) for n in sorted(self.tensors)]) or "none"
            raise KeyError(f"{self.path}: no tensor {shown(name)}; there are {known}")
        info = self.tensors[name]
        data = self._data[info.offset : info.offset + info.nbytes]
        if not info.stored:
            return self._inflate(info)
        return data.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def unchanged(self) -> bool:
        """True while the file at the path is the one that is mapped (device, inode, size, time)."""
        try:
            return _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False

    @abstractmethod
    def verify_content(self) -> None:
        """Reads all data and compares them with the checksums in the file.

        npz: each member's CRC. safetensors: the digest in ``__metadata__`` that
        ``SafetensorsWriter`` puts there; a file without one passes.

        Raises:
            WeightFileError: a checksum differs.
        """

    @abstractmethod
    def _inflate(self, info: TensorInfo) -> np.ndarray[Any, Any]: ...


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
