"""How a token finds its experts: the values of ``moe_variant``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Router:
    """How a token's experts and their weights follow from its scores."""

    name: str
    most_experts: int | None
    """Largest ``top_k``; None: all experts."""
    meaning: str

    @property
    def single_expert(self) -> bool:
        """True: only ``top_k`` 1 is meaningful."""
        return self.most_experts == 1


ROUTERS: dict[str, Router] = {
    r.name: r
    for r in (
        Router("default", 1, "expert with the highest score; out = expert(x)"),
        Router(
            "cpm_2",
            1,
            "`default`, but scores come from the RMS-normalised x (weight `layernorm_weight`)",
        ),
        Router(
            "base_layer",
            1,
            "expert with the highest score; out = s * expert(x) + (1 - s) * x, s = sigmoid(score)",
        ),
        Router(
            "softmax_topk",
            None,
            "softmax over all experts, then the `top_k` largest (Mixtral, Qwen, OLMoE; with"
            " `top_k` 1 Switch)",
        ),
        Router("topk_softmax", None, "the `top_k` largest scores, softmax over these (gpt-oss)"),
        Router(
            "sigmoid_topk",
            None,
            "p = sigmoid(scores); the `top_k` largest p + `router_bias` in the `topk_group` best of"
            " `n_group` groups; weights are p (DeepSeek-V3)",
        ),
        Router(
            "sparse_mixer",
            2,
            "expert with the highest score, then that of the others; each one's weight is its share"
            " of a softmax over those not yet chosen, without the scores s for which"
            " (best - s) / max(abs(s), best) > 2 * `router_jitter` (Phi-3.5-MoE, evaluation)",
        ),
    )
}
