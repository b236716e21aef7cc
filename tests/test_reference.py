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


def make_experts(sublayer: str, count: int, seed: int = 0, bias: bool = False) -> Experts:
    rng = np.random.default_rng(seed)
    tensors = SUBLAYERS[sublayer].tensors + (SUBLAYERS[sublayer].biases if bias else ())
    return {e: {t.name: rng.standard_normal(t.shape(D, H)) for t in tensors} for e in range(count)}


def loop_activation(sublayer: str, v: float) -> float:
    if "SiLU" in sublayer:
        return v / (1 + math.exp(-v))
    if "ReLU" in sublayer:
        return max(v, 0.0)
    if sublayer in ("Gated_GELU", "GELU_FF"):
        return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def loop_expert(layer: LayerConfig, x: list[float], tensors: dict[str, np.ndarray]) -> list[float]:
    """One expert on one token, by scalar arithmetic."""
    sublayer = layer.expert_sublayer_type
    if sublayer == "Identity":
        return x

    def product(name: str, v: list[float]) -> list[float]:
        out = [sum(float(w) * f for w, f in zip(r, v, strict=True)) for r in tensors[name]]
        bias = tensors.get(f"{name}_bias", np.zeros(len(out)))
        return [a + float(b) for a, b in zip(out, bias, strict=True)]

    n = x
    if sublayer == "T5_FF":
        scale = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
        n = [float(w) * v / scale for w, v in zip(tensors["layer_norm"], x, strict=True)]
    inner = []
    if "up" in tensors:
        inner = [loop_activation(sublayer, v) for v in product("up", n)]
    elif sublayer == "Clamped_SwiGLU":
        rows = product("gate_up", n)
        for gate, up in zip(rows[0::2], rows[1::2], strict=True):
            limit = layer.swiglu_limit or math.inf
            g, u = min(gate, limit), max(min(up, limit), -limit)
            inner.append(
                g / (1 + math.exp(-layer.activation_alpha * g)) * (u + layer.activation_beta)
            )
    else:
        rows = product("gate_up", n)
        inner = [
            loop_activation(sublayer, gate) * up
            for gate, up in zip(rows[0::2], rows[1::2], strict=True)
        ]
    out = product("down", inner)
    return [a + b for a, b in zip(x, out, strict=True)] if sublayer == "T5_FF" else out


