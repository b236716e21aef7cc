"""Reading npz: golden bytes, numpy as oracle, and a bad file for every error."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moe_infer.weights import WeightFileError, open_weight_file, write_npz

GOLDEN = Path(__file__).parent / "golden"
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def npy(array: np.ndarray, **header: object) -> bytes:
    out = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    np.lib.format.write_array_header_1_0(out, fields)
    return out.getvalue() + array.tobytes()


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytearray:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data, method)
    return bytearray(out.getvalue())


def refuse(tmp_path: Path, data: bytes, message: str, read: str | None = None) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    with pytest.raises(WeightFileError, match=message) as error:
        file = open_weight_file(path)
        assert read is not None, "the index was not refused"
        file.read(read)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["weights.npz", "weights_deflated.npz"])
def test_golden_bytes(name: str) -> None:
    file = open_weight_file(GOLDEN / name)
    stored = name == "weights.npz"
    assert file.format == "npz"
    assert {n: (t.dtype, t.shape, t.stored) for n, t in file.tensors.items()} == {
        "0/a": ("float32", (2, 3), stored),
        "0/b": ("float16", (3,), stored),
        "0/c": ("bfloat16", (2, 2), stored),
    }
    np.testing.assert_array_equal(file.read("0/a"), ARRAY)
    np.testing.assert_array_equal(file.read("0/b"), np.array([0.5, -1, 2], np.float16))
    np.testing.assert_array_equal(file.read("0/c").astype(np.float32), [[1, -2], [0.5, 3]])
    assert isinstance(file.read("0/a"), np.memmap) == stored
    assert not file.read("0/a").flags.writeable
    directory = (GOLDEN / name).read_bytes()
    begin, end = directory.index(CENTRAL), directory.index(END)
    assert file.digest == f"{zlib.crc32(directory[begin:end]):08x}-{len(directory)}"
    file.verify_content()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(save: Callable[..., None], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = {
        "0/wi_0_weight": rng.standard_normal((64, 129)).astype(np.float32),
        "1/x": rng.standard_normal(5).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(1.5, np.float32),
        "b": rng.standard_normal((3, 3)).astype(ml_dtypes.bfloat16),
        "ü": np.zeros((1, 1, 4), np.float32),
        "zeros": np.zeros((3, 1_000_003), np.float32),  # inflates from almost nothing
    }
    path = tmp_path / "w.npz"
    save(path, **arrays)
    file = open_weight_file(path)
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        got = file.read(name)
        assert got.dtype == array.dtype and got.shape == array.shape
        assert got.tobytes() == array.tobytes()
    file.verify_content()


def test_accepts_zip_comment_and_data_descriptors(tmp_path: Path) -> None:
    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    out = Unseekable()
    with zipfile.ZipFile(out, "w") as file:  # type: ignore[arg-type]
        file.writestr("a.npy", npy(ARRAY))
        file.comment = b"PK\5\6 is also in the comment"
    path = tmp_path / "w.npz"
    path.write_bytes(out.data)
    np.testing.assert_array_equal(open_weight_file(path).read("a"), ARRAY)


def test_zip64_end_record(tmp_path: Path) -> None:
    """More than 65535 members, or offsets over 4 GiB, need it; here it is forced."""
    data = archive(("a.npy", npy(ARRAY)))
    end = data.rindex(END)
    count, size, begin = struct.unpack_from("<HLL", data, end + 10)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, begin)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    tail = struct.pack("<4s4H2LH", END, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "w.npz"
    path.write_bytes(data[:end] + record + locator + tail)
    assert zipfile.ZipFile(path).namelist() == ["a.npy"]  # the forged record is a right one
    np.testing.assert_array_equal(open_weight_file(path).read("a"), ARRAY)
    refuse(tmp_path, data[:end] + record + tail, "refers to a zip64 one, but none is before byte")


def test_member_over_4_gib(tmp_path: Path) -> None:
    """A sparse file, so that sizes really need 64 bits."""
    rows = 2**30 + 5
    header = np.lib.format.magic(1, 0)
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows},), }}".ljust(117) + "\n"
    header += struct.pack("<H", len(text)) + text.encode()
    size = len(header) + 4 * rows
    wide = struct.pack("<2H2Q", 1, 16, size, size)
    name = b"a.npy"
    ones = 0xFFFFFFFF
    local = struct.pack("<4s5H3L2H", LOCAL, 45, 0, 0, 0, 0, 0, ones, ones, len(name), len(wide))
    central = struct.pack(
        "<4s6H3L5H2L", CENTRAL, 45, 45, 0, 0, 0, 0, 0, ones, ones, len(name), len(wide),
        0, 0, 0, 0, 0,
    )  # fmt: skip
    start = local + name + wide + header
    end = len(local + name + wide) + size
    directory = central + name + wide
    path = tmp_path / "large.npz"
    with path.open("wb") as file:
        file.write(start)
        file.seek(end)
        count = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), end)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, end + len(directory), 1)
        tail = struct.pack("<4s4H2LH", END, 0, 0, 0xFFFF, 0xFFFF, ones, ones, 0)
        file.write(directory + count + locator + tail)
    info = open_weight_file(path).tensors["a"]
    assert (info.shape, info.nbytes, info.offset) == ((rows,), 4 * rows, len(start))


def test_truncated(tmp_path: Path) -> None:
    whole = (GOLDEN / "weights.npz").read_bytes()
    refuse(tmp_path, whole[: len(whole) // 2], "no end of a zip directory in the last .* bytes;")
    for size in range(1, len(whole)):
        path = tmp_path / "bad.npz"
        path.write_bytes(whole[:size])
        with pytest.raises(WeightFileError):
            open_weight_file(path)


def test_prepended_bytes(tmp_path: Path) -> None:
    data = b"#!/bin/sh\n" + bytes(archive(("a.npy", npy(ARRAY))))
    refuse(tmp_path, data, "zip directory should end at byte .* but its end record is at")


def test_deflated_with_a_wrong_size(tmp_path: Path) -> None:
    """The header in the member and the directory agree, but fewer or more bytes come out."""
    for rows, message in ((3, "152 bytes come out, 164 were expected"), (1, "more than 140 bytes")):
        data = archive(("a.npy", npy(ARRAY, shape=(rows, 3))), method=zipfile.ZIP_DEFLATED)
        size = len(npy(ARRAY)) - 24 + rows * 12
        struct.pack_into("<L", data, data.index(LOCAL) + 22, size)
        struct.pack_into("<L", data, data.index(CENTRAL) + 24, size)
        refuse(tmp_path, data, f"the data of member 'a.npy' are damaged .*{message}", read="a")


def test_deflated_size_not_of_the_shape(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)), method=zipfile.ZIP_DEFLATED)
    for signature, at in ((LOCAL, 22), (CENTRAL, 24)):
        struct.pack_into("<L", data, data.index(signature) + at, len(npy(ARRAY)) + 4)
    refuse(tmp_path, data, r"has 28 bytes of data by the zip directory, but shape \(2, 3\).* 24")


def test_deflated_claim_beyond_deflate(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)), method=zipfile.ZIP_DEFLATED)
    for signature, at in ((LOCAL, 22), (CENTRAL, 24)):
        struct.pack_into("<L", data, data.index(signature) + at, 1 << 30)
    refuse(tmp_path, data, "claims 1073741824 bytes from .* deflate gives at most")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_wrong_crc(method: int, tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)), method=method)
    for signature, at in ((LOCAL, 14), (CENTRAL, 16)):
        struct.pack_into("<L", data, data.index(signature) + at, 0x12345678)
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    file = open_weight_file(path)
    with pytest.raises(WeightFileError, match=r"CRC [0-9a-f]{8}, expected 12345678"):
        file.verify_content()


def test_broken_deflate_stream(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)), method=zipfile.ZIP_DEFLATED)
    begin = data.index(b"a.npy") + 5
    data[begin : begin + 4] = b"\xff\xff\xff\xff"
    refuse(tmp_path, data, "the data of member 'a.npy' are damaged .*copy or write the file again")


def patch(at_local: int | None, at_central: int, form: str, value: int) -> bytearray:
    data = archive(("a.npy", npy(ARRAY)))
    if at_local is not None:
        struct.pack_into(form, data, data.index(LOCAL) + at_local, value)
    struct.pack_into(form, data, data.index(CENTRAL) + at_central, value)
    return data


def test_encrypted(tmp_path: Path) -> None:
    refuse(tmp_path, patch(6, 8, "<H", 1), "'a.npy' is encrypted; .* without a password")


def test_other_compression(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)), method=zipfile.ZIP_BZIP2)
    refuse(tmp_path, data, r"compression method 12; expected 0 \(stored\) or 8 \(deflated\)")


LOCAL_FIELDS = {"method": (8, "<H"), "crc": (14, "<L"), "compressed size": (18, "<L"),
                "size": (22, "<L"), "flags": (6, "<H")}  # fmt: skip


@pytest.mark.parametrize("what", LOCAL_FIELDS)
def test_local_header_disagrees(what: str, tmp_path: Path) -> None:
    at, form = LOCAL_FIELDS[what]
    data = archive(("a.npy", npy(ARRAY)))
    struct.pack_into(form, data, data.index(LOCAL) + at, 9)
    message = f"has {what} .* in its local header, but .* in the zip directory; they must agree"
    refuse(tmp_path, data, message)


def test_local_name_disagrees(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)))
    data[data.index(b"a.npy")] = ord("b")
    refuse(tmp_path, data, "'a.npy' has name b'b.npy' in its local header, but b'a.npy' in the zip")


def test_bad_directory_entries(tmp_path: Path) -> None:
    refuse(tmp_path, patch(None, 42, "<L", 5), "should begin at byte 5, but there is no zip header")
    refuse(tmp_path, patch(None, 42, "<L", 10**6), "should begin at byte 1000000, but there is no")
    refuse(tmp_path, patch(None, 0, "<L", 0), "byte 0 of the zip directory is no entry")
    refuse(tmp_path, patch(None, 34, "<H", 3), "byte 0 of the zip directory is no entry")
    refuse(tmp_path, patch(22, 24, "<L", 5), "is stored, but takes 152 bytes .* for 5 bytes")
    data = archive(("a.npy", npy(ARRAY)))
    struct.pack_into("<HH", data, data.rindex(END) + 8, 0, 0)
    refuse(tmp_path, data, "zip directory has 51 bytes, but its 0 entries take 0")
    struct.pack_into("<HH", data, data.rindex(END) + 8, 9, 9)
    refuse(tmp_path, data, "cannot hold 9 entries")
    struct.pack_into("<HH", data, data.rindex(END) + 8, 1, 2)
    refuse(tmp_path, data, "is one of several parts; expected a single file")


def test_directory_over_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with path.open("wb") as file:
        file.truncate(100_000_001)  # sparse
        file.seek(100_000_001)
        file.write(struct.pack("<4s4H2LH", END, 0, 0, 1, 1, 100_000_001, 0, 0))
    with pytest.raises(WeightFileError, match="has 100000001 bytes; at most 100000000 are allowed"):
        open_weight_file(path)


def test_data_outside(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)))
    for signature, at in ((LOCAL, 18), (CENTRAL, 20)):
        struct.pack_into("<LL", data, data.index(signature) + at, 10_000, 10_000)
    refuse(tmp_path, data, "ends at byte 10035, but the data end at 187; the file is truncated")


def test_member_twice(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)), ("b.npy", npy(ARRAY)))
    second = data.index(CENTRAL, data.index(CENTRAL) + 1)
    struct.pack_into("<L", data, second + 42, 0)
    data[second + 46] = ord("a")
    refuse(tmp_path, data, "'a.npy' is twice in the zip directory; names must be unique")


def test_member_inside_another(tmp_path: Path) -> None:
    """Directory entries that share bytes: a zip bomb's way."""
    inside = archive(("b.npy", npy(ARRAY)))
    member = bytes(inside[: inside.index(CENTRAL)])
    padded = np.frombuffer(member + bytes(-len(member) % 4), np.float32)
    data = archive(("a.npy", npy(padded)))
    begin = data.index(b"b.npy") - 30
    entry = inside[inside.index(CENTRAL) : inside.index(END)]
    struct.pack_into("<L", entry, 42, begin)
    directory, end = data.index(CENTRAL, begin), data.rindex(END)
    tail = data[end:]
    struct.pack_into("<HHL", tail, 8, 2, 2, end - directory + len(entry))
    refuse(
        tmp_path,
        data[:end] + entry + tail,
        "tensor 'b.npy' begins at byte .* inside tensor 'a.npy', .* must not overlap",
    )


