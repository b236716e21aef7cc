"""Lowering against the float64 reference on ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from layer_models import (
    FORMATS,
    NUMPY,
    assert_close,
    config_of,
    layer_attributes,
    layer_model,
    make_parts,
    write_experts,
    write_layer,
)
from moe_infer import reference
from moe_infer.graph.lower import FOLDER_KEY, lower
from moe_infer.op import ROUTERS, SUBLAYERS
from moe_infer.weights import open_expert_weights

D_MODEL, HIDDEN, EXPERTS = 24, 40, 6
CPU = ["CPUExecutionProvider"]


def run_model(
    model: onnx.ModelProto, feeds: dict[str, Any], level: str = "ORT_ENABLE_ALL"
) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    folder = {p.key: p.value for p in model.metadata_props}.get(FOLDER_KEY)
    if folder:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    return ort.InferenceSession(model.SerializeToString(), options, CPU).run(None, feeds)[0]


def separated_scores(rng: np.random.Generator, tokens: int, experts: int) -> np.ndarray[Any, Any]:
    """Scores of unit variance, no two of a token closer than what a 16-bit type can tell apart."""
    ranks = np.argsort(rng.random((tokens, experts)), axis=1)
    return ((ranks - (experts - 1) / 2) * (2 / experts)).astype(np.float32)


def case(
    tmp_path: Path,
    sublayer: str = "Gated_SiLU",
    router: str = "softmax_topk",
    form: str = "safetensors stacked",
    dtype: str = "float32",
    weights: str = "float32",
    top_k: int | None = None,
    centroids: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return write_layer(
        tmp_path / "experts",
        sublayer,
        router,
        EXPERTS,
        D_MODEL,
        HIDDEN,
        top_k=top_k,
        form=form,
        dtype=weights,
        centroids=centroids,
        **more,
    )


def check(
    attributes: dict[str, Any],
    dtype: str,
    shape: tuple[int, ...],
    logits_dtype: str = "float32",
    logits: np.ndarray[Any, Any] | None = None,
    x: np.ndarray[Any, Any] | None = None,
    model: onnx.ModelProto | None = None,
) -> np.ndarray[Any, Any]:
    """Runs the lowered layer and compares it with the reference."""
    rng = np.random.default_rng(3)
    config = config_of(attributes)
    tokens = int(np.prod(shape))
    if x is None:
        x = rng.standard_normal((*shape, D_MODEL)).astype(NUMPY[dtype])
    feeds = {"x": x.astype(np.float32) if dtype == "bfloat16" else x}
    if config.expert_centroids is None:
        if logits is None:
            logits = separated_scores(rng, tokens, EXPERTS)
        logits = logits.reshape(*shape, EXPERTS).astype(NUMPY[logits_dtype])
        feeds["logits"] = logits.astype(np.float32) if logits_dtype == "bfloat16" else logits
    if model is None:
        model = lower(layer_model([attributes], D_MODEL, dtype, len(shape) + 1, logits_dtype))
    found = run_model(model, feeds)
    expected = reference.moe_layer(x, config, open_expert_weights(config, D_MODEL), logits)
    assert_close(found, expected, dtype)
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU"])
def test_matches_the_reference(
    tmp_path: Path, sublayer: str, router: str, dtype: str, form: str
) -> None:
    centroids = router == "cpm_2"
    attributes = case(tmp_path, sublayer, router, form, dtype, dtype, centroids=centroids)
    check(attributes, dtype, (2, 9))


@pytest.mark.parametrize("form", ["npz deflated", "safetensors separate", "safetensors stacked"])
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("sublayer", [n for n in SUBLAYERS if n not in ("T5_FF", "Identity")])
def test_sublayers_match_the_reference(
    tmp_path: Path, sublayer: str, bias: int, dtype: str, form: str
) -> None:
    check(case(tmp_path, sublayer, form=form, weights=dtype, expert_bias=bias), dtype, (2, 9))


@pytest.mark.parametrize("form", ["npz stored", "safetensors stacked"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"swiglu_limit": 0.0},
        {"swiglu_limit": 0.25},
        {"activation_alpha": 0.5, "activation_beta": -2.0, "swiglu_limit": 1.5},
    ],
    ids=str,
)
def test_parameters_of_the_activation(
    tmp_path: Path, parameters: dict[str, float], form: str
) -> None:
    attributes = case(tmp_path, "Clamped_SwiGLU", form=form, expert_bias=1, **parameters)
    check(attributes, "float32", (30,))


GROUPS = [
    {"n_group": 3, "topk_group": 1, "top_k": 2},
    {"n_group": 2, "topk_group": 1, "top_k": 3},
    {"n_group": 3, "topk_group": 2, "top_k": 3, "normalize_routing_weights": 1},
    {"n_group": 3, "topk_group": 2, "top_k": 2, "router_bias": [0.0] * EXPERTS},
    {"n_group": 3, "top_k": 4, "routed_scaling_factor": 2.5},
]


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups_of_experts(tmp_path: Path, groups: dict[str, Any], form: str) -> None:
    attributes = case(tmp_path, router="sigmoid_topk", form=form, **groups)
    check(attributes, "float32", (60,))
    check(attributes, "float32", (0, 3))
    # Nearly all scores and sums of scores are equal to others.
    tied = np.random.default_rng(5).integers(0, 2, (200, EXPERTS)).astype(np.float32)
    check({**attributes, "router_bias": [0.0] * EXPERTS}, "float32", (200,), logits=tied)
    tied[7, 2] = np.nan
    found = check(attributes, "float32", (200,), logits=tied)
    assert np.isnan(found).all(axis=-1).nonzero()[0].tolist() == [7]


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_topk", "sparse_mixer"])
def test_scaled_weights(tmp_path: Path, router: str, form: str) -> None:
    attributes = case(tmp_path, router=router, form=form, routed_scaling_factor=-1.5)
    check(attributes, "float32", (20,))


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
def test_low_scores_keep_their_ratio(tmp_path: Path, form: str) -> None:
    """Sigmoids of -30 are of no weight, but divided by their sum they are."""
    logits = separated_scores(np.random.default_rng(1), 12, EXPERTS) - 30
    attributes = case(tmp_path, router="sigmoid_topk", form=form, normalize_routing_weights=1)
    check({**attributes, "router_bias": [0.0] * EXPERTS}, "float32", (12,), logits=logits)


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
def test_sparse_mixer_leaves_out_what_is_far(tmp_path: Path, form: str, jitter: float) -> None:
    attributes = case(tmp_path, router="sparse_mixer", form=form, router_jitter=jitter)
    rng = np.random.default_rng(9)
    for offset in (-3.0, 0.0, 3.0):
        logits = (rng.standard_normal((50, EXPERTS)) + offset).astype(np.float32)
        check(attributes, "float32", (50,), logits=logits)


def count_nodes(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("weights", NUMPY)
@pytest.mark.parametrize("dtype", NUMPY)
def test_weights_of_another_type_than_the_graph(
    tmp_path: Path, dtype: str, weights: str, form: str
) -> None:
    check(case(tmp_path, form=form, dtype=dtype, weights=weights), dtype, (11,))


SHAPES = [(0,), (1,), (2,), (7,), (128,), (2, 0), (0, 3), (1, 1), (3, 5), (2, 64)]


@pytest.mark.parametrize("form", ["safetensors stacked", "safetensors separate"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU", "Identity"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(
    tmp_path: Path, sublayer: str, router: str, form: str, shape: tuple[int, ...]
) -> None:
    centroids = router == "cpm_2"
    found = check(case(tmp_path, sublayer, router, form, centroids=centroids), "float32", shape)
    assert found.shape == (*shape, D_MODEL)


@pytest.mark.parametrize("form", ["safetensors stacked", "safetensors separate"])
@pytest.mark.parametrize("sublayer", ["Clamped_SwiGLU", "GELU_FF", "ReLU_FF"])
@pytest.mark.parametrize("shape", [(0,), (1,), (128,), (2, 0), (3, 5)], ids=str)
def test_shapes_with_biases(
    tmp_path: Path, sublayer: str, form: str, shape: tuple[int, ...]
) -> None:
    found = check(case(tmp_path, sublayer, form=form, expert_bias=1), "float32", shape)
    assert found.shape == (*shape, D_MODEL)


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "cpm_2"])
def test_centroids_score_as_the_reference_does(tmp_path: Path, router: str) -> None:
    check(case(tmp_path, "T5_FF", router, centroids=True), "float32", (50,))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_router_logits_of_the_graphs_type(tmp_path: Path, dtype: str) -> None:
    check(case(tmp_path, weights=dtype), dtype, (2, 8), logits_dtype=dtype)


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2, 5, 6])
@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_topk", "sparse_mixer"])
def test_top_k(tmp_path: Path, router: str, top_k: int, normalize: int, form: str) -> None:
    top_k = min(top_k, ROUTERS[router].most_experts or top_k)
    attributes = case(
        tmp_path, router=router, form=form, top_k=top_k, normalize_routing_weights=normalize
    )
    check(attributes, "float32", (40,))


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "cpm_2"])
def test_ties_go_to_the_lower_index(tmp_path: Path, router: str, form: str) -> None:
    """Few different scores, so nearly every token has equal ones; both ways of running experts."""
    logits = np.random.default_rng(5).integers(0, 2, (200, EXPERTS)).astype(np.float32)
    assert (np.sort(logits, axis=1)[:, -2] == np.sort(logits, axis=1)[:, -3]).any()
    check(case(tmp_path, router=router, form=form), "float32", (200,), logits=logits)


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "cpm_2"])
def test_all_tokens_to_one_expert(tmp_path: Path, router: str, form: str) -> None:
    logits = np.zeros((64, EXPERTS), np.float32)
    logits[:, 4] = 9
    check(case(tmp_path, router=router, form=form), "float32", (64,), logits=logits)


@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU", "Identity"])
@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "cpm_2"])
def test_nan_scores_give_nan_for_that_token_alone(
    tmp_path: Path, router: str, form: str, sublayer: str
) -> None:
    logits = separated_scores(np.random.default_rng(1), 12, EXPERTS)
    logits[3, 5] = np.nan
    logits[7] = np.nan
    found = check(case(tmp_path, sublayer, router, form), "float32", (12,), logits=logits)
    assert np.isnan(found).all(axis=-1).nonzero()[0].tolist() == [3, 7]


@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "cpm_2"])
def test_infinite_scores(tmp_path: Path, router: str, form: str) -> None:
    logits = separated_scores(np.random.default_rng(1), 12, EXPERTS)
    logits[1, :4] = -np.inf
    logits[2] = -np.inf
    logits[3, 2] = np.inf
    check(case(tmp_path, router=router, form=form), "float32", (12,), logits=logits)


@pytest.mark.parametrize("experts", [1, 2, 20, 128])
@pytest.mark.parametrize("form", ["safetensors stacked", "npz stored"])
def test_numbers_of_experts(tmp_path: Path, experts: int, form: str) -> None:
    parts = make_parts("Gated_SiLU", experts, 8, 16, "float32")
    path = write_experts(tmp_path / "experts", parts, "Gated_SiLU", experts, form)
    top_k = min(experts, 8)
    attributes = layer_attributes(
        "Gated_SiLU", "softmax_topk", experts, 8, 16, top_k, path, centroids=False
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((33, 8)).astype(np.float32)
    logits = separated_scores(rng, 33, experts)
    model = lower(layer_model([attributes], 8, rank=2))
    config = config_of(attributes)
    expected = reference.moe_layer(x, config, open_expert_weights(config, 8), logits)
    assert_close(run_model(model, {"x": x, "logits": logits}), expected, "float32")


@pytest.mark.parametrize("opset", [14, 17, 18, 21])
@pytest.mark.parametrize(
    ("sublayer", "router", "more"),
    [(name, "base_layer", {}) for name in SUBLAYERS]
    + [
        ("ReLU_FF", "sigmoid_topk", {"n_group": 3, "topk_group": 1, "expert_bias": 1}),
        ("Clamped_SwiGLU", "sparse_mixer", {"expert_bias": 1}),
    ],
)
def test_opsets(
    tmp_path: Path, sublayer: str, router: str, more: dict[str, Any], opset: int
) -> None:
    attributes = case(tmp_path, sublayer, router, form="safetensors separate", **more)
    model = lower(layer_model([attributes], D_MODEL, opset=opset))
    onnx.checker.check_model(model_without_external(model))
    check(attributes, "float32", (2, 3), model=model)


def model_without_external(model: onnx.ModelProto) -> onnx.ModelProto:
    """For the checker, which looks for external files beside the working directory."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for tensor in copied.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
            size = int(np.prod(tensor.dims))
            tensor.raw_data = bytes(size * (4 if tensor.data_type == 1 else 2))
    return copied


