"""The index of a zip archive: its central directory and the local headers, read strictly.

Python's zipfile tolerates archives in which the two disagree, and does not tell where the data of
a member begin or what the directory's bytes are; the mapped weights and the digest need both.
Format: PKWARE's APPNOTE.TXT, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from moe_infer.weights.errors import WeightFileError, shown
from moe_infer.weights.index import MAX_INDEX_BYTES, check_layout

STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s2B4H3L2H")
_ENCRYPTED, _DESCRIPTOR, _STRONG, _UTF8, _MASKED = 1 << 0, 1 << 3, 1 << 6, 1 << 11, 1 << 13
_DAMAGED = "the file is truncated or damaged, copy or write it again"

Reader = Callable[[int, int], bytes]


@dataclass(frozen=True)
class ZipMember:
    """One member of the archive."""

    name: str
    method: int
    crc: int
    compressed: int
    """Bytes in the file."""
    size: int
    """Bytes once inflated."""
    header_offset: int
    offset: int
    """Where the (compressed) data begin."""


def read_zip_index(where: str, read: Reader, file_size: int) -> tuple[list[ZipMember], bytes]:
    """All members and the central directory's bytes.

    Args:
        where: the file, for messages.
        read: gives the bytes from one offset up to another.
        file_size: of the whole file.

    Raises:
        WeightFileError: not a zip archive on one disk, its directory is damaged, a member is
            encrypted, compressed otherwise than by deflate, twice there, outside the file, over
            another, or described differently by its local header.
    """
    count, size, begin = _find_directory(where, read, file_size)
    directory = read(begin, begin + size)
    members: list[ZipMember] = []
    names: set[str] = set()
    position = 0
    for _ in range(count):
        member, position = _read_entry(where, read, directory, position, begin)
        if member.name in names:
            raise WeightFileError(
                f"{where}: member {shown(member.name)} is twice in the zip directory; names must be"
                " unique, write the file again"
            )
        names.add(member.name)
        members.append(member)
    if position != size:
        raise WeightFileError(
            f"{where}: the zip directory has {size} bytes, but its {count} entries take"
            f" {position}; {_DAMAGED}"
        )
    spans = [(m.header_offset, m.offset + m.compressed, m.name) for m in members]
    check_layout(where, spans, 0, begin, holes=True)
    return members, directory


def _find_directory(where: str, read: Reader, file_size: int) -> tuple[int, int, int]:
    """(entries, bytes, offset) of the central directory."""
    tail_begin = max(0, file_size - _END.size - 0xFFFF)
    tail = read(tail_begin, file_size)
    position = len(tail)
    while True:
        position = tail.rfind(b"PK\5\6", 0, position)
        if position < 0:
            raise WeightFileError(
                f"{where}: no end of a zip directory in the last {len(tail)} of {file_size} bytes;"
                " an .npz file is a zip archive, this one is truncated or something else, copy or"
                " write it again"
            )
        if position + _END.size <= len(tail):
            fields = _END.unpack_from(tail, position)
            if position + _END.size + fields[7] == len(tail):
                break
        position += 3
    end = tail_begin + position
    disk, directory_disk, here, count, size, begin, _ = fields[1:]
    if here == 0xFFFF or count == 0xFFFF or size == 0xFFFFFFFF or begin == 0xFFFFFFFF:
        disk, directory_disk, here, count, size, begin, end = _read_end64(where, read, end)
    if disk or directory_disk or here != count:
        raise WeightFileError(
            f"{where}: the zip archive is one of several parts; expected a single file, write it"
            " again"
        )
    if begin + size != end:
        raise WeightFileError(
            f"{where}: the zip directory should end at byte {begin + size} ({size} bytes from"
            f" {begin}), but its end record is at {end}; {_DAMAGED}"
        )
    if size > MAX_INDEX_BYTES:
        raise WeightFileError(
            f"{where}: the zip directory has {size} bytes; at most {MAX_INDEX_BYTES} are allowed;"
            " split the file"
        )
    if count * _CENTRAL.size > size:
        raise WeightFileError(
            f"{where}: the zip directory of {size} bytes cannot hold {count} entries; {_DAMAGED}"
        )
    return count, size, begin


def _read_end64(where: str, read: Reader, end: int) -> tuple[int, int, int, int, int, int, int]:
    locator = read(max(0, end - _END64_LOCATOR.size), end)
    if len(locator) == _END64_LOCATOR.size and locator[:4] == b"PK\6\7":
        _, disk, position, disks = _END64_LOCATOR.unpack(locator)
        if position + _END64.size <= end - _END64_LOCATOR.size and disk == 0 and disks <= 1:
            fields = _END64.unpack(read(position, position + _END64.size))
            whole = fields[1] + 12 == end - _END64_LOCATOR.size - position
            if fields[0] == b"PK\6\6" and whole:
                return (*fields[4:], position)
    raise WeightFileError(
        f"{where}: the zip archive's end record refers to a zip64 one, but none is before byte"
        f" {end}; {_DAMAGED}"
    )


def _read_entry(
    where: str, read: Reader, directory: bytes, position: int, data_end: int
) -> tuple[ZipMember, int]:
    if position + _CENTRAL.size > len(directory):
        raise WeightFileError(
            f"{where}: the zip directory ends inside an entry, at byte {len(directory)}; {_DAMAGED}"
        )
    # fmt: off
    (signature, _, _, _, _, flags, method, _, _, crc, compressed, size, name_size, extra_size,
     comment_size, disk, _, _, header) = _CENTRAL.unpack_from(directory, position)
    # fmt: on
    name_end = position + _CENTRAL.size + name_size
    end = name_end + extra_size + comment_size
    if signature != b"PK\1\2" or end > len(directory) or disk not in (0, 0xFFFF):
        raise WeightFileError(
            f"{where}: byte {position} of the zip directory is no entry; {_DAMAGED}"
        )
    raw_name = directory[position + _CENTRAL.size : name_end]
    name = _decode(where, raw_name, flags)
    if flags & (_ENCRYPTED | _STRONG | _MASKED):
        raise WeightFileError(
            f"{where}: member {shown(name)} is encrypted; weight files must not be, write the file"
            " again without a password"
        )
    if method not in (STORED, DEFLATED):
        raise WeightFileError(
            f"{where}: member {shown(name)} has compression method {method}; expected 0 (stored) or"
            " 8 (deflated); write the file with numpy.savez or numpy.savez_compressed"
        )
    extra = directory[name_end : name_end + extra_size]
    size, compressed, header = _zip64(where, name, extra, (size, compressed, header))
    offset = _check_local(
        where, read, data_end, raw_name, name, (flags, method, crc, compressed, size), header
    )
    if method == STORED and compressed != size:
        raise WeightFileError(
            f"{where}: member {shown(name)} is stored, but takes {compressed} bytes of the file for"
            f" {size} bytes of data; expected the same, {_DAMAGED}"
        )
    # deflate cannot do better than 1032 to 1: a larger claim is a lie, and would cost memory.
    if size > 1032 * compressed + 64:
        raise WeightFileError(
            f"{where}: member {shown(name)} claims {size} bytes from {compressed} deflated ones;"
            f" deflate gives at most {1032 * compressed}; {_DAMAGED}"
        )
    return ZipMember(name, method, crc, compressed, size, header, offset), end


def _decode(where: str, raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        name = ""
    if not name or "\0" in name:
        raise WeightFileError(
            f"{where}: the zip directory has the name {raw[:80]!r}; expected ASCII, or UTF-8 with"
            " its flag; write the file with numpy.savez"
        )
    return name


def _zip64(where: str, name: str, extra: bytes, fields: tuple[int, ...]) -> tuple[int, ...]:
    """Replaces fields that are all ones by those of the zip64 extra field, in their order."""
    if 0xFFFFFFFF not in fields:
        return fields
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + size]
        position += 4 + size
        if kind != 1:
            continue
        wide = [v for (v,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
        if len(wide) >= fields.count(0xFFFFFFFF) and len(body) == size:
            return tuple(wide.pop(0) if f == 0xFFFFFFFF else f for f in fields)
    raise WeightFileError(
        f"{where}: member {shown(name)} is over 4 GiB by its entry, but its zip64 sizes are"
        f" missing; {_DAMAGED}"
    )


def _check_local(
    where: str,
    read: Reader,
    data_end: int,
    raw_name: bytes,
    name: str,
    central: tuple[int, int, int, int, int],
    header: int,
) -> int:
    """Checks the local header against the directory's entry; returns where the data begin."""
    start = read(header, header + _LOCAL.size) if header + _LOCAL.size <= data_end else b""
    if start[:4] != b"PK\3\4":
        raise WeightFileError(
            f"{where}: member {shown(name)} should begin at byte {header}, but there is no zip"
            f" header; {_DAMAGED}"
        )
    # fmt: off
    fields: tuple[int, ...] = _LOCAL.unpack(start)[1:]
    (_, _, flags, method, _, _, crc, compressed, size, name_size, extra_size) = fields
    # fmt: on
    name_begin = header + _LOCAL.size
    offset = name_begin + name_size + extra_size
    local_name = read(name_begin, min(name_begin + name_size, data_end))
    extra = read(name_begin + name_size, min(offset, data_end))
    size, compressed = _zip64(where, name, extra, (size, compressed))
    found = {"name": local_name, "flags": flags & (_ENCRYPTED | _DESCRIPTOR), "method": method}
    wanted = {"name": raw_name, "flags": central[0] & (_ENCRYPTED | _DESCRIPTOR)}
    wanted |= {"method": central[1]}
    # With a data descriptor the local header was written before these were known.
    if not (flags & _DESCRIPTOR and (crc, compressed, size) == (0, 0, 0)):
        found |= {"crc": crc, "compressed size": compressed, "size": size}
        wanted |= {"crc": central[2], "compressed size": central[3], "size": central[4]}
    for what, value in found.items():
        if value != wanted[what]:
            raise WeightFileError(
                f"{where}: member {shown(name)} has {what} {str(value)[:80]} in its local header,"
                f" but {str(wanted[what])[:80]} in the zip directory; they must agree, {_DAMAGED}"
            )
    if offset + central[3] > data_end:
        raise WeightFileError(
            f"{where}: member {shown(name)} ends at byte {offset + central[3]}, but the data end"
            f" at {data_end}; {_DAMAGED}"
        )
    return offset
