"""The activation of a gated feed-forward in one pass. Without postponed annotations, for Triton."""

import triton
import triton.language as tl


@triton.jit
def gated_kernel(inner, output, hidden, gelu: tl.constexpr, block: tl.constexpr):
    """``output[r] = act(inner[r, :hidden]) * inner[r, hidden:]``; act is silu, or gelu by tanh."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    at = inner + row * 2 * hidden + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + hidden, mask=inside, other=0.0).to(tl.float32)
    if gelu:  # noqa: SIM108
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        slope = gate
    value = gate * tl.sigmoid(slope) * up
    tl.store(output + row * hidden + columns, value.to(output.dtype.element_ty), mask=inside)