def test_an_opset_that_is_too_old_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opset is 13; lowering needs 14 or newer"):
        lower(layer_model([case(tmp_path)], D_MODEL, opset=13))


def test_an_unknown_provider_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'TensorrtExecutionProvider'"):
        lower(layer_model([case(tmp_path)], D_MODEL), provider="TensorrtExecutionProvider")


def test_the_given_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = layer_model([case(tmp_path)], D_MODEL)
    before = model.SerializeToString()
    lowered = lower(model)
    assert model.SerializeToString() == before
    assert count_nodes(lowered, "MoELayer") == 0
    assert all(opset.domain != "trt.plugins" for opset in lowered.opset_import)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"router": "base_layer"}, True),
        ({"sublayer": "T5_FF"}, False),
        ({"weights": "float16"}, False),
        ({"form": "safetensors separate"}, False),
        ({"router": "sigmoid_topk"}, True),
        ({"router": "sparse_mixer"}, True),
        ({"sublayer": "Clamped_SwiGLU", "expert_bias": 1}, True),
        ({"sublayer": "ReLU_FF", "expert_bias": 1}, True),
        ({"sublayer": "SiLU_FF"}, True),
        ({"sublayer": "GELU_Tanh_FF"}, True),
        ({"sublayer": "GELU_FF"}, False),
        ({"sublayer": "Gated_GELU"}, False),
        ({"sublayer": "Gated_GELU_Tanh"}, False),
        ({"sublayer": "Gated_ReLU"}, False),
    ],
    ids=str,
)
def test_where_the_fused_operator_is_taken(
    tmp_path: Path, change: dict[str, Any], fused: bool
) -> None:
    model = lower(layer_model([case(tmp_path, **change)], D_MODEL))
    assert count_nodes(model, "MoE") == int(fused)
    assert count_nodes(model, "If") == (0 if fused else EXPERTS)


