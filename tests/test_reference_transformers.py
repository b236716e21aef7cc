"""The reference against the MoE blocks of Hugging Face transformers, with random weights.

The blocks run in float64. Some of their routers compute in float32 all the same, which the
tolerances allow for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_infer import reference
from moe_infer.op import LayerConfig

D, H, EXPERTS = 6, 10, 8
Experts = dict[int, dict[str, np.ndarray]]

pytestmark = pytest.mark.needs_torch


def config(sublayer: str, **changes: Any) -> LayerConfig:
    attributes = {
        "expert_count": EXPERTS,
        "hidden_size": H,
        "expert_sublayer_type": sublayer,
        "expert_weight_file": "unused.npz",
    }
    return LayerConfig.from_attributes({**attributes, **changes})


def random_block(block: Any) -> Any:
    """The module in float64, in evaluation, with weights of unit variance."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    block = block.double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    return block


def random_input(scale: float = 1.0) -> Any:
    torch = pytest.importorskip("torch")
    return scale * torch.randn(3, 40, D, dtype=torch.float64)


def array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().numpy())


def packed(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([gate, up], axis=1).reshape(2 * len(gate), *gate.shape[1:])


def halves(experts: Any) -> Experts:
    """Weights of transformers' usual experts: gate and up one behind the other."""
    found: Experts = {}
    for e in range(EXPERTS):
        both = array(experts.gate_up_proj[e])
        found[e] = {"gate_up": packed(both[:H], both[H:]), "down": array(experts.down_proj[e])}
    return found


def check(layer: LayerConfig, experts: Experts, x: Any, expected: Any) -> None:
    got = reference.moe_layer(x.numpy(), layer, experts)
    assert got.std() > 0.1  # something was computed
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def centroids(weight: Any) -> np.ndarray:
    return array(weight).T.reshape(-1)


def test_mixtral() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    sizes = {"hidden_size": D, "intermediate_size": H, "num_local_experts": EXPERTS}
    block = random_block(
        modeling.MixtralSparseMoeBlock(modeling.MixtralConfig(**sizes, num_experts_per_tok=2))
    )
    x = random_input()
    layer = config(
        "Gated_SiLU",
        moe_variant="softmax_topk",
        top_k=2,
        normalize_routing_weights=1,
        expert_centroids=centroids(block.gate.weight),
    )
    check(layer, halves(block.experts), x, block(x))


@pytest.mark.parametrize(
    ("groups", "chosen", "top_k", "normalize", "scale"),
    [(1, 1, 3, True, 2.5), (4, 2, 3, True, 2.5), (2, 1, 4, False, 1.0), (4, 3, 2, False, 16.0)],
)
def test_deepseek_v3(groups: int, chosen: int, top_k: int, normalize: bool, scale: float) -> None:
    """sigmoid_topk: its biases choose, in groups; the shared expert is no part of the layer."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    block = random_block(
        modeling.DeepseekV3MoE(
            modeling.DeepseekV3Config(
                hidden_size=D,
                moe_intermediate_size=H,
                n_routed_experts=EXPERTS,
                num_local_experts=EXPERTS,
                num_experts_per_tok=top_k,
                n_group=groups,
                topk_group=chosen,
                norm_topk_prob=normalize,
                routed_scaling_factor=scale,
            )
        )
    )
    bias = torch.empty(EXPERTS).uniform_(-0.4, 0.4)
    block.gate.e_score_correction_bias.copy_(bias)
    x = random_input(0.5)
    layer = config(
        "Gated_SiLU",
        moe_variant="sigmoid_topk",
        top_k=top_k,
        normalize_routing_weights=int(normalize),
        router_bias=array(bias),
        n_group=groups,
        topk_group=chosen,
        routed_scaling_factor=scale,
        expert_centroids=centroids(block.gate.weight),
    )
    check(layer, halves(block.experts), x, block(x) - block.shared_experts(x))
    # The bias and the groups decide something here.
    plain, _ = reference.route(x.numpy(), config_without(layer, "router_bias"))
    found, _ = reference.route(x.numpy(), layer)
    assert (np.sort(plain) != np.sort(found)).any(axis=-1).sum() > 5


def config_without(layer: LayerConfig, name: str) -> LayerConfig:
    attributes = {n: v for n, v in layer.to_attributes().items() if n != name}
    return LayerConfig.from_attributes(attributes)


@pytest.mark.parametrize("limit", [7.0, 1.25])
def test_gpt_oss(limit: float) -> None:
    """topk_softmax and Clamped_SwiGLU with biases; the router's bias is part of its logits."""
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    block = random_block(
        modeling.GptOssMLP(
            modeling.GptOssConfig(
                hidden_size=D,
                intermediate_size=H,
                num_local_experts=EXPERTS,
                num_experts_per_tok=4,
                swiglu_limit=limit,
            )
        )
    )
    if block.experts.limit != limit:
        pytest.skip(
            f"this transformers clamps at {block.experts.limit}, whatever the configuration"
        )
    x = random_input()
    experts = {
        e: {
            "gate_up": array(block.experts.gate_up_proj[e]).T,
            "gate_up_bias": array(block.experts.gate_up_proj_bias[e]),
            "down": array(block.experts.down_proj[e]).T,
            "down_bias": array(block.experts.down_proj_bias[e]),
        }
        for e in range(EXPERTS)
    }
    layer = config(
        "Clamped_SwiGLU", moe_variant="topk_softmax", top_k=4, expert_bias=1, swiglu_limit=limit
    )
    logits = array(x @ block.router.weight.T + block.router.bias)
    inner = array(x) @ experts[0]["gate_up"].T
    assert (inner > limit).any() and (inner[..., 1::2] < -limit).any()
    got = reference.moe_layer(x.numpy(), layer, experts, logits)
    np.testing.assert_allclose(got, array(block(x)[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("jitter", "scale"), [(0.01, 1.0), (0.2, 1.0), (0.0, 0.3), (1.5, 1.0)])
def test_phimoe(jitter: float, scale: float) -> None:
    """sparse_mixer; negative scores, also the best of a token, are among them."""
    modeling = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    block = random_block(
        modeling.PhimoeSparseMoeBlock(
            modeling.PhimoeConfig(
                hidden_size=D,
                intermediate_size=H,
                num_local_experts=EXPERTS,
                num_experts_per_tok=2,
                router_jitter_noise=jitter,
                input_jitter_noise=0.1,
            )
        )
    )
    # The same for all experts: it moves a token's scores together, below zero in half of them.
    block.router.weight[:, 0].detach().fill_(3.0)
    x = random_input(scale)
    layer = config(
        "Gated_SiLU",
        moe_variant="sparse_mixer",
        top_k=2,
        router_jitter=jitter,
        expert_centroids=centroids(block.router.weight),
    )
    scores = array(x @ block.router.weight.T)
    assert (scores.max(axis=-1) < 0).any() and (scores.min(axis=-1) > 0).any()
    check(layer, halves(block.experts), x, block(x))


def test_switch() -> None:
    """softmax_topk with one expert a token, not divided by the sum, and ReLU_FF."""
    modeling = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers"
    )
    block = random_block(
        modeling.SwitchTransformersSparseMLP(
            modeling.SwitchTransformersConfig(
                d_model=D,
                d_ff=H,
                num_experts=EXPERTS,
                expert_capacity=1000,  # a smaller one drops tokens
            )
        )
    )
    block.router.dtype = block.router.classifier.weight.dtype
    x = random_input()
    experts = {
        e: {
            "up": array(block.experts[f"expert_{e}"].wi.weight),
            "down": array(block.experts[f"expert_{e}"].wo.weight),
        }
        for e in range(EXPERTS)
    }
    layer = config(
        "ReLU_FF",
        moe_variant="softmax_topk",
        expert_centroids=centroids(block.router.classifier.weight),
    )
    check(layer, experts, x, block(x))


def test_t5() -> None:
    """T5_FF is T5's feed-forward layer with its norm and residual."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    sizes = {"d_model": D, "d_ff": H, "feed_forward_proj": "gated-gelu", "dropout_rate": 0}
    block = random_block(modeling.T5LayerFF(modeling.T5Config(**sizes)))
    x = random_input()
    parts = {n.split(".")[-2]: array(p) for n, p in block.named_parameters()}
    expert = {
        "layer_norm": parts["layer_norm"],
        "gate_up": packed(parts["wi_0"], parts["wi_1"]),
        "down": parts["wo"],
    }
    layer = config("T5_FF", expert_count=1, expert_centroids=[0.0] * D)
    check(layer, {0: expert}, x, block(x))
