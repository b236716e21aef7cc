"""A kernel that only reads device memory. Without postponed annotations, which Triton reads."""

import triton
import triton.language as tl

BLOCK = 4096
STEPS = 4


@triton.jit
def read_kernel(source, sums, block: tl.constexpr, steps: tl.constexpr):
    """Sums ``block * steps`` int32 a program, modulo 2^32, into ``sums[program]``.

    All loads of a program are independent and 16 bytes wide.
    """
    first = tl.program_id(0).to(tl.int64) * (block * steps)
    total = tl.zeros((block,), tl.int32)
    for step in tl.static_range(steps):
        total += tl.load(source + first + step * block + tl.arange(0, block))
    tl.store(sums + tl.program_id(0), tl.sum(total))
