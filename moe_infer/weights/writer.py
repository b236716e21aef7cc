"""Writing weight files: streaming, one tensor at a time, never a partial file under its name."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from moe_infer.weights.atomic import AtomicFile
from moe_infer.weights.errors import WeightFileError, shown
from moe_infer.weights.file import index_digest
from moe_infer.weights.index import ITEM_SIZES, MAX_INDEX_BYTES, numpy_dtype
from moe_infer.weights.npy_header import ALIGNMENT, build_npy_header
from moe_infer.weights.npz_file import NpzFile
from moe_infer.weights.safetensors_file import CONTENT_KEY, content_digest, data_order
from moe_infer.weights.safetensors_header import build_header, parse_header

_CHUNK = 1 << 24
_MOST_WAITING = 1 << 23
_NO_DIGEST = "0" * 64


class SafetensorsWriter:
    """Writes a safetensors file whose names, types and shapes are known beforehand.

    A context manager. The file appears under its name when the block ends without an error; until
    then, and if it fails, whatever had that name stays.

    Args:
        path: the file, ending in ``.safetensors``.
        tensors: (dtype, shape) by name; dtype is ``float32``, ``float16`` or ``bfloat16``.
        metadata: texts for ``__metadata__``; ``content_sha256`` is added.

    Raises:
        WeightFileError: the names, types or shapes cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".safetensors":
            raise WeightFileError(
                f"{self.path}: the name must end in .safetensors; give it that ending"
            )
        self._header = build_header(tensors, {**(metadata or {}), CONTENT_KEY: _NO_DIGEST})
        if len(self._header) > MAX_INDEX_BYTES:
            raise WeightFileError(
                f"{self.path}: the header would have {len(self._header)} bytes; at most"
                f" {MAX_INDEX_BYTES} are allowed; split the file or stack the tensors"
            )
        # The reader's own check, so that nothing is written that would be refused.
        sizes = sum(_size(dtype, shape) for dtype, shape in tensors.values())
        self._size = 8 + len(self._header) + sizes
        self.tensors, _ = parse_header(str(self.path), self._header, self._size)
        self.digest: str | None = None
        """Digest of the file, once it is complete."""
        self._digests: dict[str, bytes] = {}
        self._output: AtomicFile | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._output = AtomicFile(self.path)
        self._write_header()
        return self

    def write(self, name: str, data: np.ndarray[Any, Any] | Iterable[np.ndarray[Any, Any]]) -> None:
        """Writes one tensor, in any order among the others, each once.

        Args:
            name: one of the announced names.
            data: the tensor, in the announced type and shape; or pieces of it, one after another
                in row-major order (one for each expert of a stacked tensor, say), of any shapes.
                A piece must not be changed afterwards: it is written while the next are made.

        Raises:
            WeightFileError: an unknown name, a second time, another type, shape or size.
        """
        if self._output is None:
            raise WeightFileError(f"{self.path}: write inside the writer's with block")
        if name not in self.tensors or name in self._digests:
            state = "already written" if name in self.tensors else "not announced"
            raise WeightFileError(f"{self.path}: tensor {shown(name)} is {state}; write each once")
        info = self.tensors[name]
        if isinstance(data, np.ndarray):
            if data.shape != info.shape:
                raise WeightFileError(
                    f"{self.path}: tensor {shown(name)} has shape {data.shape}, announced was"
                    f" {info.shape}; announce the shape that is written"
                )
            data = (data,)
        self._output.file.seek(info.offset)
        done = 0
        with _Sink(self._output.file) as sink:
            for piece in data:
                done += piece.nbytes
                if done > info.nbytes:
                    break
                for chunk in _chunks(str(self.path), name, piece, info.dtype):
                    sink.put(chunk)
        if done != info.nbytes:
            count = f"over {info.nbytes}" if done > info.nbytes else f"only {done}"
            raise WeightFileError(
                f"{self.path}: {count} bytes were given for tensor {shown(name)}; shape"
                f" {info.shape} of {info.dtype} needs {info.nbytes}; give all pieces, once"
            )
        self._digests[name] = sink.digest

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._output is not None
        with self._output as output:
            if kind is None:
                self._finish(output)
        self._output = None

    def _finish(self, output: AtomicFile) -> None:
        missing = [name for name in self.tensors if name not in self._digests]
        if missing:
            raise WeightFileError(
                f"{self.path}: {len(missing)} announced tensors were not written, the first is"
                f" {shown(missing[0])}; write all of them"
            )
        digest = content_digest([self._digests[info.name] for info in data_order(self.tensors)])
        # Unescaped quotes around the key: no text of the user's can look like this.
        key = f'"{CONTENT_KEY}":"'.encode()
        position = self._header.index(key + _NO_DIGEST.encode()) + len(key)
        self._header = (
            self._header[:position] + digest.encode() + self._header[position + len(_NO_DIGEST) :]
        )
        self._write_header()
        output.commit()
        self.digest = index_digest(self._header, self._size)

    def _write_header(self) -> None:
        assert self._output is not None
        self._output.file.seek(0)
        self._output.file.write(len(self._header).to_bytes(8, "little") + self._header)