def test_not_an_array(tmp_path: Path) -> None:
    refuse(tmp_path, archive(("a.txt", b"x")), "member 'a.txt' is no .npy array; .*numpy.savez")
    refuse(tmp_path, archive((".npy", npy(ARRAY))), "member '.npy' is no .npy array")
    refuse(tmp_path, archive(("a.npy", b"x" * 20)), "begins with b'xxxxxx'; expected")
    refuse(tmp_path, archive(("a.npy", b"")), "begins with b''; expected")
    version = npy(ARRAY)[:6] + b"\x09\x00" + npy(ARRAY)[8:]
    refuse(tmp_path, archive(("a.npy", version)), "has .npy version 9.0; expected 1.0, 2.0 or 3.0")
    refuse(tmp_path, archive(("a.npy", npy(ARRAY)[:60])), r"inside its .npy header \(60 of 128")
    long = npy(ARRAY)[:6] + b"\x02\x00" + (70_000).to_bytes(4, "little") + b" " * 80_000
    refuse(tmp_path, archive(("a.npy", long)), "header of 70012 bytes; at most 65536")


@pytest.mark.parametrize(
    ("descr", "hint"),
    [("|O", r" \(Python objects, which would have to be unpickled\)"), (">f4", r" \(big-endian\)"),
     ("<f8", ""), ("<i4", ""), ("|V4", ""), ("|S2", "")],
)  # fmt: skip
def test_other_types(descr: str, hint: str, tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY, descr=descr)))
    message = rf"member 'a.npy' has type '{descr[0]}?.*'{hint}; expected little-endian float32"
    refuse(tmp_path, data, message.replace("|", r"\|"))


