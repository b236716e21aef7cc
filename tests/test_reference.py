"""The reference against a loop that follows the definition, and against PyTorch."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_infer import reference
from moe_infer.op import ROUTERS, SUBLAYERS, LayerConfig
from moe_infer.weights import SafetensorsWriter, open_expert_weights

D, H = 6, 10
Experts = dict[int, dict[str, np.ndarray]]


def config(experts: int, **changes: Any) -> LayerConfig:
    attributes = {
        "expert_count": experts,
        "hidden_size": H,
        "expert_sublayer_type": "Gated_SiLU",
        "expert_weight_file": "unused.npz",
    }
    return LayerConfig.from_attributes({**attributes, **changes})


def make_experts(sublayer: str, count: int, seed: int = 0) -> Experts:
    rng = np.random.default_rng(seed)
    tensors = SUBLAYERS[sublayer].tensors
    return {e: {t.name: rng.standard_normal(t.shape(D, H)) for t in tensors} for e in range(count)}


def loop_expert(sublayer: str, x: list[float], tensors: dict[str, np.ndarray]) -> list[float]:
    """One expert on one token, by scalar arithmetic."""
    if sublayer == "Identity":
        return x
    n = x
    if sublayer == "T5_FF":
        scale = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
        n = [float(w) * v / scale for w, v in zip(tensors["layer_norm"], x, strict=True)]
    rows = [sum(float(w) * v for w, v in zip(r, n, strict=True)) for r in tensors["gate_up"]]
    inner = []
    for gate, up in zip(rows[0::2], rows[1::2], strict=True):
        if sublayer == "T5_FF":
            cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            inner.append(0.5 * gate * (1 + math.tanh(cubic)) * up)
        else:
            inner.append(gate / (1 + math.exp(-gate)) * up)
    out = [sum(float(w) * v for w, v in zip(r, inner, strict=True)) for r in tensors["down"]]
    return [a + b for a, b in zip(x, out, strict=True)] if sublayer == "T5_FF" else out


def loop_layer(
    x: np.ndarray, config: LayerConfig, experts: Experts, logits: np.ndarray | None
) -> np.ndarray:
    """The operator for each token, by scalar arithmetic."""
    out = []
    for t, row in enumerate(x.tolist()):
        if logits is not None:
            scores = logits[t].tolist()
        else:
            hidden = row
            if config.moe_variant == "cpm_2":
                scale = math.sqrt(sum(v * v for v in row) / D + 1e-6)
                assert config.layernorm_weight is not None
                hidden = [w * v / scale for w, v in zip(config.layernorm_weight, row, strict=True)]
            assert config.expert_centroids is not None
            table = config.expert_centroids
            scores = [
                sum(hidden[i] * table[i * config.expert_count + e] for i in range(D))
                for e in range(config.expert_count)
            ]
        order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: config.top_k]
        every, chosen = ([math.exp(scores[e]) for e in s] for s in (range(len(scores)), order))
        weights = [1.0] * len(order)
        if config.moe_variant == "base_layer":
            weights = [1 / (1 + math.exp(-scores[order[0]]))]
        elif config.moe_variant == "softmax_topk":
            total = sum(chosen) if config.normalize_routing_weights else sum(every)
            weights = [c / total for c in chosen]
        elif config.moe_variant == "topk_softmax":
            weights = [c / sum(chosen) for c in chosen]
        token = [0.0] * D
        for e, weight in zip(order, weights, strict=True):
            expert = loop_expert(config.expert_sublayer_type, row, experts[e])
            token = [a + weight * b for a, b in zip(token, expert, strict=True)]
        if config.moe_variant == "base_layer":
            token = [a + (1 - weights[0]) * b for a, b in zip(token, row, strict=True)]
        out.append(token)
    return np.array(out).reshape(x.shape)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("sublayer", SUBLAYERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_against_a_loop(
    router: str, sublayer: str, normalize: int, with_logits: bool, experts: int, tokens: int
) -> None:
    if router == "cpm_2" and with_logits:
        with_logits = False  # cpm_2 scores by itself
    rng = np.random.default_rng(experts * 10 + tokens)
    for top_k in {1} if ROUTERS[router].single_expert else {1, min(2, experts), experts}:
        changes: dict[str, Any] = {"moe_variant": router, "expert_sublayer_type": sublayer}
        changes |= {"top_k": top_k, "normalize_routing_weights": normalize}
        logits = rng.standard_normal((tokens, experts)) if with_logits else None
        if not with_logits:
            changes["expert_centroids"] = rng.standard_normal(D * experts)
        if router == "cpm_2":
            changes["layernorm_weight"] = rng.standard_normal(D)
        layer = config(experts, **changes)
        weights = make_experts(sublayer, experts)
        x = rng.standard_normal((tokens, D))
        got = reference.moe_layer(x, layer, weights, logits)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, loop_layer(x, layer, weights, logits), rtol=1e-11)


def test_ranks_agree() -> None:
    rng = np.random.default_rng(4)
    layer = config(3, moe_variant="softmax_topk", top_k=2)
    weights = make_experts("Gated_SiLU", 3)
    x, logits = rng.standard_normal((2, 4, D)), rng.standard_normal((2, 4, 3))
    flat = reference.moe_layer(x.reshape(8, D), layer, weights, logits.reshape(8, 3))
    np.testing.assert_array_equal(
        reference.moe_layer(x, layer, weights, logits), flat.reshape(2, 4, D)
    )


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 3, D)])
def test_zero_tokens(shape: tuple[int, ...], router: str) -> None:
    extra = {"layernorm_weight": [1.0] * D} if router == "cpm_2" else {}
    layer = config(2, moe_variant=router, expert_centroids=[0.0] * (2 * D), **extra)
    got = reference.moe_layer(np.zeros(shape, np.float16), layer, {})  # no expert is asked for
    assert got.shape == shape


def test_only_chosen_experts_are_read() -> None:
    layer = config(3)
    weights = make_experts("Gated_SiLU", 3)
    logits = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
    all_to_one = {2: weights[2]}  # the others would be a KeyError
    got = reference.moe_layer(np.ones((2, D)), layer, all_to_one, logits)
    np.testing.assert_array_equal(got[0], got[1])
    with pytest.raises(KeyError):
        reference.moe_layer(np.ones((2, D)), layer, all_to_one, -logits)


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax"])
def test_ties_go_to_the_lower_index(router: str) -> None:
    layer = config(5, moe_variant=router, top_k=3)
    logits = np.array([[1, 1, 1, 1, 1], [0, 2, 1, 2, 1], [-0.0, 0.0, -0.0, 0.0, 3]])
    experts, _ = reference.route(np.zeros((3, D)), layer, logits)
    assert experts.tolist() == [[0, 1, 2], [1, 3, 2], [4, 0, 1]]


def test_weights_follow_the_experts() -> None:
    logits = np.log([[1.0, 4.0, 3.0, 2.0]])
    x = np.zeros((1, D))
    for router, normalize, expected in (
        ("softmax_topk", 0, [0.4, 0.3]),
        ("softmax_topk", 1, [4 / 7, 3 / 7]),
        ("topk_softmax", 0, [4 / 7, 3 / 7]),
    ):
        layer = config(4, moe_variant=router, top_k=2, normalize_routing_weights=normalize)
        experts, weights = reference.route(x, layer, logits)
        assert experts.tolist() == [[1, 2]]
        np.testing.assert_allclose(weights, [expected], rtol=1e-14)


@pytest.mark.parametrize("router", ["default", "base_layer", "softmax_topk", "topk_softmax"])
def test_nan_scores_stay_with_their_token(router: str) -> None:
    layer = config(3, moe_variant=router)
    weights = make_experts("Gated_SiLU", 3)
    x = np.random.default_rng(5).standard_normal((3, D))
    logits = np.array([[0.0, 1.0, 2.0], [5.0, np.nan, 0.0], [1.0, 0.0, 0.0]])
    experts, routing = reference.route(x, layer, logits)
    assert experts[1].tolist() == [0] and np.isnan(routing[1]).all()
    got = reference.moe_layer(x, layer, weights, logits)
    assert np.isnan(got[1]).all()
    clean = reference.moe_layer(x[[0, 2]], layer, weights, logits[[0, 2]])
    np.testing.assert_allclose(got[[0, 2]], clean, rtol=1e-12)


def test_infinite_scores_do_not_warn() -> None:
    x, inf = np.ones((3, D)), np.inf
    logits = np.array([[-inf, 0.0, -inf], [inf, 0.0, 0.0], [-1e30, 1e30, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts, weights = reference.route(x, config(3, moe_variant="softmax_topk"), logits)
        assert experts.tolist() == [[1], [0], [1]]
        np.testing.assert_array_equal(weights, [[1.0], [np.nan], [1.0]])
        _, sigmoid = reference.route(x, config(3, moe_variant="base_layer"), logits)
    np.testing.assert_array_equal(sigmoid, [[0.5], [1.0], [1.0]])


def test_file_and_mapping_agree(tmp_path: Path) -> None:
    weights = make_experts("T5_FF", 4)
    weights = {e: {n: a.astype(np.float32) for n, a in t.items()} for e, t in weights.items()}
    path = tmp_path / "w.safetensors"
    tensors = SUBLAYERS["T5_FF"].tensors
    with SafetensorsWriter(path, {t.name: ("float32", (4, *t.shape(D, H))) for t in tensors}) as w:
        for t in tensors:
            w.write(t.name, (weights[e][t.name] for e in range(4)))
    layer = config(4, expert_sublayer_type="T5_FF", expert_weight_file=str(path))
    rng = np.random.default_rng(6)
    x, logits = rng.standard_normal((9, D)), rng.standard_normal((9, 4))
    np.testing.assert_array_equal(
        reference.moe_layer(x, layer, open_expert_weights(layer), logits),
        reference.moe_layer(x, layer, weights, logits),
    )


def test_inputs_that_do_not_fit() -> None:
    layer = config(3)
    with pytest.raises(ValueError, match=r"router_logits must have shape \(2, 3\), got \(2, 4\)"):
        reference.moe_layer(np.zeros((2, D)), layer, {}, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="got rank 1"):
        reference.moe_layer(np.zeros(D), layer, {}, np.zeros(3))
    with pytest.raises(ValueError, match="without input 1"):
        reference.moe_layer(np.zeros((2, D)), layer, {})


def torch_layer(torch: Any, x: Any, layer: LayerConfig, experts: Experts, logits: Any) -> Any:
    """As a model's source would have it: all experts on all tokens, then the chosen ones."""
    functional = torch.nn.functional
    outputs = []
    for e in range(layer.expert_count):
        tensors = {n: torch.from_numpy(a) for n, a in experts[e].items()}
        gate, up = tensors["gate_up"][0::2], tensors["gate_up"][1::2]
        if layer.expert_sublayer_type == "T5_FF":
            n = functional.rms_norm(x, (D,), tensors["layer_norm"], 1e-6)
            activated = functional.gelu(functional.linear(n, gate), approximate="tanh")
        else:
            n, activated = x, functional.silu(functional.linear(x, gate))
        y = functional.linear(activated * functional.linear(n, up), tensors["down"])
        outputs.append(x + y if layer.expert_sublayer_type == "T5_FF" else y)
    if layer.moe_variant == "softmax_topk":
        weights, chosen = torch.topk(torch.softmax(logits, -1), layer.top_k)
        if layer.normalize_routing_weights:
            weights = weights / weights.sum(-1, keepdim=True)
    elif layer.moe_variant == "topk_softmax":
        weights, chosen = torch.topk(logits, layer.top_k)
        weights = torch.softmax(weights, -1)
    else:
        weights, chosen = logits.max(-1, keepdim=True)
        weights = torch.sigmoid(weights) if layer.moe_variant == "base_layer" else weights * 0 + 1
    table = torch.zeros_like(logits).scatter(-1, chosen, weights)
    out = torch.einsum("te,etd->td", table, torch.stack(outputs))
    return out + (1 - weights) * x if layer.moe_variant == "base_layer" else out