@pytest.mark.parametrize(
    ("dtype", "weights", "logits_dtype", "fused"),
    [
        ("float16", "float16", "float16", True),
        ("bfloat16", "bfloat16", "bfloat16", True),
        ("float16", "float16", "float32", True),
        ("float16", "bfloat16", "float16", False),
        ("float32", "float32", "float32", False),
    ],
)
def test_where_the_fused_operator_is_taken_on_cuda(
    tmp_path: Path, dtype: str, weights: str, logits_dtype: str, fused: bool
) -> None:
    single = case(tmp_path, router="default", weights=weights)
    model = layer_model([single], D_MODEL, dtype, logits_dtype=logits_dtype)
    assert count_nodes(lower(model, provider="CUDAExecutionProvider"), "MoE") == int(fused)
    soft = case(tmp_path, weights=weights)
    model = layer_model([soft], D_MODEL, dtype, logits_dtype=logits_dtype)
    # A softmax of scores that were rounded to 16 bits would be another one.
    assert count_nodes(lower(model, provider="CUDAExecutionProvider"), "MoE") == int(
        fused and logits_dtype == dtype
    )


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({"sublayer": "Clamped_SwiGLU", "expert_bias": 1}, True),
        ({"sublayer": "ReLU_FF"}, True),
        ({"sublayer": "GELU_Tanh_FF"}, False),
        ({"router": "sigmoid_topk"}, False),
        ({"router": "sigmoid_topk", "top_k": 1}, True),
        ({"router": "sparse_mixer"}, False),
    ],
    ids=str,
)
def test_what_cuda_has(tmp_path: Path, change: dict[str, Any], fused: bool) -> None:
    attributes = case(tmp_path, weights="float16", **change)
    model = layer_model([attributes], D_MODEL, "float16", logits_dtype="float16")
    assert count_nodes(lower(model, provider="CUDAExecutionProvider"), "MoE") == int(fused)


