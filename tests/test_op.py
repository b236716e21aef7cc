"""The operator's definition: every check with its message, and the attributes' round trip."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from moe_infer.op import (
    ATTRIBUTES,
    MAX_EXPERTS,
    ROUTERS,
    SUBLAYERS,
    ExpertTensor,
    LayerConfig,
    output_shape,
)

LEAST: dict[str, Any] = {
    "expert_count": 4,
    "hidden_size": 8,
    "expert_sublayer_type": "T5_FF",
    "expert_weight_file": "w.npz",
}
CPM_2 = {"moe_variant": "cpm_2", "layernorm_weight": [1.0, 2.0], "expert_centroids": [0.5] * 8}


def make(**changes: Any) -> LayerConfig:
    merged = {**LEAST, **changes}
    return LayerConfig.from_attributes({n: v for n, v in merged.items() if v is not None})


def test_defaults() -> None:
    layer = make()
    assert (layer.max_concurrency, layer.top_k, layer.moe_variant) == (2, 1, "default")
    assert (layer.normalize_routing_weights, layer.embedding_size) == (0, 0)
    assert (layer.expert_weight_prefix, layer.expert_weight_digest) == ("", "")
    assert layer.expert_centroids is None and layer.layernorm_weight is None
    assert layer.sublayer is SUBLAYERS["T5_FF"] and layer.router is ROUTERS["default"]


def test_fields_are_the_attributes() -> None:
    assert {a.name for a in ATTRIBUTES} == set(LayerConfig.__dataclass_fields__)
    for attribute in ATTRIBUTES:
        field = LayerConfig.__dataclass_fields__[attribute.name]
        if not attribute.required:
            assert field.default == attribute.default, attribute.name


FULL: list[dict[str, Any]] = [
    {},
    {"max_concurrency": 4, "top_k": 2, "moe_variant": "softmax_topk"},
    {"moe_variant": "topk_softmax", "top_k": 4, "normalize_routing_weights": 1},
    {**CPM_2, "embedding_size": 2, "expert_weight_prefix": "layers.3."},
    {"expert_centroids": [0.25, -1.0, 3.0, 4.0], "expert_weight_digest": "0123abcd-99"},
    {"expert_sublayer_type": "Identity", "hidden_size": 0, "expert_weight_file": None},
]


@pytest.mark.parametrize("changes", FULL)
def test_round_trip(changes: dict[str, Any]) -> None:
    layer = make(**changes)
    attributes = layer.to_attributes()
    assert LayerConfig.from_attributes(attributes) == layer
    defaults = {a.name: a.default for a in ATTRIBUTES}
    assert all(value != defaults[name] for name, value in attributes.items())
    assert {a.name for a in ATTRIBUTES if a.required} <= set(attributes)


def test_onnx_gives_bytes_and_lists() -> None:
    layer = make(expert_sublayer_type=b"T5_FF", expert_centroids=[1, 2, 3, 4])
    assert layer == make(expert_centroids=(1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize(("slots", "resident"), [(3, False), (4, True), (5, True)])
def test_resident(slots: int, resident: bool) -> None:
    assert make(max_concurrency=slots).resident == resident


BAD: list[tuple[dict[str, Any], str]] = [
    ({"experts": 3}, "unknown attribute 'experts'; known are embedding_size, expert_centroids, "),
    ({"expert_count": None}, "attribute 'expert_count' is missing"),
    ({"hidden_size": None}, "attribute 'hidden_size' is missing"),
    ({"expert_sublayer_type": None}, "attribute 'expert_sublayer_type' is missing"),
    (
        {"expert_weight_file": None},
        "'expert_weight_file' is missing; sub-layer 'T5_FF' has weights",
    ),
    ({"expert_weight_file": ""}, "'expert_weight_file' is missing; sub-layer 'T5_FF' has weights"),
    ({"expert_count": 4.0}, "attribute 'expert_count' must be of type int, got float"),
    ({"expert_count": True}, "attribute 'expert_count' must be of type int, got bool"),
    ({"expert_count": "4"}, "attribute 'expert_count' must be of type int, got str"),
    ({"moe_variant": 3}, "attribute 'moe_variant' must be of type string, got int"),
    ({"expert_centroids": 1.0}, "attribute 'expert_centroids' must be of type floats, got float"),
    ({"expert_centroids": "a"}, "attribute 'expert_centroids' must be of type floats, got str"),
    ({"expert_count": 0}, f"attribute 'expert_count' must be 1 to {MAX_EXPERTS}, got 0"),
    ({"expert_count": MAX_EXPERTS + 1}, f"must be 1 to {MAX_EXPERTS}, got {MAX_EXPERTS + 1}"),
    ({"max_concurrency": 0}, "attribute 'max_concurrency' must be at least 1, got 0"),
    ({"top_k": 0}, "attribute 'top_k' must be at least 1, got 0"),
    ({"top_k": 5}, "attribute 'top_k' is 5, but there are only 4 experts"),
    (
        {"expert_sublayer_type": "T5"},
        "'expert_sublayer_type' is 'T5'; known are Gated_SiLU, Identity, T5_FF",
    ),
    (
        {"moe_variant": "top2"},
        "'moe_variant' is 'top2'; known are base_layer, cpm_2, default, softmax_topk, topk_softmax",
    ),
    ({"hidden_size": 0}, "attribute 'hidden_size' must be 1 to 1073741823, got 0"),
    (
        {"hidden_size": -1, "expert_sublayer_type": "Identity"},
        "attribute 'hidden_size' must be 0 to 1073741823, got -1",
    ),
    ({"embedding_size": -1}, "attribute 'embedding_size' must be at least 0, got -1"),
    (
        {"normalize_routing_weights": 2},
        "attribute 'normalize_routing_weights' must be 0 to 1, got 2",
    ),
    ({"top_k": 2}, "router 'default' takes one expert a token, but attribute 'top_k' is 2"),
    ({**CPM_2, "top_k": 2}, "router 'cpm_2' takes one expert a token, but attribute 'top_k' is 2"),
    (
        {**CPM_2, "layernorm_weight": None},
        "attribute 'layernorm_weight' is missing; router 'cpm_2' needs it",
    ),
    (
        {"layernorm_weight": [1.0]},
        "'layernorm_weight' is only for router 'cpm_2', but 'moe_variant' is 'default'",
    ),
    (
        {"expert_centroids": [1.0] * 7},
        "'expert_centroids' has 7 values, which is no multiple of the 4 experts",
    ),
    (
        {"expert_centroids": [0.0, 1.0, math.nan, 0.0]},
        "attribute 'expert_centroids' has NaN at position 2",
    ),
    (
        {"expert_centroids": [0.0, -math.inf, 0.0, 0.0]},
        "attribute 'expert_centroids' has infinity at position 1",
    ),
    (
        {**CPM_2, "layernorm_weight": [math.inf, 1.0]},
        "attribute 'layernorm_weight' has infinity at position 0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda v: v if type(v) is str else "")
def test_bad_attributes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MoELayer: .*{re.escape(message)}"):
        make(**{n: v for n, v in changes.items() if v is not None} | dict.fromkeys(
            n for n, v in changes.items() if v is None
        ))  # fmt: skip


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax"])
def test_routers_that_take_more(router: str) -> None:
    assert make(moe_variant=router, top_k=4).top_k == 4


BAD_INPUTS: list[tuple[dict[str, Any], int, bool, str]] = [
    ({}, 0, True, "the last dimension of hidden_states must be at least 1, got 0"),
    (
        {"embedding_size": 3},
        2,
        True,
        "'embedding_size' is 3, but the last dimension of hidden_states is 2",
    ),
    (
        {"expert_centroids": [1.0] * 8},
        2,
        True,
        "both input 1 (router_logits) and attribute 'expert_centroids' are given; give one of them",
    ),
    (
        {**CPM_2, "expert_centroids": None},
        2,
        True,
        "router 'cpm_2' computes its own scores; remove input 1 (router_logits) and give attribute",
    ),
    ({}, 2, False, "without input 1 (router_logits) attribute 'expert_centroids' is needed"),
    (
        {"expert_centroids": [1.0] * 8},
        3,
        False,
        "must have d_model * expert_count = 3 * 4 = 12 values, got 8",
    ),
    (
        {**CPM_2, "layernorm_weight": [1.0] * 3},
        2,
        False,
        "attribute 'layernorm_weight' must have d_model = 2 values, got 3",
    ),
]


@pytest.mark.parametrize(("changes", "d_model", "logits", "message"), BAD_INPUTS)
def test_bad_inputs(changes: dict[str, Any], d_model: int, logits: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"^MoELayer: .*{re.escape(message)}"):
        make(**changes).check_inputs(d_model, logits)


def test_good_inputs() -> None:
    make().check_inputs(2, True)
    make(expert_centroids=[1.0] * 8, embedding_size=2).check_inputs(2, False)
    make(**CPM_2).check_inputs(2, False)


def test_shape_rule() -> None:
    assert output_shape((7, 4)) == (7, 4)
    assert output_shape(["batch", None, 4]) == ("batch", None, 4)
    for shape in ((4,), (1, 2, 3, 4), ()):
        with pytest.raises(ValueError, match=f"got rank {len(shape)}"):
            output_shape(shape)


def test_packed_shapes() -> None:
    gate_up = ExpertTensor("gate_up", ("a", "b"), ("hidden_size", "d_model"))
    assert gate_up.shape(4, 6) == (12, 4)
    assert gate_up.resolve_part_shape(4, 6) == (6, 4)
    shapes = {t.name: t.shape(4, 6) for t in SUBLAYERS["T5_FF"].tensors}
    assert shapes == {"layer_norm": (4,), "gate_up": (12, 4), "down": (4, 6)}
    assert SUBLAYERS["Identity"].tensors == ()
