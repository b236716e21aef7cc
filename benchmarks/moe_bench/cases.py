"""The layers that are measured, what they must read and compute, and the times to reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = (1, 16, 128, 1024, 8192)
DTYPES = ("bfloat16", "float16")
ITEM_BYTES = 2


@dataclass(frozen=True)
class Case:
    """One MoE layer whose experts are all in GPU memory; router logits are given.

    Attributes:
        name: for the command line and the JSON.
        experts: number of experts.
        top_k: experts a token.
        d_model: width of the hidden states.
        hidden: intermediate size of an expert.
        sublayer: what an expert computes.
        router: how its tokens are routed.
        normalize: 1: the chosen experts' weights are divided by their sum.
        tuned: kernels were tuned on this shape.
    """

    name: str
    experts: int
    top_k: int
    d_model: int
    hidden: int
    sublayer: str = "Gated_SiLU"
    router: str = "softmax_topk"
    normalize: int = 1
    tuned: bool = False

    @property
    def title(self) -> str:
        """For tables."""
        kind = {"Gated_SiLU": "gated silu"}.get(self.sublayer, self.sublayer)
        return f"{self.experts} experts, top {self.top_k}, {self.d_model} x {self.hidden}, {kind}"

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's matrices in a 16-bit type."""
        return 3 * self.d_model * self.hidden * ITEM_BYTES

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight file, about."""
        return self.experts * (self.expert_bytes + self.d_model * ITEM_BYTES) + 4096

    def flops(self, tokens: int) -> int:
        """Operations of the three products, a multiplication and an addition counted as two."""
        return tokens * self.top_k * 3 * 2 * self.d_model * self.hidden

    def attributes(self, path: Path) -> dict[str, Any]:
        """Of the MoELayer node, with every expert resident."""
        return {
            "expert_count": self.experts,
            "hidden_size": self.hidden,
            "expert_sublayer_type": self.sublayer,
            "expert_weight_file": str(path),
            "max_concurrency": self.experts,
            "top_k": self.top_k,
            "moe_variant": self.router,
            "normalize_routing_weights": self.normalize,
        }


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mixtral", 8, 2, 4096, 14336, tuned=True),
        Case("qwen3", 128, 8, 2048, 768, tuned=True),
        Case("t5", 20, 1, 4096, 16384, "T5_FF", "default", 0),
        Case("deepseek", 256, 8, 7168, 2048),
    )
}
"""In the order in which they are measured: those with targets first, the largest last."""

# --- Targets, for one H200 with router logits given, top-k and combine included

TARGET_CARD = "H200"
TARGET_READ = 4.55e12
"""Bytes a second, the read bandwidth measured on that card."""
TARGET_DENSE = 789e12
"""Operations a second, a dense 8192^3 bfloat16 product measured on that card."""

TARGET_MS: dict[str, dict[int, float]] = {
    "mixtral": dict(zip(TOKENS, (0.170, 0.645, 0.660, 1.20, 8.8), strict=True)),
    "qwen3": dict(zip(TOKENS, (0.028, 0.195, 0.290, 0.33, 1.15), strict=True)),
}

TRITON_MS: dict[str, dict[int, float]] = {
    "mixtral": dict(zip(TOKENS, (0.184, 0.659, 0.688, 1.766, 10.72), strict=True)),
    "qwen3": dict(zip(TOKENS, (0.037, 0.211, 0.310, 0.395, 1.550), strict=True)),
}
"""vLLM 0.33's Triton kernel with its tuned configuration in a CUDA graph, measured on that card."""

ORT_MOE_GEOMEAN = 1.6
"""com.microsoft.MoE's time over ours, over the shapes with targets; never below 1."""
TRITON_GEOMEAN = 1.15
"""The same for vLLM's Triton kernel."""
UNTUNED_GEOMEAN = 1.3
"""com.microsoft.MoE's time over ours, over the shapes that were not tuned on."""
SESSION_SHARE = 1.05
"""A layer's share of a model's run in ONNX Runtime over the bare kernel's time."""


def model_layers(tokens: int) -> int:
    """Layers of the graph that stands for a model; no more than there are input sets."""
    return 8 if tokens <= 128 else 3