@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_only_chosen_experts_run(tmp_path: Path, weights: str) -> None:
    """ONNX Runtime's profile names the nodes that ran."""
    attributes = case(tmp_path, form="safetensors separate", weights=weights, top_k=2)
    lowered = lower(layer_model([attributes], D_MODEL, rank=2))
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    session = ort.InferenceSession(lowered.SerializeToString(), options, CPU)
    logits = np.zeros((5, EXPERTS), np.float32)
    logits[:, 1] = 3
    logits[:4, 4] = 2
    logits[4, 2] = 2
    session.run(None, {"x": np.ones((5, D_MODEL), np.float32), "logits": logits})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["name"] for e in events if e.get("args", {}).get("op_name") == "Gemm"]
    experts = {name.split("/expert_")[1].split("/")[0] for name in ran}
    assert experts == {"1", "2", "4"}
    assert len(ran) == 3 * len(experts)


def external_locations(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


@pytest.mark.parametrize("form", ["npz stored", "safetensors separate", "safetensors stacked"])
@pytest.mark.parametrize("inside", [True, False])
def test_no_second_copy_on_disk(tmp_path: Path, form: str, inside: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    attributes = case(source, "T5_FF", "default", form)
    weights = Path(attributes["expert_weight_file"])
    out = (source if inside else tmp_path / "out") / "lowered.onnx"
    lowered = lower(layer_model([attributes], D_MODEL), out)
    (location,) = external_locations(lowered)
    assert (out.parent / location).samefile(weights)
    blocks = {p.stat().st_ino: p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
    assert sum(blocks.values()) == weights.stat().st_size + out.stat().st_size
    assert not any(t.raw_data and len(t.raw_data) > 4096 for t in lowered.graph.initializer)
    # A plain session of ONNX Runtime takes the written model.
    x = np.random.default_rng(0).standard_normal((2, 3, D_MODEL)).astype(np.float32)
    logits = separated_scores(np.random.default_rng(1), 6, EXPERTS).reshape(2, 3, EXPERTS)
    found = ort.InferenceSession(out, providers=CPU).run(None, {"x": x, "logits": logits})[0]
    config = config_of(attributes)
    expected = reference.moe_layer(x, config, open_expert_weights(config), logits)
    assert_close(found, expected, "float32")


def test_deflated_experts_are_written_beside_the_model(tmp_path: Path) -> None:
    attributes = case(tmp_path, form="npz deflated", weights="bfloat16")
    out = tmp_path / "out" / "lowered.onnx"
    lowered = lower(layer_model([attributes], D_MODEL, rank=2), out)
    assert external_locations(lowered) == {"lowered.experts.safetensors"}
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "lowered.experts.safetensors",
        "lowered.onnx",
    ]
    x = np.ones((4, D_MODEL), np.float32)
    logits = separated_scores(np.random.default_rng(1), 4, EXPERTS)
    found = ort.InferenceSession(out, providers=CPU).run(None, {"x": x, "logits": logits})[0]
    config = config_of(attributes)
    expected = reference.moe_layer(x, config, open_expert_weights(config), logits)
    assert_close(found, expected, "float32")


def test_a_link_never_takes_the_place_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    attributes = case(tmp_path / "source")
    out = tmp_path / "out" / "m.onnx"
    out.parent.mkdir()
    (out.parent / "m.experts.safetensors").write_text("of somebody else")
    lowered = lower(layer_model([attributes], D_MODEL), out)
    assert external_locations(lowered) == {"m.1.experts.safetensors"}
    assert (out.parent / "m.experts.safetensors").read_text() == "of somebody else"
    assert external_locations(lower(layer_model([attributes], D_MODEL), out)) == {
        "m.1.experts.safetensors"
    }


def test_two_layers_and_other_external_data(tmp_path: Path) -> None:
    """The model's own external data keeps its file, beside that of the experts."""
    parts = make_parts("T5_FF", EXPERTS, D_MODEL, HIDDEN, "float32")
    both = {f"{prefix}{name}": a for prefix in ("a/", "b/") for name, a in parts.items()}
    (tmp_path / "w").mkdir()
    path = write_experts(tmp_path / "w" / "experts", both, "T5_FF", EXPERTS, "npz stored")
    layers = [
        layer_attributes(
            "T5_FF",
            "default",
            EXPERTS,
            D_MODEL,
            HIDDEN,
            1,
            path.name,
            centroids=i == 1,
            expert_weight_prefix=prefix,
        )
        for i, prefix in enumerate(("a/", "b/"))
    ]
    for layer in layers:
        layer["expert_weight_file"] = f"w/{path.name}"
    model = layer_model(layers, D_MODEL, rank=2)
    model.graph.node[-1].input[0] = "scaled"
    scale = np.linspace(1, 2, D_MODEL, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "scale"))
    model.graph.node.insert(-1, onnx.helper.make_node("Mul", ["h2", "scale"], ["scaled"]))
    (tmp_path / "m").mkdir()
    saved = tmp_path / "model.onnx"
    onnx.save(model, saved, save_as_external_data=True, location="own.data", size_threshold=0)
    lowered = lower(saved)
    assert external_locations(lowered) == {"own.data", f"w/{path.name}"}
    rng = np.random.default_rng(4)
    x = rng.standard_normal((9, D_MODEL)).astype(np.float32)
    logits = separated_scores(rng, 9, EXPERTS)
    first, second = (config_of({**a, "expert_weight_file": str(path)}) for a in layers)
    middle = reference.moe_layer(x, first, open_expert_weights(first), logits)
    expected = reference.moe_layer(middle, second, open_expert_weights(second)) * scale
    assert_close(run_model(lowered, {"x": x, "logits": logits}), expected, "float32")


def test_external_data_outside_the_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_bytes(bytes(4 * D_MODEL))
    model = layer_model([case(tmp_path)], D_MODEL)
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[D_MODEL])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    model.graph.initializer.append(tensor)
    path = tmp_path / "m" / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="outside the model's folder"):
        lower(path)


