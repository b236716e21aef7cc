"""What the bus does at most: copies from pinned memory to the device."""

from __future__ import annotations

import statistics

import torch

BLOCK = 64 << 20
BLOCKS = 8
"""Blocks in turn: no cache of the host holds them all."""
COPIES = 32
SAMPLES = 7


def bus_speed() -> float:
    """Bytes a second of cudaMemcpyAsync, median of 7 times 32 blocks of 64 MiB."""
    host = torch.empty((BLOCKS, BLOCK), dtype=torch.uint8, pin_memory=True).fill_(1)
    device = torch.empty((2, BLOCK), dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(SAMPLES + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(COPIES):
            device[i % 2].copy_(host[i % BLOCKS], non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(COPIES * BLOCK / (start.elapsed_time(end) / 1e3))
    return statistics.median(rates[1:])