@pytest.mark.needs_torch
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU"])
@pytest.mark.parametrize(
    ("router", "top_k", "normalize"),
    [("default", 1, 0), ("base_layer", 1, 0), ("softmax_topk", 3, 0), ("softmax_topk", 2, 1),
     ("topk_softmax", 3, 0)],
)  # fmt: skip
def test_against_torch(router: str, top_k: int, normalize: int, sublayer: str) -> None:
    import torch

    rng = np.random.default_rng(7)
    layer = config(
        8,
        moe_variant=router,
        top_k=top_k,
        normalize_routing_weights=normalize,
        expert_sublayer_type=sublayer,
    )
    weights = make_experts(sublayer, 8)
    x, logits = rng.standard_normal((50, D)), rng.standard_normal((50, 8))
    expected = torch_layer(torch, torch.from_numpy(x), layer, weights, torch.from_numpy(logits))
    got = reference.moe_layer(x, layer, weights, logits)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.needs_torch
def test_against_mixtral_of_transformers() -> None:
    """softmax_topk, normalised, with Gated_SiLU, and the router's weight as centroids."""
    pytest.importorskip("transformers")
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": H, "num_local_experts": 8}
    block = MixtralSparseMoeBlock(MixtralConfig(**sizes, num_experts_per_tok=2))
    block = block.double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
    experts: Experts = {}
    for e in range(8):
        both = block.experts.gate_up_proj[e].detach().numpy()
        packed = np.stack([both[:H], both[H:]], axis=1).reshape(2 * H, D)
        experts[e] = {"gate_up": packed, "down": block.experts.down_proj[e].detach().numpy()}
    router = block.gate.weight.detach().numpy()
    layer = config(8, moe_variant="softmax_topk", top_k=2, normalize_routing_weights=1,
                   expert_centroids=router.T.reshape(-1))  # fmt: skip
    got = reference.moe_layer(x.numpy(), layer, experts)
    # Its router computes the softmax in float32.
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.needs_torch
def test_against_t5_of_transformers() -> None:
    """T5_FF is T5's feed-forward layer with its norm and residual."""
    pytest.importorskip("transformers")
    import torch
    from transformers.models.t5.modeling_t5 import T5Config, T5LayerFF

    torch.manual_seed(0)
    block = T5LayerFF(T5Config(d_model=D, d_ff=H, feed_forward_proj="gated-gelu", dropout_rate=0))
    block = block.double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
    parts = {n.split(".")[-2]: p.detach().numpy() for n, p in block.named_parameters()}
    expert = {
        "layer_norm": parts["layer_norm"],
        "gate_up": np.stack([parts["wi_0"], parts["wi_1"]], axis=1).reshape(2 * H, D),
        "down": parts["wo"],
    }
    layer = config(1, expert_sublayer_type="T5_FF", expert_centroids=[0.0] * D)
    got = reference.moe_layer(x.numpy(), layer, {0: expert})
    # Its norm computes the variance in float32.
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)