def test_a_layer_in_a_subgraph_is_refused_and_one_in_a_function_is_taken(tmp_path: Path) -> None:
    model = layer_model([case(tmp_path, form="npz stored")], D_MODEL, rank=2)
    branch = onnx.helper.make_graph(
        [model.graph.node[1]], "b", [], [onnx.helper.make_tensor_value_info("h1", 1, None)]
    )
    condition = onnx.numpy_helper.from_array(np.array(True), "yes")
    model.graph.initializer.append(condition)
    node = onnx.helper.make_node(
        "If", ["yes"], ["h1"], "choice", then_branch=branch, else_branch=branch
    )
    model.graph.node[1].CopyFrom(node)
    with pytest.raises(ValueError, match=r"'choice' .* must be in the main graph"):
        lower(model)

    model = layer_model([case(tmp_path, form="npz stored")], D_MODEL, rank=2)
    inner = model.graph.node[1]
    function = onnx.helper.make_function(
        "local", "Block", ["h0", "logits"], ["h1"], [inner], list(model.opset_import)
    )
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    call = onnx.helper.make_node("Block", ["h0", "logits"], ["h1"], domain="local")
    model.graph.node[1].CopyFrom(call)
    check(case(tmp_path, form="npz stored"), "float32", (6,), model=lower(model))


