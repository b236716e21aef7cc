"""Part D: weights read from a file: more than may be pinned, and all of layers that keep them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_bench.streaming import traces
from moe_bench.streaming.chain import (
    PINNED_VARIABLE,
    Bound,
    Chain,
    environment,
    open_bound,
    synchronize,
)
from moe_bench.streaming.context import Context, Points
from moe_bench.streaming.files import weight_files
from moe_bench.streaming.shapes import (
    DECODER,
    DISK_LAYERS,
    DISK_PINNED,
    DISK_SLOTS,
    expert_bytes,
)
from moe_bench.streaming.steps import against_floor, time_steps, times
from moe_bench.weights import TORCH_DTYPES

DTYPE = "bfloat16"
STATES = ("page cache", "disk")
STEPS = 24
READERS = 8  # as many as the library has, and pieces of the size that it reads
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Files:
    """The weights on a disk."""

    paths: list[Path]

    def forget(self) -> None:
        """Asks the system to drop what it holds of the files in memory."""
        for path in self.paths:
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)

    def speed(self, state: str) -> float:
        """Bytes a second of threads that only read, in this state, which is the same afterwards."""
        if state == "disk":
            self.forget()
        else:
            self.read()
        begin = time.perf_counter()
        done = self.read()
        speed = done / (time.perf_counter() - begin)
        if state == "disk":
            self.forget()
        return speed

    def read(self) -> int:
        """All files, by a few threads. Returns the bytes."""
        buffers = [memoryview(bytearray(_CHUNK)) for _ in range(READERS)]
        files = [os.open(path, os.O_RDONLY) for path in self.paths]

        def read(reader: int) -> int:
            done = 0
            for path, file in zip(self.paths, files, strict=True):
                for offset in range(reader * _CHUNK, path.stat().st_size, READERS * _CHUNK):
                    done += os.preadv(file, [buffers[reader]], offset)
            return done

        try:
            with ThreadPoolExecutor(READERS) as pool:
                return sum(pool.map(read, range(READERS)))
        finally:
            for file in files:
                os.close(file)


def points(context: Context) -> Points:
    """One token a step, other experts in each, and making layers until their first token is there.

    Each from the page cache, and from the disk.
    """
    case = DECODER
    with weight_files(context.disk, case, DTYPE, DISK_LAYERS, context.device) as experts:
        files = Files([own.path for own in experts])
        del experts  # GPU memory
        generator = torch.Generator(context.device).manual_seed(1)
        x = torch.randn((1, case.d_model), device=context.device, generator=generator)
        x = x.to(TORCH_DTYPES[DTYPE])
        chosen = traces.changing(case, DISK_LAYERS, STEPS, 9, context.device)
        logits = traces.logits_of(chosen, case, DTYPE)
        about = {
            "part": "D",
            "case": case.name,
            "dtype": DTYPE,
            "layers": DISK_LAYERS,
            "tokens": 1,
        }
        with Chain(case, DTYPE, files.paths, DISK_LAYERS, case.experts) as all_:
            resident = open_bound(all_, x, logits[0])
            for state in STATES:
                for mode in context.modes:
                    fields = {
                        **about,
                        "slots": DISK_SLOTS,
                        "routing": "changing",
                        "state": state,
                        "mode": mode,
                        "pinned": DISK_PINNED,
                        "all_miss_bytes": DISK_LAYERS * case.top_k * expert_bytes(case, DTYPE),
                    }
                    run = Run(files, mode, x, logits, resident)
                    yield context.measure(
                        fields, lambda s, r=run, t=state: r.measure(t, s, context.bus)
                    )
            resident.step(logits[0])
        # All layers of a process with these experts would share them: there must be none.
        load = Load(files, x, logits[0], resident)
        for state in STATES:
            fields = {
                **about,
                "slots": case.experts,
                "routing": "all experts",
                "state": state,
                "mode": "load",
                "all_miss_bytes": load.bytes,
            }
            yield context.measure(fields, lambda s, t=state: load.measure(t, s, context.bus))


@dataclass(frozen=True)
class Run:
    """One way to run the steps."""

    files: Files
    mode: str
    x: torch.Tensor
    logits: torch.Tensor
    resident: Bound

    def measure(self, state: str, seconds: float, bus: float) -> dict[str, Any]:
        """The floor is the slower of file and bus, both measured now."""
        paths = self.files.paths
        with (
            environment(PINNED_VARIABLE, DISK_PINNED),
            Chain(DECODER, DTYPE, paths, DISK_LAYERS, DISK_SLOTS, self.mode) as chain,
        ):
            bound = open_bound(chain, self.x, self.logits[0])
            bound.step(self.logits[0])
            speed = self.files.speed(state)
            before = chain.counters()
            bound.poison()
            count = len(self.logits)
            found = time_steps(lambda i: bound.step(self.logits[(i + 1) % count]), 15, seconds, 2)
            counted = chain.counters() - before
            self.resident.step(self.logits[len(found) % count])
            bound.must_equal(self.resident)
        told = times(found, alike=False)
        floor = against_file(told["ms"], counted.bytes_fetched / len(found), bus, speed)
        return {**told, **floor, "hit_rate": counted.hit_rate}


@dataclass(frozen=True)
class Load:
    """Layers that load all their experts, and run a token."""

    files: Files
    x: torch.Tensor
    logits: torch.Tensor
    expected: Bound

    @property
    def bytes(self) -> int:
        """That a load brings."""
        return DISK_LAYERS * DECODER.experts * expert_bytes(DECODER, DTYPE)

    def measure(self, state: str, seconds: float, bus: float) -> dict[str, Any]:
        """By the host's clock."""
        speed = self.files.speed(state)
        found: list[float] = []
        begin = time.perf_counter()
        while len(found) < 3 or (time.perf_counter() - begin < seconds and len(found) < 15):
            if state == "disk":
                self.files.forget()
            start = time.perf_counter()
            with Chain(DECODER, DTYPE, self.files.paths, DISK_LAYERS, DECODER.experts) as chain:
                bound = chain.bind(self.x)
                bound.poison()
                bound.step(self.logits)
                synchronize()
                found.append(1e3 * (time.perf_counter() - start))
                bound.must_equal(self.expected)
        told = times(found, alike=True)
        return {**told, **against_file(told["ms"], self.bytes, bus, speed)}


def against_file(ms: float, bytes_a_run: float, bus: float, speed: float) -> dict[str, Any]:
    """As against_floor; the floor is the slower of bus and file."""
    return {
        **against_floor(ms, bytes_a_run, min(bus, speed), None),
        "read_bytes_a_second": speed,
        "bound": "file" if speed < bus else "bus",
    }


def planned(modes: int) -> int:
    """Number of points."""
    return (modes + 1) * len(STATES)
