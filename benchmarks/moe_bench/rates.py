"""What the chip does at most: reading device memory, and a dense product."""

from __future__ import annotations

import time
from typing import Any

import torch

from moe_bench.floor import Rates
from moe_bench.timing import Contender, spread
from moe_bench.weights import TORCH_DTYPES

try:
    from moe_bench.read_kernel import BLOCK, STEPS, read_kernel
except ImportError:
    read_kernel = None

READ_BYTES = 2 << 30
DENSE_SIZE = 8192
SUSTAINED_SECONDS = 1.0
RUNS_BETWEEN = 10


def measure_rates(dtypes: tuple[str, ...] | list[str]) -> Rates:
    """Measures both, with random data; takes about a second a type."""
    dense = {dtype: dense_rates(dtype) for dtype in dtypes}
    return Rates(
        read_rate(),
        {dtype: rates[0] for dtype, rates in dense.items()},
        {dtype: rates[1] for dtype, rates in dense.items()},
    )


def read_rate() -> float:
    """Bytes a second that a kernel reads, median of 20 passes over 2 GiB.

    Raises:
        RuntimeError: the kernel did not read everything.
    """
    words = READ_BYTES // 4
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda")
    if read_kernel is None:
        sums = torch.empty(1, dtype=torch.int64, device="cuda")
        return READ_BYTES / (
            1e-3 * _median(lambda: torch.sum(source, dim=0, keepdim=True, out=sums))
        )
    programs = words // (BLOCK * STEPS)
    partial = torch.empty(programs, dtype=torch.int32, device="cuda")

    def run() -> None:
        read_kernel[(programs,)](source, partial, BLOCK, STEPS, num_warps=8)

    run()
    if (int(partial.long().sum()) - int(source.sum(dtype=torch.int64))) % 2**32:
        raise RuntimeError("the kernel that measures the memory did not read all of it")
    return READ_BYTES / (1e-3 * _median(run))


def dense_rates(dtype: str) -> tuple[float, float]:
    """Operations a second of an 8192^3 product: at first, and after a second of it."""
    kind = TORCH_DTYPES[dtype]
    a, b = (torch.randn((DENSE_SIZE, DENSE_SIZE), device="cuda").to(kind) for _ in range(2))
    c = torch.empty_like(a)

    def run() -> None:
        torch.matmul(a, b, out=c)

    operations = 2 * DENSE_SIZE**3
    first = operations / (1e-3 * _median(run))
    contender = Contender(run, on_device=True)
    begin = time.perf_counter()
    times: list[float] = []
    while time.perf_counter() < begin + SUSTAINED_SECONDS:
        for _ in range(RUNS_BETWEEN):  # enqueued at once, so that the chip never idles
            run()
        times.append(contender.sample())
    return first, operations / (1e-3 * spread(times[len(times) // 2 :]).median)


def _median(run: Any) -> float:
    contender = Contender(run, on_device=True)
    for _ in range(5):
        contender.sample()
    return spread([contender.sample() for _ in range(20)]).median