def test_a_bfloat16_graph_runs_on_the_cpu(tmp_path: Path) -> None:
    """Nodes around the layer that the CPU provider has no bfloat16 for."""
    attributes = case(tmp_path, weights="bfloat16")
    model = layer_model([attributes], D_MODEL, "bfloat16", rank=2)
    model.graph.node[-1].input[0] = "t"
    leave = model.graph.node.pop()
    model.graph.node.append(onnx.helper.make_node("Tanh", ["h1"], ["s"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["s", "s"], ["t"]))
    model.graph.node.append(leave)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((9, D_MODEL)).astype(NUMPY["bfloat16"])
    logits = separated_scores(rng, 9, EXPERTS)
    found = run_model(lower(model), {"x": x.astype(np.float32), "logits": logits})
    config = config_of(attributes)
    layer = reference.moe_layer(x, config, open_expert_weights(config), logits)
    assert_close(found, 2 * np.tanh(layer), "bfloat16")


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"])
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU", "Identity"])
def test_levels_of_optimization(tmp_path: Path, sublayer: str, dtype: str, level: str) -> None:
    """Two layers, so that one's input is an intermediate value that nothing else reads."""
    attributes = case(tmp_path, sublayer, dtype=dtype)
    config, weights = config_of(attributes), None
    if config.tensors:
        weights = open_expert_weights(config, D_MODEL)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, D_MODEL)).astype(NUMPY[dtype])
    scores = separated_scores(rng, 9, EXPERTS)
    expected = x
    for _ in range(2):
        expected = reference.moe_layer(expected, config, weights or {}, scores)
        expected = expected.astype(NUMPY[dtype])
    model = lower(layer_model([attributes] * 2, D_MODEL, dtype, 2))
    feeds = {i.name: scores for i in model.graph.input}
    feeds["x"] = x.astype(np.float32) if dtype == "bfloat16" else x
    assert_close(run_model(model, feeds, level), expected, dtype)
