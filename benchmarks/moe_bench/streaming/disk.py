"""Part D: more weights than may be pinned, read from their file."""

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

    def read_speed(self) -> float:
        """Bytes a second of a few threads that read the first file as it is."""
        path = self.paths[0]
        size = path.stat().st_size
        file = os.open(path, os.O_RDONLY)
        buffers = [memoryview(bytearray(_CHUNK)) for _ in range(READERS)]

        def read(reader: int) -> int:
            done = 0
            for offset in range(reader * _CHUNK, size, READERS * _CHUNK):
                done += os.preadv(file, [buffers[reader]], offset)
            return done

        try:
            with ThreadPoolExecutor(READERS) as pool:
                begin = time.perf_counter()
                done = sum(pool.map(read, range(READERS)))
                return done / (time.perf_counter() - begin)
        finally:
            os.close(file)


def points(context: Context) -> Points:
    """One token a step, other experts in each: from the page cache, and from the disk."""
    case = DECODER
    with weight_files(context.disk, case, DTYPE, DISK_LAYERS, context.device) as experts:
        files = Files([own.path for own in experts])
        del experts  # GPU memory
        generator = torch.Generator(context.device).manual_seed(1)
        x = torch.randn((1, case.d_model), device=context.device, generator=generator)
        x = x.to(TORCH_DTYPES[DTYPE])
        chosen = traces.changing(case, DISK_LAYERS, STEPS, 9, context.device)
        logits = traces.logits_of(chosen, case, DTYPE)
        with Chain(case, DTYPE, files.paths, DISK_LAYERS, case.experts) as all_:
            resident = open_bound(all_, x, logits[0])
            for state in STATES:
                for mode in context.modes:
                    fields = {
                        "part": "D",
                        "case": case.name,
                        "dtype": DTYPE,
                        "layers": DISK_LAYERS,
                        "tokens": 1,
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
            if state == "disk":
                self.files.forget()
            speed = self.files.read_speed()
            if state == "disk":
                self.files.forget()
            before = chain.counters()
            bound.poison()
            count = len(self.logits)
            found = time_steps(lambda i: bound.step(self.logits[(i + 1) % count]), 15, seconds, 2)
            counted = chain.counters() - before
            self.resident.step(self.logits[len(found) % count])
            bound.must_equal(self.resident)
        told = times(found, alike=False)
        floor = against_floor(told["ms"], counted.bytes_fetched / len(found), min(bus, speed), None)
        return {
            **told,
            **floor,
            "hit_rate": counted.hit_rate,
            "read_bytes_a_second": speed,
            "bound": "file" if speed < bus else "bus",
        }


def planned(modes: int) -> int:
    """Number of points."""
    return modes * len(STATES)
