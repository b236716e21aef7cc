"""The library's routing arithmetic, run on the host lane by lane, against the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_infer import reference
from moe_infer.op import ROUTERS, LayerConfig
from native.host_library import build_or_skip
from router_options import SIGMOID_OPTIONS

NUMBERS = {name: i for i, name in enumerate(ROUTERS)}
Select = Callable[[LayerConfig, np.ndarray], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def select(tmp_path_factory: pytest.TempPathFactory) -> Select:
    folder = tmp_path_factory.mktemp("select")
    function = build_or_skip(folder, "select_token", "cuda_runtime_api.h").select_tokens
    function.restype = None

    def run(config: LayerConfig, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.ascontiguousarray(scores, np.float32)
        chosen = np.full((len(scores), config.top_k), -1, np.int32)
        weights = np.full((len(scores), config.top_k), -1, np.float32)
        alone = np.full_like(chosen, -2)
        bias = None if config.router_bias is None else np.array(config.router_bias, np.float32)
        function(
            NUMBERS[config.moe_variant],
            config.normalize_routing_weights,
            config.expert_count,
            config.top_k,
            config.n_group,
            config.chosen_groups,
            ctypes.c_float(config.routed_scaling_factor),
            ctypes.c_float(config.router_jitter),
            None if bias is None else bias.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(scores)),
            scores.ctypes.data_as(ctypes.c_void_p),
            chosen.ctypes.data_as(ctypes.c_void_p),
            weights.ctypes.data_as(ctypes.c_void_p),
            alone.ctypes.data_as(ctypes.c_void_p),
        )
        np.testing.assert_array_equal(alone, chosen)  # choose_token, which gives no weights
        return chosen, weights

    return run


def make_config(router: str, experts: int, **options: Any) -> LayerConfig:
    attributes = {
        "expert_count": experts,
        "hidden_size": 0,
        "expert_sublayer_type": "Identity",
        "moe_variant": router,
        **options,
    }
    return LayerConfig.from_attributes(attributes)


def check(select: Select, config: LayerConfig, scores: np.ndarray) -> None:
    scores = scores.astype(np.float32)
    expected, expected_weights = reference.route(np.zeros((len(scores), 1)), config, scores)
    chosen, weights = select(config, scores)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6, atol=1e-30)


def difficult(scores: np.ndarray) -> np.ndarray:
    """NaN, infinities, zeros of both signs, and a row of equal scores."""
    scores = scores.copy()
    scores[3, -1] = np.nan
    scores[4] = np.nan
    scores[5] = -np.inf
    scores[6, 0] = np.inf
    scores[7] = 0
    scores[7, ::2] = -0.0
    scores[8] = -1.5
    return scores


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 128, 129, 1024])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "cpm_2"])
def test_routers(select: Select, router: str, experts: int, normalize: int) -> None:
    rng = np.random.default_rng(experts)
    for top_k in {1, min(2, experts), min(40, experts)}:
        if top_k > (ROUTERS[router].most_experts or experts):
            continue
        config = make_config(router, experts, top_k=top_k, normalize_routing_weights=normalize)
        check(select, config, difficult(rng.standard_normal((12, experts)) * 3))
        check(select, config, rng.integers(-1, 2, (12, experts)))


@pytest.mark.parametrize(("experts", "options"), SIGMOID_OPTIONS, ids=str)
def test_sigmoid_topk(select: Select, experts: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(experts)
    options = {"router_bias": rng.uniform(-0.2, 0.2, experts), **options}
    options = {name: value for name, value in options.items() if value is not None}
    config = make_config("sigmoid_topk", experts, **options)
    check(select, config, rng.standard_normal((30, experts)))
    check(select, config, difficult(rng.standard_normal((12, experts))))
    options.pop("router_bias", None)
    tied = rng.integers(-1, 2, (30, experts))
    check(select, make_config("sigmoid_topk", experts, **options), tied)
    biased = make_config("sigmoid_topk", experts, **options, router_bias=[-0.25] * experts)
    check(select, biased, tied)


@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("experts", [2, 16, 300])
def test_sparse_mixer(select: Select, experts: int, jitter: float, offset: float) -> None:
    rng = np.random.default_rng(experts)
    config = make_config(
        "sparse_mixer", experts, top_k=2, router_jitter=jitter, routed_scaling_factor=-0.5
    )
    check(select, config, difficult(rng.standard_normal((30, experts)) + offset))
