"""How many bytes an expert takes on the GPU; the twin of ``ops/sublayers/slot_layout.cpp``."""

from __future__ import annotations

import math

from moe_infer.op import LayerConfig

SLOT_ALIGNMENT = 256
"""Bytes to which each tensor of a slot is padded."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def slot_bytes(config: LayerConfig, d_model: int, dtype: str) -> int:
    """Bytes of one expert in the graph's type, each tensor padded; 0 for one without weights.

    Args:
        config: attributes of the layer.
        d_model: last dimension of hidden_states.
        dtype: of hidden_states, whatever the weights' type in the file is.
    """
    sizes = [
        math.prod(t.shape(d_model, config.hidden_size)) * _ITEM_BYTES[dtype] for t in config.tensors
    ]
    return sum(-(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT for size in sizes)
