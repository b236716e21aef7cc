"""The file in which caches keep what they counted; it is not trusted."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = b"moe-infer expert use 1\n"


class File:
    """What one cache of three experts does with a file."""

    def __init__(self, function: Any, path: Path) -> None:
        self.function, self.path = function, path

    def exchange(
        self,
        read: bool,
        clock: int = 0,
        counts: tuple[int, ...] = (0, 0, 0),
        last: tuple[int, ...] = (0, 0, 0),
        digest: str = "abc",
        prefix: str = "layers.0.",
        policy: str = "halved:128",
    ) -> tuple[int, list[int], list[int], str]:
        held_clock = ctypes.c_uint64(clock)
        held = np.array(counts, np.uint32)
        held_last = np.array(last, np.uint64)
        note = ctypes.create_string_buffer(4096)
        self.function(
            os.fsencode(self.path),
            digest.encode(),
            prefix.encode("utf-8", "surrogateescape"),
            policy.encode(),
            len(held),
            int(read),
            ctypes.byref(held_clock),
            held.ctypes.data_as(ctypes.c_void_p),
            held_last.ctypes.data_as(ctypes.c_void_p),
            note,
        )
        return held_clock.value, held.tolist(), held_last.tolist(), note.value.decode()

    def save(self, *arguments: Any, **more: Any) -> None:
        assert self.exchange(False, *arguments, **more)[3] == ""

    def load(self, **more: Any) -> tuple[int, list[int], list[int], str]:
        return self.exchange(True, **more)


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("history") / "use_history.so"
    sources = ["tests/native/use_history.cpp", "ops/core/use_history.cpp"]
    sources += ["ops/core/policy_settings.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        ["g++", *flags, "-Iops", "-Iops/include", *sources, "-o", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(path)).exchange
    loaded.restype = None
    return loaded


@pytest.fixture
def file(function: Any, tmp_path: Path) -> File:
    return File(function, tmp_path / "use.txt")


NOTHING = (0, [0, 0, 0], [0, 0, 0], "")


def test_what_was_saved_comes_back(file: File) -> None:
    assert file.load() == NOTHING
    file.save(700, (5, 0, 250), (699, 0, 3))
    assert file.load() == (700, [5, 0, 250], [699, 0, 3], "")
    assert [path.name for path in file.path.parent.iterdir()] == ["use.txt"]


def test_each_cache_has_its_own(file: File) -> None:
    odd = "läyer %\n' \x01/"
    file.save(10, (1, 2, 3), (4, 5, 6))
    file.save(20, (7, 8, 9), (1, 2, 3), prefix=odd)
    file.save(30, (1, 1, 1), (1, 1, 1), digest="other")
    file.save(40, (1 << 16, 0, 0), (40, 0, 0), policy="lfu:128")
    file.save(50, (2, 2, 2), (2, 2, 2), prefix="")
    assert file.load()[:3] == (10, [1, 2, 3], [4, 5, 6])
    assert file.load(prefix=odd)[:3] == (20, [7, 8, 9], [1, 2, 3])
    assert file.load(digest="other")[0] == 30
    assert file.load(policy="lfu:128")[1] == [1 << 16, 0, 0]
    assert file.load(prefix="")[0] == 50
    assert file.load(prefix="layers.1.") == NOTHING
    assert file.load(policy="halved:127") == NOTHING
    assert file.path.read_bytes().count(b"\n") == 6
    # A later one takes the place of an earlier one.
    file.save(11, (1, 2, 4), (4, 5, 11))
    assert file.load()[:3] == (11, [1, 2, 4], [4, 5, 11])
    assert file.load(prefix=odd)[0] == 20
    assert file.path.read_bytes().count(b"\n") == 6


def test_without_a_call_nothing_is_written(file: File) -> None:
    file.save(0)
    assert not file.path.exists()
    file.save(9, (1, 1, 1), (9, 9, 9))
    before = file.path.stat().st_mtime_ns, file.path.stat().st_ino
    file.save(9, (1, 1, 1), (9, 9, 9))
    assert (file.path.stat().st_mtime_ns, file.path.stat().st_ino) == before


def change(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        change(b" 3 700 ", b" 4 700 "),  # experts
        change(b" 3 700 ", b" 2 700 "),
        change(b" 3 700 ", b" 3 281474976710657 "),  # clock
        change(b"699", b"701"),  # a last use after the clock
        change(b"250:3", b"257:3"),  # more uses than can be counted
        change(b"250:3", b"25O:3"),
        change(b"250:3", b"-1:3"),
        change(b"250:3", b"99999999999999999999999:3"),
        change(b"250:3", b"250:3 1:1"),
        change(b"250:3", b"250:"),
        change(b"250:3", b"250 3"),
        change(b"250:3\n", b"250:3"),
        change(b"250:3\n", b"250:3\n\n"),
        change(b"250:3\n", b"250:3\nmore\n"),
        change(b" 5:699 0:0 250:3", b""),
        change(b" 3 700", b"\x00 3 700"),
        lambda data: data[:-4],
    ],
)
def test_a_damaged_file_is_told_and_replaced(file: File, damage: Callable[[bytes], bytes]) -> None:
    file.save(700, (5, 0, 250), (699, 0, 3))
    whole = file.path.read_bytes()
    file.path.write_bytes(damage(whole))
    clock, counts, last, note = file.load()
    assert (clock, counts, last) == NOTHING[:3]
    # A key that was damaged is another cache's.
    assert "is damaged; counting begins anew" in note or file.path.read_bytes().count(b"\x00")
    file.exchange(False, 700, (5, 0, 250), (699, 0, 3))
    assert file.load() == (700, [5, 0, 250], [699, 0, 3], "")


def test_random_damage(file: File) -> None:
    file.save(700, (5, 0, 250), (699, 0, 3))
    file.save(20, (7, 8, 9), (1, 2, 3), prefix="layers.1.")
    whole = file.path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        file.path.write_bytes(bytes(data[: rng.integers(len(data) + 1)]))
        clock, counts, last, _ = file.load()
        assert max(counts) <= 256
        assert max(last) <= clock <= 1 << 48


@pytest.mark.parametrize(
    "content", [b"\n", b"my only copy\n", HEADER[:-1], b"moe-infer expert use 2\n", bytes(5000)]
)
def test_a_file_of_something_else_is_left_alone(file: File, content: bytes) -> None:
    file.path.write_bytes(content)
    note = file.load()[3]
    assert f"{file.path} (MOE_INFER_STATISTICS_FILE) is no file of expert statistics" in note
    file.exchange(False, 9, (1, 1, 1), (9, 9, 9))
    assert file.path.read_bytes() == content


def test_an_empty_file_is_used(file: File) -> None:
    file.path.touch()
    assert file.load() == NOTHING
    file.save(9, (1, 1, 1), (9, 9, 9))
    assert file.load()[0] == 9


def test_what_is_no_file(file: File, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        there = File(file.function, path)
        assert "is not used: it is no regular file" in there.load()[3]
        there.exchange(False, 9, (1, 1, 1), (9, 9, 9))
    absent = File(file.function, tmp_path / "absent/use.txt")
    assert "cannot be written: No such file" in absent.load()[3]
    absent.exchange(False, 9, (1, 1, 1), (9, 9, 9))
    with (tmp_path / "large").open("wb") as large:
        large.write(HEADER)
        large.truncate(1 << 33)
    assert "has 8589934592 bytes, more than 67108864" in File(file.function, large.name).load()[3]


def test_many_at_once(file: File) -> None:
    """Threads of one process: no line is lost."""
    from concurrent.futures import ThreadPoolExecutor

    def work(i: int) -> None:
        for turn in range(1, 20):
            file.save(turn, (i, i, i), (1, 1, 1), prefix=f"layers.{i}.")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for i in range(8):
        assert file.load(prefix=f"layers.{i}.") == (19, [i, i, i], [1, 1, 1], "")
    assert [path.name for path in file.path.parent.iterdir()] == ["use.txt"]
