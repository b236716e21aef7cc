"""What is measured of streaming layers, and what the times have to reach."""

from __future__ import annotations

from moe_bench.cases import CASES, Case
from moe_bench.weights import TORCH_DTYPES

EXAMPLE = CASES["t5"]
"""InfMoE's own example: T5_FF, 20 experts of 4096 x 16384."""
DECODER = CASES["qwen3"]
"""A layer of a Qwen3-30B-A3B-shaped decoder."""
MIXTRAL = CASES["mixtral"]

PARTS = ("C", "A", "B", "F", "A32", "D")
"""In the order of their importance; A32 is A in float32."""
MODES = ("host", "device", "auto")
"""What drives the fetches: the host with the copy engines; a kernel, inside of a CUDA graph; or
whichever the library takes for a call, launched one by one."""
DEFAULT_MODES = ("host", "device")

EXAMPLE_SLOTS = (4, 16, 8)
EXAMPLE_TOKENS = (512, 4096, 40960)
EXAMPLE_SKEWED_TOKENS = 16
"""With more tokens every one of 20 experts is needed in every call, however they are spread."""

DECODER_LAYERS = 48
DECODER_FILES = 4
"""Layers take these weights in turn; each layer has slots of its own all the same."""
DECODER_BUDGETS = (25, 50, 10, 100)
"""Slots of each layer in percent of its experts; at 100 all stay."""
DECODER_TOKENS = (1, 8, 64, 4096)
LOCALITY = 0.5
"""Correlation of an expert's score from step to step; see moe_infer.simulate.generate."""

AHEAD_BUDGETS = (25, 50, 10)
AHEAD_PAUSES_US = (50, 0)
"""After each layer, in the place of attention."""
AHEAD_RECALLS = (0.75, 0.90, 0.60)
"""Part of a layer's experts that is guessed while the layer before it runs."""

MIXTRAL_LAYERS = 4
MIXTRAL_SLOTS = 2

DISK_LAYERS = 2
DISK_SLOTS = 32
DISK_PINNED = "64M"
"""Of weights of 2.4 GB."""

# --- What has to be reached, on one H200

INFMOE_MS = {512: 291.0, 4096: 307.0, 40960: 453.0}
"""InfMoE on its example with 4 slots in float32, measured on an H200."""
BUS_SHARE = {"host": 0.95, "device": 0.91, "auto": 0.91}
"""Of the bus's speed, for what is bound by it."""
HITS_OVER_RESIDENT = 1.03
EXAMPLE_MOST_MS = 150.0
EXAMPLE_MOST_BYTES = 1 / 3
EXAMPLE_OVER_INFMOE = 0.85
MIXTRAL_MOST_MS = 60.0
MIXTRAL_OVER_ACCELERATE = 26.0
DECODER_OVER_FLOOR = 1.10
SIMULATED_WITHIN = 0.10
DECODER_BELOW_BELADY = 0.05


def expert_bytes(case: Case, dtype: str) -> int:
    """Bytes of one expert's matrices."""
    return case.expert_bytes * TORCH_DTYPES[dtype].itemsize // 2


def file_bytes(case: Case, dtype: str) -> int:
    """Bytes of the weight file, about."""
    return case.file_bytes * TORCH_DTYPES[dtype].itemsize // 2


def slots_of(case: Case, percent: float) -> int:
    """Experts that a budget holds, never fewer than one token needs."""
    return max(case.top_k, round(case.experts * percent / 100))
