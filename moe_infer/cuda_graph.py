"""Which runs of a layer a CUDA graph can capture: the twin of ``ops/fetch/device_fetch.cpp``."""

from __future__ import annotations

from moe_infer.graph.lower_nodes import LayerNode

ALIGNMENT = 16
"""The device copies so many bytes at a time."""


def captured_runs(layer: LayerNode) -> str:
    """``any number of tokens``, ``up to N tokens``, or ``no`` and why.

    A graph cannot wait for the host, so the device must fetch: experts that lie in the file as the
    slots hold them, and no more of them in a run than there are slots. That they can be page-locked
    (``MOE_INFER_PINNED_BYTES``) is known only where the model runs.
    """
    config = layer.config
    if not config.tensors or config.max_concurrency >= config.expert_count:
        return "any number of tokens"
    reason = why_not_as_in_slots(layer)
    if reason:
        return f"no: {reason}"
    tokens = config.max_concurrency // config.top_k
    if not tokens:
        return f"no: a token needs {config.top_k} experts, max_concurrency is less"
    return f"up to {tokens} token{'s' if tokens > 1 else ''}"


def why_not_as_in_slots(layer: LayerNode) -> str:
    """Why the file does not hold the experts as the slots do; "" if it does."""
    config, weights = layer.config, layer.weights
    other = sorted({dtype for dtype in weights.dtypes.values() if dtype != layer.dtype})
    if other:
        return f"the weights are {', '.join(other)}, the model {layer.dtype}"
    for tensor in config.tensors:
        stacked = weights.stacked(tensor.name)
        if stacked is None and len(tensor.parts) > 1:
            return f"{' and '.join(tensor.parts)} are tensors of their own"
        if stacked is not None:
            steps = [stacked.offset if stacked.stored else 0, stacked.nbytes // config.expert_count]
        else:
            parts = [weights.part(e, tensor.parts[0]) for e in range(config.expert_count)]
            steps = [part.offset for part in parts if part is not None and part.stored]
        if any(step % ALIGNMENT for step in steps):
            return f"an expert's {tensor.name} does not begin at a multiple of {ALIGNMENT} bytes"
    return ""
