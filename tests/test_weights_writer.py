"""Writing: readable by the formats' own libraries, whole or not at all, in bounded memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_infer.weights import SafetensorsWriter, WeightFileError, open_weight_file, write_npz

GOLDEN = Path(__file__).parent / "golden"
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([0.5, -1, 2], np.float16)
C = np.array([[1, -2], [0.5, 3]]).astype(ml_dtypes.bfloat16)
KINDS = {"float32": ("float32", (2, 3)), "float16": ("float16", (3,)),
         "bfloat16": ("bfloat16", (2, 2))}  # fmt: skip


def test_golden_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with SafetensorsWriter(path, KINDS) as writer:
        writer.write("bfloat16", C)  # in another order than announced
        writer.write("float32", A)
        writer.write("float16", B)
        assert not path.exists()
    assert path.read_bytes() == (GOLDEN / "weights.safetensors").read_bytes()
    assert writer.digest == open_weight_file(path).digest
    assert os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="zipfile then writes other headers")
def test_golden_npz(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    write_npz(path, [("0/a", A), ("0/b", B), ("0/c", C)])
    assert path.read_bytes() == (GOLDEN / "weights.npz").read_bytes()


def test_data_are_aligned(tmp_path: Path) -> None:
    arrays = [(f"{'n' * (i % 7)}{i}", np.zeros(i, np.float16)) for i in range(40)]
    write_npz(tmp_path / "w.npz", arrays)
    assert all(t.offset % 64 == 0 for t in open_weight_file(tmp_path / "w.npz").tensors.values())
    kinds = {n: ("float32" if i % 2 else "float16", (i,)) for i, (n, _) in enumerate(arrays)}
    path = tmp_path / "w.safetensors"
    with SafetensorsWriter(path, kinds) as writer:
        for name, (dtype, shape) in kinds.items():
            writer.write(name, np.zeros(shape, dtype))
    for info in open_weight_file(path).tensors.values():
        assert info.offset % (4 if info.dtype == "float32" else 2) == 0
    assert min(t.offset for t in open_weight_file(path).tensors.values()) % 256 == 0


def test_safetensors_package_reads_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    metadata = {"model": 'a "quoted" one', "x": f'"content_sha256":"{"0" * 64}'}
    kinds = {"a": ("float32", (4, 2, 3)), "ü": ("float16", (3,)), "e": ("float32", (0, 7))}
    with SafetensorsWriter(path, kinds, metadata) as writer:
        writer.write("a", (A + i for i in range(4)))  # pieces
        writer.write("ü", [B[:1], B[1:]])
        writer.write("e", [])
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(kinds)
        np.testing.assert_array_equal(file.get_tensor("a"), [A, A + 1, A + 2, A + 3])
        np.testing.assert_array_equal(file.get_tensor("ü"), B)
        assert file.get_tensor("e").shape == (0, 7)
        found = file.metadata()
        assert found.pop("content_sha256") != "0" * 64
        assert found == metadata
    open_weight_file(path).verify_content()


def test_other_layouts_are_written_row_major(tmp_path: Path) -> None:
    big = A.astype(">f4")
    write_npz(tmp_path / "w.npz", [("t", A.T), ("s", A[:, ::2]), ("b", big)])
    file = open_weight_file(tmp_path / "w.npz")
    np.testing.assert_array_equal(file.read("t"), A.T)
    np.testing.assert_array_equal(file.read("s"), A[:, ::2])
    np.testing.assert_array_equal(file.read("b"), A)
    path = tmp_path / "w.safetensors"
    with SafetensorsWriter(path, {"t": ("float32", (3, 2)), "b": ("float32", (2, 3))}) as writer:
        writer.write("t", A.T)
        writer.write("b", big)
    np.testing.assert_array_equal(open_weight_file(path).read("t"), A.T)
    np.testing.assert_array_equal(open_weight_file(path).read("b"), A)


MISUSE: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "missing": ([("float32", A)], "2 announced tensors were not written, the first is"),
    "unknown": ([("x", A)], "tensor 'x' is not announced; write each once"),
    "twice": ([("float32", A), ("float32", A)], "tensor 'float32' is already written"),
    "shape": ([("float32", A.T)], r"has shape \(3, 2\), announced was \(2, 3\)"),
    "type": ([("float32", A.astype(np.float64))], "over 24 bytes were given"),
    "type_of_same_size": ([("float32", A.view(np.int32))], "type int32, announced was float32"),
    "too_little": ([("float32", [A[:1]])], r"only 12 bytes were given .* needs 24; give all"),
    "too_much": ([("float32", [A, A[:1]])], r"over 24 bytes were given .* needs 24"),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("case", MISUSE)
def test_misuse_leaves_nothing(case: str, existing: bool, tmp_path: Path) -> None:
    calls, message = MISUSE[case]
    path = tmp_path / "w.safetensors"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(WeightFileError, match=message), SafetensorsWriter(path, KINDS) as writer:
        for name, data in calls:
            writer.write(name, data)
    assert writer.digest is None
    assert os.listdir(tmp_path) == (["w.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_an_error_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield A[:1]
        raise RuntimeError("the source broke")

    with (
        pytest.raises(RuntimeError, match="the source broke"),
        SafetensorsWriter(tmp_path / "w.safetensors", KINDS) as writer,
    ):
        writer.write("float32", failing())
    with pytest.raises(RuntimeError, match="the source broke"):
        write_npz(tmp_path / "w.npz", ((str(i), a) for i, a in enumerate(failing())))
    with pytest.raises(WeightFileError, match="'a'; names must be unique"):
        write_npz(tmp_path / "w.npz", [("a", A), ("a", A)])
    with pytest.raises(WeightFileError, match="has type int64; weight files hold float32"):
        write_npz(tmp_path / "w.npz", [("a", np.arange(3))])
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_announced(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for kinds, message in (
        ({"a": ("int64", (3,))}, "has type 'int64'; weight files hold"),
        ({"__metadata__": ("float32", (3,))}, "cannot be named"),
        ({"a": ("float32", (2**40, 2**40))}, "overflows"),
        ({"a": ("float32", (-1,))}, "dimension of -1"),
    ):
        with pytest.raises(WeightFileError, match=message):
            SafetensorsWriter(path, kinds)
    with pytest.raises(WeightFileError, match=r"must end in \.safetensors"):
        SafetensorsWriter(tmp_path / "w.bin", KINDS)
    with pytest.raises(WeightFileError, match=r"must end in \.npz"):
        write_npz(tmp_path / "w.bin", [])
    with pytest.raises(WeightFileError, match="inside the writer's with block"):
        SafetensorsWriter(path, KINDS).write("float32", A)
    assert os.listdir(tmp_path) == []


def test_replaced_file_survives_in_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    write_npz(path, [("a", A)])
    old = open_weight_file(path)
    write_npz(path, [("a", A + 1)])
    np.testing.assert_array_equal(old.read("a"), A)
    assert not old.unchanged()
    np.testing.assert_array_equal(open_weight_file(path).read("a"), A + 1)


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_npz(tmp_path / "w.npz", [("a", A)])
    finally:
        os.umask(old)
    assert (tmp_path / "w.npz").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_memory_is_that_of_one_piece(form: str, tmp_path: Path) -> None:
    pieces, size = 8, 1 << 22  # 8 pieces of 16 MiB
    path = tmp_path / f"w.{form}"

    def source() -> Iterator[np.ndarray]:
        for i in range(pieces):
            yield np.full(size, i, np.float32)

    tracemalloc.start()
    try:
        if form == "npz":
            write_npz(path, ((str(i), a) for i, a in enumerate(source())))
        else:
            with SafetensorsWriter(path, {"a": ("float32", (pieces, size))}) as writer:
                writer.write("a", source())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > pieces * 4 * size
    # The generator makes the next piece while the last is still referred to.
    assert peak < 3 * 4 * size


def test_an_error_of_the_disk_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing is in another thread; what it raises ends the block, and nothing is left."""
    path = tmp_path / "w.safetensors"

    class Full:
        def __init__(self, file: object) -> None:
            self.file, self.count = file, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.count += 1
            if self.count == 4:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    with (
        pytest.raises(OSError, match="No space left"),
        SafetensorsWriter(path, {"a": ("float32", (8, 1 << 20))}) as writer,
    ):
        assert writer._output is not None
        monkeypatch.setattr(writer._output, "file", Full(writer._output.file))
        writer.write("a", (np.full(1 << 20, i, np.float32) for i in range(8)))
    assert not list(tmp_path.iterdir())


def test_the_page_runs(tmp_path: Path) -> None:
    """The code blocks of docs/weight-files.md, each in a process of its own folder."""
    page = (Path(__file__).parent.parent / "docs/weight-files.md").read_text()
    sources = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(sources) == 2
    for source in sources:
        done = subprocess.run(
            [sys.executable, "-c", source],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["experts.npz", "experts.safetensors"]
