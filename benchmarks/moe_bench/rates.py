"""What the chip does at most: reading device memory, and a dense product."""

from __future__ import annotations

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


def measure_rates(dtypes: tuple[str, ...] | list[str]) -> Rates:
    """Measures both, with random data; takes about a tenth of a second a type."""
    return Rates(read_rate(), {dtype: dense_rate(dtype) for dtype in dtypes})


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


def dense_rate(dtype: str) -> float:
    """Operations a second of an 8192^3 product."""
    kind = TORCH_DTYPES[dtype]
    a, b = (torch.randn((DENSE_SIZE, DENSE_SIZE), device="cuda").to(kind) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * DENSE_SIZE**3 / (1e-3 * _median(lambda: torch.matmul(a, b, out=c)))


def _median(run: Any) -> float:
    contender = Contender(run, on_device=True)
    for _ in range(5):
        contender.sample()
    return spread([contender.sample() for _ in range(20)]).median