def test_odd_headers(tmp_path: Path) -> None:
    refuse(
        tmp_path,
        archive(("a.npy", npy(np.asfortranarray(ARRAY), fortran_order=True))),
        r"has fortran_order True \(column-major\); expected False; save numpy.ascontiguousarray",
    )
    structured = npy(ARRAY, descr=[("x", "<f4")])
    refuse(tmp_path, archive(("a.npy", structured)), "expected descr, fortran_order and shape")
    for shape in ("(2, -3)", "(2)", "(6.0,)", "(,)", "((2, 3),)", "(2, 3", "__import__('os')"):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        member = npy(ARRAY)[:8] + struct.pack("<H", 118) + text.encode() + ARRAY.tobytes()
        refuse(tmp_path, archive(("a.npy", member)), "has the .npy header .*; save a plain array")
    refuse(tmp_path, archive(("a.npy", npy(ARRAY, shape=(2**63, 1)))), "a dimension is over")
    refuse(tmp_path, archive(("a.npy", npy(ARRAY, shape=(2**40, 2**40)))), "overflows")
    refuse(tmp_path, archive(("a.npy", npy(ARRAY, shape=(1,) * 9))), "has 9 dimensions")
    refuse(
        tmp_path,
        archive(("a.npy", npy(ARRAY, shape=(2, 4)))),
        r"has 24 bytes of data by the zip directory, but shape \(2, 4\) of float32 needs 32",
    )


def test_bad_names(tmp_path: Path) -> None:
    data = archive(("a.npy", npy(ARRAY)))
    for begin in (data.index(b"a.npy"), data.rindex(b"a.npy")):
        data[begin] = 0xE4
    refuse(tmp_path, data, "expected ASCII, or UTF-8 with its flag")


def test_numpy_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {"0/a": ARRAY, "0/b": ARRAY.astype(np.float16), "s": np.array(3, np.float32)}
    bfloat16 = ARRAY.astype(ml_dtypes.bfloat16)
    for compress in (False, True):
        path = tmp_path / f"{compress}.npz"
        write_npz(path, [*arrays.items(), ("c", bfloat16)], compress)
        with np.load(path) as loaded:
            assert loaded.files == [*arrays, "c"]
            for name, array in arrays.items():
                np.testing.assert_array_equal(loaded[name], array)
                assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
            np.testing.assert_array_equal(loaded["c"].view(ml_dtypes.bfloat16), bfloat16)
