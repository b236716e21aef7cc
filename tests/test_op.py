"""The operator's definition: every check with its message, and the attributes' round trip."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import onnx
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
GPT_OSS: dict[str, Any] = {"expert_sublayer_type": "Clamped_SwiGLU", "expert_bias": 1}
SIGMOID: dict[str, Any] = {"moe_variant": "sigmoid_topk"}
CPM_2 = {"moe_variant": "cpm_2", "layernorm_weight": [1.0, 2.0], "expert_centroids": [0.5] * 8}


def make(**changes: Any) -> LayerConfig:
    merged = {**LEAST, **changes}
    return LayerConfig.from_attributes({n: v for n, v in merged.items() if v is not None})


def test_defaults() -> None:
    layer = make()
    assert (layer.max_concurrency, layer.top_k, layer.moe_variant) == (2, 1, "default")
    assert (layer.normalize_routing_weights, layer.embedding_size) == (0, 0)
    assert (layer.n_group, layer.topk_group, layer.chosen_groups) == (1, 0, 1)
    assert (layer.routed_scaling_factor, layer.router_jitter, layer.router_bias) == (1, 0.01, None)
    assert (layer.activation_alpha, layer.activation_beta, layer.swiglu_limit) == (1.702, 1, 7)
    assert layer.tensors == layer.sublayer.tensors
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
    {
        "moe_variant": "sigmoid_topk",
        "router_bias": [0.5, 0.25, -1.0, 0.0],
        "n_group": 2,
        "topk_group": 1,
        "top_k": 2,
        "routed_scaling_factor": 2.5,
    },
    {"moe_variant": "sparse_mixer", "router_jitter": 0.125, "top_k": 2},
    {**GPT_OSS, "activation_alpha": 1.5, "activation_beta": 0.0, "swiglu_limit": 0.0},
]


@pytest.mark.parametrize("changes", FULL)
def test_round_trip(changes: dict[str, Any]) -> None:
    layer = make(**changes)
    attributes = layer.to_attributes()
    assert LayerConfig.from_attributes(attributes) == layer
    defaults = {a.name: a.default for a in ATTRIBUTES}
    assert all(value != defaults[name] for name, value in attributes.items())
    assert {a.name for a in ATTRIBUTES if a.required} <= set(attributes)


@pytest.mark.parametrize("value", [1.702, 0.01, 0.1, 1 / 3, 1e-40, 3.4e38, -0.0])
def test_a_float_is_what_32_bits_keep_of_it(value: float) -> None:
    """ONNX gives back other digits than were given; neither may be taken for another value."""
    layer = make(**GPT_OSS, activation_alpha=value)
    attribute = onnx.helper.make_attribute("activation_alpha", value)
    stored = onnx.helper.get_attribute_value(attribute)
    assert make(**GPT_OSS, activation_alpha=stored) == layer
    assert make(**GPT_OSS, activation_alpha=np.float32(value)) == layer
    assert np.float32(layer.activation_alpha) == np.float32(value)
    assert ("activation_alpha" in layer.to_attributes()) == (value != 1.702)


def test_onnx_gives_bytes_and_lists() -> None:
    layer = make(expert_sublayer_type=b"T5_FF", expert_centroids=[1, 2, 3, 4])
    assert layer == make(expert_centroids=(1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize(("slots", "resident"), [(3, False), (4, True), (5, True)])
def test_resident(slots: int, resident: bool) -> None:
    assert make(max_concurrency=slots).resident == resident


BAD: list[tuple[dict[str, Any], str]] = [
    ({"experts": 3}, "unknown attribute 'experts'; known are activation_alpha, "),
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
        "'expert_sublayer_type' is 'T5'; known are Clamped_SwiGLU, GELU_FF, GELU_Tanh_FF,"
        " Gated_GELU, Gated_GELU_Tanh, Gated_ReLU, Gated_SiLU, Identity, ReLU_FF, SiLU_FF, T5_FF",
    ),
    (
        {"moe_variant": "top2"},
        "'moe_variant' is 'top2'; known are base_layer, cpm_2, default, sigmoid_topk, softmax_topk,"
        " sparse_mixer, topk_softmax",
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
    ({"routed_scaling_factor": 2}, "'routed_scaling_factor' must be of type float, got int"),
    ({"router_jitter": "a"}, "attribute 'router_jitter' must be of type float, got str"),
    ({"swiglu_limit": [7.0]}, "attribute 'swiglu_limit' must be of type float, got list"),
    ({"router_bias": 1.0}, "attribute 'router_bias' must be of type floats, got float"),
    (
        {"moe_variant": "sparse_mixer", "top_k": 3},
        "router 'sparse_mixer' takes at most 2 experts a token, but attribute 'top_k' is 3",
    ),
    (
        {"router_bias": [0.0] * 4, "moe_variant": "softmax_topk"},
        "'router_bias' is only for router 'sigmoid_topk', but 'moe_variant' is 'softmax_topk'",
    ),
    ({"n_group": 2}, "'n_group' is only for router 'sigmoid_topk', but 'moe_variant' is 'default'"),
    ({"topk_group": 1}, "attribute 'topk_group' is only for router 'sigmoid_topk', but"),
    (
        {"routed_scaling_factor": 2.0, "moe_variant": "base_layer"},
        "'routed_scaling_factor' is only for router 'softmax_topk' or 'topk_softmax' or"
        " 'sigmoid_topk' or 'sparse_mixer', but 'moe_variant' is 'base_layer'",
    ),
    ({**SIGMOID, "router_jitter": 0.5}, "'router_jitter' is only for router 'sparse_mixer', but"),
    (
        {**SIGMOID, "router_bias": [0.0] * 3},
        "attribute 'router_bias' must have expert_count = 4 values, got 3",
    ),
    (
        {**SIGMOID, "router_bias": [0.0, math.nan, 0.0, 0.0]},
        "attribute 'router_bias' has NaN at position 1",
    ),
    ({**SIGMOID, "n_group": 0}, "attribute 'n_group' must be at least 1, got 0"),
    ({**SIGMOID, "n_group": 3}, "'n_group' is 3, which does not divide the 4 experts"),
    (
        {**SIGMOID, "n_group": 4},
        "'n_group' is 4, but a group needs at least 2 experts and there are only 4 experts",
    ),
    ({**SIGMOID, "topk_group": -1}, "attribute 'topk_group' must be at least 0, got -1"),
    (
        {**SIGMOID, "n_group": 2, "topk_group": 3},
        "attribute 'topk_group' is 3, but 'n_group' is 2",
    ),
    (
        {**SIGMOID, "n_group": 2, "topk_group": 1, "top_k": 3},
        "attribute 'top_k' is 3, but 1 of 2 groups hold only 2 experts",
    ),
    (
        {**SIGMOID, "routed_scaling_factor": math.inf},
        "attribute 'routed_scaling_factor' must be a finite number, got infinity",
    ),
    (
        {**SIGMOID, "routed_scaling_factor": 1e39},
        "attribute 'routed_scaling_factor' must be a finite number, got infinity",
    ),
    (
        {"moe_variant": "sparse_mixer", "router_jitter": -0.25},
        "attribute 'router_jitter' must be at least 0, got -0.25",
    ),
    ({"expert_bias": 2}, "attribute 'expert_bias' must be 0 to 1, got 2"),
    ({"expert_bias": 1}, "attribute 'expert_bias' is 1, but sub-layer 'T5_FF' has no biases"),
    (
        {"expert_bias": 1, "expert_sublayer_type": "Identity"},
        "attribute 'expert_bias' is 1, but sub-layer 'Identity' has no biases",
    ),
    (
        {"activation_alpha": 1.0, "expert_sublayer_type": "Gated_SiLU"},
        "'activation_alpha' is not for sub-layer 'Gated_SiLU', which does not read it",
    ),
    ({"activation_beta": 0.0}, "attribute 'activation_beta' is not for sub-layer 'T5_FF', which"),
    ({"swiglu_limit": 0.0}, "attribute 'swiglu_limit' is not for sub-layer 'T5_FF', which"),
    ({**GPT_OSS, "swiglu_limit": -1e-9}, "'swiglu_limit' must be at least 0, got -1e-09"),
    ({**GPT_OSS, "activation_alpha": math.nan}, "'activation_alpha' must be a finite number, got"),
    (
        {**GPT_OSS, "activation_beta": -math.inf},
        "attribute 'activation_beta' must be a finite number, got infinity",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda v: v if type(v) is str else "")
def test_bad_attributes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MoELayer: .*{re.escape(message)}"):
        make(**{n: v for n, v in changes.items() if v is not None} | dict.fromkeys(
            n for n, v in changes.items() if v is None
        ))  # fmt: skip


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
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
    gated = {t.name: t.shape(4, 6) for t in make(**GPT_OSS).tensors}
    assert gated == {"gate_up": (12, 4), "down": (4, 6), "gate_up_bias": (12,), "down_bias": (4,)}
    plain = make(expert_sublayer_type="ReLU_FF", expert_bias=1).tensors
    shapes = {t.name: t.shape(4, 6) for t in plain}
    assert shapes == {"up": (6, 4), "down": (4, 6), "up_bias": (6,), "down_bias": (4,)}
