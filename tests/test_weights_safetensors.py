"""Reading safetensors: golden bytes, the format's own library as oracle, a bad file per error."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_infer.weights import WeightFileError, open_weight_file

GOLDEN = Path(__file__).parent / "golden"
F4: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def save(path: Path, header: bytes | dict[str, Any], data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_golden_bytes() -> None:
    file = open_weight_file(GOLDEN / "weights.safetensors")
    assert file.format == "safetensors"
    assert {n: (t.dtype, t.shape, t.stored) for n, t in file.tensors.items()} == {
        "float32": ("float32", (2, 3), True),
        "float16": ("float16", (3,), True),
        "bfloat16": ("bfloat16", (2, 2), True),
    }
    np.testing.assert_array_equal(file.read("float32"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.read("float16"), np.array([0.5, -1, 2], np.float16))
    bfloat16 = file.read("bfloat16")
    assert bfloat16.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(bfloat16.astype(np.float32), [[1, -2], [0.5, 3]])
    assert file.digest == "458c46d8-550"
    file.verify_content()


def test_views_are_read_only_and_in_place() -> None:
    file = open_weight_file(GOLDEN / "weights.safetensors")
    array = file.read("float32")
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(1)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b/c": rng.standard_normal((7,)).astype(np.float16),
        "ü": rng.standard_normal((1, 2, 3)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    path = tmp_path / "w.safetensors"
    safetensors.save_file(arrays, path, metadata={"who": "test"})
    file = open_weight_file(path)
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape
        np.testing.assert_array_equal(file.read(name), array)
    file.verify_content()


def test_unknown_tensor_is_named() -> None:
    with pytest.raises(KeyError, match=r"no tensor 'x'; there are 'bfloat16'"):
        open_weight_file(GOLDEN / "weights.safetensors").read("x")


BAD: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "not_an_object": (b'["a"]    ', r"begins with b'\['; expected b'\{'.*write it again"),
    "leading_space": (b' {"a":1} ', r"begins with b' '; expected b'\{'"),
    "no_json": (b'{"a": nope}', "is not JSON in UTF-8.*copy or write it again"),
    "nan": (b'{"a": NaN}', "NaN is no JSON"),
    "no_utf8": (b'{"\xff": 1}', "is not JSON in UTF-8"),
    "surrogate": (rb'{"\ud800": 1}', "is not JSON in UTF-8"),
    "nested": (b'{"a":' + b"[" * 200_000, "is not JSON in UTF-8"),
    "long_number": (b'{"a":' + b"9" * 10_000 + b"}", "is not JSON in UTF-8|is described by"),
    "twice": (
        b'{"a":' + json.dumps(F4).encode() + b',"a":' + json.dumps(F4).encode() + b"}",
        "'a' is twice.*must be unique, write the file again",
    ),
    "metadata": ({"__metadata__": {"a": 1}, "a": F4}, "must map texts to texts"),
    "no_dict": ({"a": 1}, "tensor 'a' is described by 'int'; expected exactly dtype, shape"),
    "no_shape": (
        {"a": {"dtype": "F32", "data_offsets": [0, 24]}},
        r"tensor 'a' is described by .*expected exactly dtype, shape and data_offsets",
    ),
    "type": (
        {"a": {**F4, "dtype": "I64"}},
        "tensor 'a' has type 'I64'; expected F32, F16 or BF16; convert",
    ),
    "type_no_text": ({"a": {**F4, "dtype": ["F32"]}}, "tensor 'a' has type .*expected F32"),
    "negative": ({"a": {**F4, "shape": [-2, -3]}}, "shape of tensor 'a' must be a list of integ"),
    "float": ({"a": {**F4, "shape": [2.0, 3]}}, "shape of tensor 'a' must be a list of integers"),
    "bool": ({"a": {**F4, "shape": [True, 6]}}, "shape of tensor 'a' must be a list of integers"),
    "offsets": ({"a": {**F4, "data_offsets": [0, 24, 48]}}, "has 3 data_offsets; expected 2"),
    "overflow": (
        {"a": {**F4, "shape": [2**31, 2**31, 2**31]}},
        r"tensor 'a' of shape 2147483648 x .* overflows; .* at most 9223372036854775807 bytes",
    ),
    "overflow_by_zero": ({"a": {**F4, "shape": [2**40, 2**40, 0]}}, "overflows"),
    "rank": ({"a": {**F4, "shape": [1] * 9}}, "has 9 dimensions; at most 8 are expected"),
    "size": (
        {"a": {**F4, "shape": [2, 4]}},
        r"has 24 bytes \(data_offsets 0 to 24\), but shape \(2, 4\) of float32 needs 32",
    ),
    "reversed": ({"a": {**F4, "data_offsets": [24, 0]}}, r"has -24 bytes .* needs 24"),
    "overlap": (
        {"a": F4, "b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}},
        r"tensor 'b' begins at byte \d+, inside tensor 'a', .* must not overlap",
    ),
    "same_bytes": ({"a": F4, "b": F4}, "tensor 'b' begins .* must not overlap"),
    "hole_before": (
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}},
        "4 bytes before tensor 'a', .* holes are not allowed",
    ),
    "hole_behind": (
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}},
        "the last 4 bytes, .* belong to no tensor; expected the data to end there",
    ),
    "outside": (
        {"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}},
        r"tensor 'a' ends at byte \d+, but the data end at \d+; the file is truncated",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header(case: str, tmp_path: Path) -> None:
    header, message = BAD[case]
    path = save(tmp_path / "bad.safetensors", header)
    with pytest.raises(WeightFileError, match=message) as error:
        open_weight_file(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}" + bytes(30))
    message = "header has 1000 bytes by its length field, but only 32 follow; .* copy or write it"
    with pytest.raises(WeightFileError, match=message):
        open_weight_file(path)


def test_header_over_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(WeightFileError, match="100000001 bytes; at most 100000000 are allowed"):
        open_weight_file(path)


@pytest.mark.parametrize("size", range(1, 10))
def test_shorter_than_any_safetensors(size: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(WeightFileError, match=f"has {size} bytes; .* at least 10"):
        open_weight_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "weights.safetensors").read_bytes()
    path = tmp_path / "bad.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightFileError):
            open_weight_file(path)


def test_changed_weights_fail_verification(tmp_path: Path) -> None:
    whole = bytearray((GOLDEN / "weights.safetensors").read_bytes())
    whole[-1] ^= 1
    path = tmp_path / "bad.safetensors"
    path.write_bytes(whole)
    file = open_weight_file(path)  # the index is intact
    with pytest.raises(WeightFileError, match=r"sha256 is .* but the header says"):
        file.verify_content()


def test_unchanged_notices_another_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((GOLDEN / "weights.safetensors").read_bytes())
    file = open_weight_file(path)
    assert file.unchanged()
    os.utime(path, ns=(1, 1))
    assert not file.unchanged()
    path.unlink()
    assert not file.unchanged()
    file.verify_content()  # the mapping outlives the name


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_no_regular_file(suffix: str, tmp_path: Path) -> None:
    empty, fifo, folder = (tmp_path / f"{n}{suffix}" for n in ("empty", "fifo", "folder"))
    empty.touch()
    with pytest.raises(WeightFileError, match=r"is empty \(0 bytes\); copy or write it again"):
        open_weight_file(empty)
    os.mkfifo(fifo)
    folder.mkdir()
    for path in (fifo, folder):
        with pytest.raises(WeightFileError, match="is not a regular file; expected"):
            open_weight_file(path)
    with pytest.raises(FileNotFoundError):
        open_weight_file(tmp_path / f"none{suffix}")


def test_unknown_ending(tmp_path: Path) -> None:
    message = re.escape("must end in .npz or .safetensors, got '.bin'; rename or convert")
    with pytest.raises(WeightFileError, match=message):
        open_weight_file(tmp_path / "w.bin")