class _Sink:
    """Writes and hashes chunks in a thread each, while the next are made: all three take as long.

    One chunk waits, or several of together at most 8 MiB, so that no more memory is held.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._writer = ThreadPoolExecutor(1, "write")
        self._hasher = ThreadPoolExecutor(1, "sha256")
        self._waiting: deque[tuple[int, Future[int], Future[None]]] = deque()
        self.digest = b""
        """Once the block has ended without an error."""

    def put(self, chunk: memoryview) -> None:
        """The chunk must not change until the block has ended.

        Raises:
            OSError: an earlier chunk could not be written.
        """
        write = self._writer.submit(self._file.write, chunk)
        self._waiting.append((len(chunk), write, self._hasher.submit(self._hash.update, chunk)))
        while len(self._waiting) > 1 and sum(n for n, _, _ in self._waiting) > _MOST_WAITING:
            self._wait()

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._wait()
            self.digest = self._hash.digest()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._hasher.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        _, write, update = self._waiting.popleft()
        write.result()
        update.result()


def write_npz(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray[Any, Any]]],
    compress: bool = False,
) -> None:
    """Writes an npz file from a stream of (name, array), one array in memory at a time.

    Stored data begin at multiples of 64 bytes, so that they can be used in place. The same arrays
    give the same bytes. The file appears under its name when it is complete.

    Args:
        path: the file, ending in ``.npz``.
        tensors: float32, float16 or bfloat16 (``ml_dtypes``) arrays; names without ``.npy``.
        compress: deflate. Such experts must be inflated into host memory before use.

    Raises:
        WeightFileError: an array of another type, or a name twice.
    """
    target = Path(path)
    if target.suffix != ".npz":
        raise WeightFileError(f"{target}: the name must end in .npz; give it that ending")
    names: set[str] = set()
    with AtomicFile(target) as output:
        with zipfile.ZipFile(output.file, "w", allowZip64=True) as archive:
            for name, array in tensors:
                if not name or name in names or "\0" in name:
                    raise WeightFileError(
                        f"{target}: a tensor is named {shown(name)}; names must be unique,"
                        " not empty and without NUL"
                    )
                names.add(name)
                _write_member(archive, str(target), name, array, compress)
        output.file.flush()
        NpzFile(output.temporary)  # the reader's own check of the index
        output.commit()


def _write_member(
    archive: zipfile.ZipFile, where: str, name: str, array: np.ndarray[Any, Any], compress: bool
) -> None:
    dtype = array.dtype.name
    _check_dtype(where, name, dtype)
    header = build_npy_header(dtype, array.shape)
    member = zipfile.ZipInfo(name + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
    member.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    member.external_attr = 0o644 << 16
    member.file_size = len(header) + array.nbytes
    if not compress:
        # The local header has 30 bytes, the name, the padding and the zip64 field of 20 bytes.
        begin = archive.start_dir + 30 + len(member.filename.encode()) + 20
        padding = -(begin + 4) % ALIGNMENT
        # An extra field that readers skip, with the number that Android's zipalign uses for it.
        member.extra = b"\x35\xd9" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(member, "w", force_zip64=True) as file:
        file.write(header)
        for chunk in _chunks(where, name, array, dtype):
            file.write(chunk)


def _chunks(where: str, name: str, array: np.ndarray[Any, Any], dtype: str) -> Iterator[memoryview]:
    """The array's bytes, row-major and little-endian, without a copy where it is so already."""
    if array.dtype.name != dtype:
        raise WeightFileError(
            f"{where}: tensor {shown(name)} has type {array.dtype.name}, announced was {dtype};"
            " convert it before writing"
        )
    array = np.ascontiguousarray(array, dtype=numpy_dtype(dtype))
    data = array.reshape(-1).view(np.uint8)
    for begin in range(0, data.size, _CHUNK):
        yield data[begin : begin + _CHUNK].data


def _check_dtype(where: str, name: str, dtype: str) -> None:
    if dtype not in ITEM_SIZES:
        raise WeightFileError(
            f"{where}: tensor {shown(name)} has type {dtype}; weight files hold float32, float16 or"
            " bfloat16, convert it"
        )


def _size(dtype: str, shape: Sequence[int]) -> int:
    size = ITEM_SIZES[dtype]
    for dimension in shape:
        size *= int(dimension)
    return size
