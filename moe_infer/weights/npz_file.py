"""Reading npz: a zip archive of .npy arrays, stored (mapped in place) or deflated."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from moe_infer.weights.errors import WeightFileError, shown
from moe_infer.weights.file import WeightFile, index_digest
from moe_infer.weights.index import TensorInfo, numpy_dtype, tensor_nbytes
from moe_infer.weights.npy_header import npy_header_size, parse_npy_header
from moe_infer.weights.zip_index import DEFLATED, ZipMember, read_zip_index

_CHUNK = 1 << 20


class NpzFile(WeightFile):
    """An npz file, mapped and checked.

    Opening it reads the directory and each member's .npy header; of a deflated member only as much
    is inflated. Its real size and CRC are checked when it is read.
    """

    format = "npz"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        members, directory = read_zip_index(str(path), self.bytes_at, self.size)
        self.digest = index_digest(directory, self.size)
        self.tensors = {}
        self._members: dict[str, tuple[ZipMember, int]] = {}
        for member in members:
            if not member.name.endswith(".npy") or member.name == ".npy":
                raise WeightFileError(
                    f"{path}: member {shown(member.name)} is no .npy array; an .npz weight file"
                    " holds nothing else, write it with numpy.savez"
                )
            info, header_size = self._describe(member)
            self.tensors[info.name] = info
            self._members[info.name] = (member, header_size)

    def verify_content(self) -> None:
        """Compares every member with its CRC."""
        for name, (member, _) in self._members.items():
            if member.method == DEFLATED:
                self.read(name)
                continue
            crc = 0
            for begin in range(member.offset, member.offset + member.size, _CHUNK):
                end = min(begin + _CHUNK, member.offset + member.size)
                crc = zlib.crc32(self._data[begin:end].data, crc)
            self._check_crc(member, crc)

    def _describe(self, member: ZipMember) -> tuple[TensorInfo, int]:
        where, name = str(self.path), member.name
        header_size = npy_header_size(where, name, self._start(member, 12))
        header = self._start(member, header_size)
        if len(header) < header_size:
            raise WeightFileError(
                f"{where}: member {shown(name)} ends inside its .npy header ({len(header)} of"
                f" {header_size} bytes); the file is damaged, copy or write it again"
            )
        dtype, shape = parse_npy_header(where, name, header)
        nbytes = tensor_nbytes(where, name, dtype, shape)
        if header_size + nbytes != member.size:
            raise WeightFileError(
                f"{where}: member {shown(name)} has {member.size - header_size} bytes of data by"
                f" the zip directory, but shape {shape} of {dtype} needs {nbytes}; the file is"
                " damaged, copy or write it again"
            )
        stored = member.method != DEFLATED
        offset = member.offset + header_size if stored else member.offset
        return TensorInfo(name[:-4], dtype, shape, offset, nbytes, stored), header_size

    def _start(self, member: ZipMember, size: int) -> bytes:
        """The member's first ``size`` bytes once inflated, or all if it has fewer."""
        size = min(size, member.size)
        if member.method != DEFLATED:
            return self.bytes_at(member.offset, member.offset + size)
        out, position = b"", member.offset
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        end = member.offset + member.compressed
        try:
            while len(out) < size and position < end and not inflater.eof:
                data = inflater.unconsumed_tail or self.bytes_at(position, min(position + 256, end))
                if not inflater.unconsumed_tail:
                    position += len(data)
                out += inflater.decompress(data, size - len(out))
        except zlib.error as error:
            raise self._damaged(member, str(error)) from None
        return out

    def _inflate(self, info: TensorInfo) -> np.ndarray[Any, Any]:
        member, header_size = self._members[info.name]
        array = np.empty(info.shape, numpy_dtype(info.dtype))
        out = array.reshape(-1).view(np.uint8)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        crc = done = 0
        try:
            for begin in range(member.offset, member.offset + member.compressed, _CHUNK):
                data = self.bytes_at(begin, min(begin + _CHUNK, member.offset + member.compressed))
                while not inflater.eof:
                    # One byte more than is left, so that a member that is too long is noticed.
                    piece = inflater.decompress(data, min(member.size - done + 1, _CHUNK))
                    # With no input left there may still be output that did not fit.
                    if not piece and not inflater.unconsumed_tail:
                        break
                    data = inflater.unconsumed_tail
                    crc = zlib.crc32(piece, crc)
                    first = done - header_size
                    done += len(piece)
                    if done > member.size:
                        raise self._damaged(member, f"more than {member.size} bytes come out")
                    skip = max(0, -first)
                    if len(piece) > skip:
                        out[first + skip : first + len(piece)] = np.frombuffer(piece, np.uint8)[
                            skip:
                        ]
        except zlib.error as error:
            raise self._damaged(member, str(error)) from None
        if done != member.size or not inflater.eof or inflater.unused_data:
            raise self._damaged(member, f"{done} bytes come out, {member.size} were expected")
        self._check_crc(member, crc)
        array.flags.writeable = False
        return array

    def _check_crc(self, member: ZipMember, crc: int) -> None:
        if crc != member.crc:
            raise self._damaged(member, f"CRC {crc:08x}, expected {member.crc:08x}")

    def _damaged(self, member: ZipMember, reason: str) -> WeightFileError:
        return WeightFileError(
            f"{self.path}: the data of member {shown(member.name)} are damaged ({reason}); copy or"
            " write the file again"
        )