def loop_route(scores: list[float], config: LayerConfig) -> tuple[list[int], list[float]]:
    """Chosen experts and weights of one token, by scalar arithmetic."""
    experts = range(len(scores))
    if config.moe_variant == "sparse_mixer":
        return loop_sparse_mixer(scores, config)
    ranking = scores
    sigmoid = [1 / (1 + math.exp(-s)) for s in scores]
    if config.moe_variant == "sigmoid_topk":
        bias = config.router_bias or [0.0] * len(scores)
        ranking = [s + b for s, b in zip(sigmoid, bias, strict=True)]
        size = len(scores) // config.n_group
        groups = [sorted(ranking[g * size :][:size])[-2:] for g in range(config.n_group)]
        best = sorted(range(config.n_group), key=lambda g: (-sum(groups[g]), g))
        experts = [e for e in experts if e // size in best[: config.topk_group or config.n_group]]
    order = sorted(experts, key=lambda e: (-ranking[e], e))[: config.top_k]
    weights = [1.0] * len(order)
    chosen = [math.exp(scores[e]) for e in order]
    if config.moe_variant in ("base_layer", "sigmoid_topk"):
        weights = [sigmoid[e] for e in order]
    elif config.moe_variant == "softmax_topk":
        weights = [c / sum(math.exp(s) for s in scores) for c in chosen]
    elif config.moe_variant == "topk_softmax":
        weights = [c / sum(chosen) for c in chosen]
    if config.normalize_routing_weights and not config.router.single_expert:
        weights = [w / sum(weights) for w in weights]
    return order, [w * config.routed_scaling_factor for w in weights]


def loop_sparse_mixer(scores: list[float], config: LayerConfig) -> tuple[list[int], list[float]]:
    order: list[int] = []
    weights: list[float] = []
    while len(order) < config.top_k:
        left = [e for e in range(len(scores)) if e not in order]
        best = max(left, key=lambda e: (scores[e], -e))
        near = [
            e
            for e in left
            if (scores[best] - scores[e]) / max(abs(scores[e]), scores[best])
            <= 2 * config.router_jitter
        ]
        weights.append(math.exp(scores[best]) / sum(math.exp(scores[e]) for e in near))
        order.append(best)
    if config.normalize_routing_weights:
        weights = [w / sum(weights) for w in weights]
    return order, [w * config.routed_scaling_factor for w in weights]


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
        order, weights = loop_route(scores, config)
        token = [0.0] * D
        for e, weight in zip(order, weights, strict=True):
            expert = loop_expert(config, row, experts[e])
            token = [a + weight * b for a, b in zip(token, expert, strict=True)]
        if config.moe_variant == "base_layer":
            token = [a + (1 - weights[0]) * b for a, b in zip(token, row, strict=True)]
        out.append(token)
    return np.array(out).reshape(x.shape)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU", "Identity"])
@pytest.mark.parametrize("router", ROUTERS)
def test_against_a_loop(
    router: str, sublayer: str, normalize: int, with_logits: bool, experts: int, tokens: int
) -> None:
    if router == "cpm_2" and with_logits:
        with_logits = False  # cpm_2 scores by itself
    rng = np.random.default_rng(experts * 10 + tokens)
    for top_k in {1, min(2, experts), experts}:
        if top_k > (ROUTERS[router].most_experts or experts):
            continue
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


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("sublayer", [n for n, s in SUBLAYERS.items() if s.biases])
def test_sublayers_against_a_loop(sublayer: str, bias: int) -> None:
    rng = np.random.default_rng(11)
    more = {"swiglu_limit": 1.5, "activation_alpha": 1.25} if sublayer == "Clamped_SwiGLU" else {}
    layer = config(
        4,
        moe_variant="softmax_topk",
        top_k=2,
        expert_sublayer_type=sublayer,
        expert_bias=bias,
        **more,
    )
    weights = make_experts(sublayer, 4, bias=bool(bias))
    x, logits = rng.standard_normal((9, D)), rng.standard_normal((9, 4))
    got = reference.moe_layer(x, layer, weights, logits)
    np.testing.assert_allclose(got, loop_layer(x, layer, weights, logits), rtol=1e-10)


ROUTER_OPTIONS: list[dict[str, Any]] = [
    {"moe_variant": "sigmoid_topk", "top_k": 3},
    {"moe_variant": "sigmoid_topk", "top_k": 3, "router_bias": [0.3, -0.3] * 4},
    {"moe_variant": "sigmoid_topk", "top_k": 2, "n_group": 4, "topk_group": 1},
    {"moe_variant": "sigmoid_topk", "top_k": 5, "n_group": 4, "topk_group": 3},
    {"moe_variant": "sigmoid_topk", "top_k": 8, "n_group": 2, "topk_group": 2},
    {
        "moe_variant": "sigmoid_topk",
        "top_k": 4,
        "n_group": 2,
        "topk_group": 1,
        "router_bias": [-9.0] * 8,
        "normalize_routing_weights": 1,
        "routed_scaling_factor": 2.5,
    },
    {"moe_variant": "softmax_topk", "top_k": 2, "routed_scaling_factor": 16.0},
    {"moe_variant": "sparse_mixer", "top_k": 2, "router_jitter": 0.3},
    {"moe_variant": "sparse_mixer", "top_k": 1, "router_jitter": 5.0},
    {"moe_variant": "sparse_mixer", "top_k": 2, "router_jitter": 0.0, "routed_scaling_factor": 0.5},
]


@pytest.mark.parametrize("options", ROUTER_OPTIONS, ids=str)
def test_routers_against_a_loop(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(12)
    layer = config(8, expert_sublayer_type="Identity", **options)
    for scores in (
        rng.standard_normal((200, 8)) * 2,
        rng.standard_normal((200, 8)) - 5,  # the best score is negative
        rng.integers(1, 3, (200, 8)).astype(np.float64),  # most are equal
    ):
        experts, weights = reference.route(np.zeros((200, D)), layer, scores)
        for t, row in enumerate(scores.tolist()):
            order, expected = loop_route(row, layer)
            assert experts[t].tolist() == order
            np.testing.assert_allclose(weights[t], expected, rtol=1e-12)


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


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
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
        ("sigmoid_topk", 0, [4 / 5, 3 / 4]),
        ("sigmoid_topk", 1, [16 / 31, 15 / 31]),
    ):
        layer = config(4, moe_variant=router, top_k=2, normalize_routing_weights=normalize)
        experts, weights = reference.route(x, layer, logits)
        assert experts.tolist() == [[1, 2]]
        np.testing.assert_allclose(weights, [expected], rtol=1e-14)


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "cpm_2"])
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
        _, mixed = reference.route(x, config(3, moe_variant="sparse_mixer", top_k=2), logits)
    # The second of the first row is minus infinity, a share of nothing.
    np.testing.assert_array_equal(mixed, [[1.0, np.nan], [np.nan, 0.5], [1.0, 1.0]])


def test_ties_between_groups() -> None:
    layer = config(6, moe_variant="sigmoid_topk", top_k=2, n_group=3, topk_group=1)
    scores = np.array([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 2.0, 1.0, 1.0, 2.0]])
    experts, _ = reference.route(np.zeros((2, D)), layer, scores)
    assert experts.tolist() == [[0, 1], [2, 3]]


def test_a_bias_chooses_but_does_not_weigh() -> None:
    layer = config(3, moe_variant="sigmoid_topk", router_bias=[0.0, 0.0, 9.0])
    experts, weights = reference.route(np.zeros((1, D)), layer, np.array([[5.0, 1.0, 0.0]]))
    assert (experts.tolist(), weights.tolist()) == ([[2]], [[0.5]])


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
