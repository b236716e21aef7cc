"""``com.microsoft.MoE``: its layouts, its attributes, and what is refused.

The oracle is ONNX Runtime's own operator on the CPU where it computes the form. Where it does not
(a third weight, rows one behind the other, the sparse mixer, which it takes and ignores) it is the
same layer in a form that it computes, or transformers' module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from evaluate_graph import assert_same_outputs, run_reference, run_runtime
from models_fused import GPT_OSS, PHI, QWEN, Weights, inputs, layer
from moe_infer import InferenceSession
from moe_infer.graph.report import RewriteReport
from moe_infer.graph.rewrite import rewrite
from moe_infer.op import OP_TYPE


def _rewrite(model: onnx.ModelProto, folder: Path) -> RewriteReport:
    (folder / "in").mkdir(exist_ok=True)
    onnx.save(model, folder / "in" / "model.onnx")
    return rewrite(folder / "in" / "model.onnx", folder / "out")


def _lowered(folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = InferenceSession(folder / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, feeds)
    return output


PLAIN = {"relu": "ReLU_FF", "silu": "SiLU_FF", "gelu": "GELU_Tanh_FF"}


@pytest.mark.needs_onnxruntime_1_32
@pytest.mark.parametrize("rank", [3, 2])
@pytest.mark.parametrize(
    ("weights", "attributes", "plain", "wanted"),
    [
        (
            Weights(biases=True),
            GPT_OSS | {"swiglu_limit": 0.5},
            False,
            {
                "expert_sublayer_type": "Clamped_SwiGLU",
                "activation_alpha": 1.702,
                "activation_beta": 1.0,
                "swiglu_limit": 0.5,
                "expert_bias": 1,
                "moe_variant": "softmax_topk",
                "normalize_routing_weights": 1,
            },
        ),
        (
            Weights(biases=True, zero_biases=True),
            QWEN,
            False,
            {"expert_sublayer_type": "Gated_SiLU", "expert_bias": 1, "top_k": 2},
        ),
        (
            Weights(),
            QWEN | {"activation_beta": 0.25, "k": 3, "normalize_routing_weights": 0},
            False,
            {
                "expert_sublayer_type": "Clamped_SwiGLU",
                "swiglu_limit": 0.0,
                "activation_alpha": 1.0,
                "activation_beta": 0.25,
                "top_k": 3,
                "normalize_routing_weights": 0,
            },
        ),
        *(
            (
                Weights(biases=biases),
                {"activation_type": kind, "k": 2},
                True,
                {"expert_sublayer_type": name},
            )
            for (kind, name), biases in zip(PLAIN.items(), (True, False, True), strict=True)
        ),
        (Weights(), {}, True, {"expert_sublayer_type": "ReLU_FF", "top_k": 1}),
    ],
    ids=["gpt-oss", "qwen", "beta alone", *PLAIN, "defaults"],
)
def test_against_onnx_runtime(
    weights: Weights,
    attributes: dict[str, Any],
    plain: bool,
    wanted: dict[str, Any],
    rank: int,
    tmp_path: Path,
) -> None:
    report = _rewrite(layer(weights, attributes, plain=plain, rank=rank), tmp_path)
    assert [made.family for made in report.layers] == ["fused"], str(report)
    assert not report.near_misses
    assert not report.untyped_values
    config = report.layers[0].config
    assert {name: getattr(config, name) for name in wanted} == wanted
    made = onnx.load(tmp_path / "out" / "model.onnx")
    kinds = [n.op_type for n in made.graph.node]
    assert OP_TYPE in kinds and "MoE" not in kinds
    assert not [t.name for t in made.graph.initializer if "experts" in t.name]
    feeds = inputs(rank)
    assert_same_outputs(tmp_path / "in" / "model.onnx", tmp_path / "out" / "model.onnx", feeds)
    (expected,) = run_runtime(tmp_path / "in" / "model.onnx", feeds)
    np.testing.assert_allclose(_lowered(tmp_path, feeds), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    "attributes", [GPT_OSS | {"swiglu_limit": 0.5}, QWEN], ids=["gpt-oss", "qwen"]
)
@pytest.mark.parametrize("form", ["concatenated", "third weight"])
def test_layouts_that_the_cpu_lacks(
    form: str, attributes: dict[str, Any], biases: bool, tmp_path: Path
) -> None:
    """They are compared with the same layer in the layout that the CPU has."""
    weights = Weights(biases=biases)
    third = form == "third weight"
    other = attributes | {"swiglu_fusion": 0 if third else 2}
    report = _rewrite(layer(weights, other, third=third), tmp_path)
    assert len(report.layers) == 1, str(report)
    onnx.save(layer(weights, attributes), tmp_path / "same.onnx")
    assert_same_outputs(tmp_path / "same.onnx", tmp_path / "out" / "model.onnx", inputs())


@pytest.mark.needs_onnxruntime_1_32
def test_silu_with_a_third_weight(tmp_path: Path) -> None:
    """As transformers' exporter writes it, and two-dimensional."""
    weights, attributes = Weights(), {"activation_type": "silu", "k": 3}
    model = layer(weights, attributes, third=True, rank=2)
    report = _rewrite(model, tmp_path)
    assert report.layers[0].config.expert_sublayer_type == "Gated_SiLU"
    same = QWEN | {"k": 3, "normalize_routing_weights": 0}
    onnx.save(layer(weights, same, rank=2), tmp_path / "same.onnx")
    assert_same_outputs(tmp_path / "same.onnx", tmp_path / "out" / "model.onnx", inputs(2))


def test_geglu_is_gelu_by_tanh_of_the_gate(tmp_path: Path) -> None:
    """Compared with its definition: no CPU has it."""
    weights = Weights()
    report = _rewrite(layer(weights, {"activation_type": "geglu", "swiglu_fusion": 1}), tmp_path)
    assert report.layers[0].config.expert_sublayer_type == "Gated_GELU_Tanh"
    feeds = inputs()
    x = feeds["x"].reshape(-1, weights.d_model) * np.float32(1.5)
    logits = x @ weights.arrays["router"] + weights.arrays["router_bias"]
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    expected = feeds["x"].reshape(x.shape).copy()
    for n, e in enumerate(share.argmax(1)):
        gate, up = (weights.arrays[w][e] @ x[n] for w in ("gate", "up"))
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        expected[n] += share[n, e] * (weights.arrays["down"][e] @ (gelu * up))
    (actual,) = run_reference(tmp_path / "out" / "model.onnx", feeds)
    np.testing.assert_allclose(actual.reshape(x.shape), expected, rtol=0, atol=1e-4)


@pytest.mark.needs_torch
def test_sparse_mixer_is_phis(tmp_path: Path) -> None:
    """Compared with transformers' module: ONNX Runtime's CPU takes the attribute and ignores it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

    weights = Weights(experts=8)
    weights.arrays["router_bias"][:] = 0  # Phi's router has none
    report = _rewrite(layer(weights, PHI, third=True), tmp_path)
    config = report.layers[0].config
    assert (config.moe_variant, config.top_k, config.router_jitter) == ("sparse_mixer", 2, 0.01)
    block = PhimoeSparseMoeBlock(
        transformers.PhimoeConfig(
            hidden_size=weights.d_model,
            intermediate_size=weights.hidden,
            num_local_experts=8,
            router_jitter_noise=0.01,
            experts_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        block.router.weight.copy_(torch.from_numpy(weights.arrays["router"].T.copy()))
        block.experts.gate_up_proj.copy_(torch.from_numpy(weights.both("", 2)))
        block.experts.down_proj.copy_(torch.from_numpy(weights.arrays["down"]))
        x = torch.from_numpy(inputs()["x"])
        expected = (x + block(x * 1.5)).numpy()
    (actual,) = run_reference(tmp_path / "out" / "model.onnx", inputs())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(_lowered(tmp_path, inputs()), expected, rtol=0, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # name: (attributes, options of the graph, part of the reason)
    "identity": ({"activation_type": "identity"}, {"plain": True}, "no sub-layer of MoELayer"),
    "relu2": ({"activation_type": "relu2"}, {"plain": True}, "activation_type 'relu2'"),
    "unknown attribute": (
        QWEN | {"gate_scale": 2.0},
        {},
        "attribute 'gate_scale' does is not known",
    ),
    "attribute of another type": (QWEN | {"k": 2.0}, {}, "attribute 'k' is 2.0; needed is int"),
    "limit of the activated gate": (
        GPT_OSS | {"swiglu_limit_after_activation": 1},
        {},
        "swiglu_limit_after_activation is 1",
    ),
    "limit 0": (GPT_OSS | {"swiglu_limit": 0.0}, {}, "swiglu_limit is 0, which lets nothing"),
    "alpha without swiglu": (
        {"activation_type": "silu", "activation_alpha": 1.702},
        {"plain": True},
        "activation_alpha is 1.702, but activation_type 'silu'",
    ),
    "fusion without swiglu": (
        {"activation_type": "silu", "swiglu_fusion": 1},
        {},
        "swiglu_fusion is 1, but activation_type is 'silu'",
    ),
    "swiglu of one weight": (
        QWEN | {"swiglu_fusion": 0},
        {"plain": True},
        "without a third weight",
    ),
    "fused and a third weight": (QWEN, {"third": True}, "with a third weight"),
    "fusion 3": (QWEN | {"swiglu_fusion": 3}, {}, "swiglu_fusion 3"),
    "gelu with a third weight": (
        {"activation_type": "gelu"},
        {"third": True},
        "a third weight with activation_type 'gelu'",
    ),
    "sparse mixer of three": (PHI | {"k": 3}, {"third": True}, "use_sparse_mixer is for k 2"),
    "sparse mixer, normalised": (
        PHI | {"normalize_routing_weights": 1},
        {"third": True},
        "use_sparse_mixer is for k 2 without normalize_routing_weights",
    ),
    "more experts than there are": (QWEN | {"k": 7}, {}, "there are only 6 experts"),
    "quantised": (
        {"k": 2, "expert_weight_bits": 4},
        {"op_type": "QMoE"},
        "the experts are quantised (QMoE, 4 bits, 'int')",
    ),
}


@pytest.mark.parametrize(("attributes", "options", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(
    attributes: dict[str, Any], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    report = _rewrite(layer(Weights(), attributes, **options), tmp_path)
    _assert_refused(report, reason, tmp_path)


def _assert_refused(report: RewriteReport, reason: str, folder: Path) -> None:
    assert not report, str(report)
    (miss,) = report.near_misses
    assert reason in miss.reason
    assert miss.family == "fused"
    assert not (folder / "out").exists()


def test_weights_must_be_constants(tmp_path: Path) -> None:
    model = layer(Weights(), QWEN)
    (tensor,) = [t for t in model.graph.initializer if "gate_up" in t.name]
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    reason = "experts.gate_up_proj.weight' is an input of the graph"
    _assert_refused(_rewrite(model, tmp_path), reason, tmp_path)


def test_weights_of_the_layout_of_early_versions_are_refused(tmp_path: Path) -> None:
    """(experts, columns, rows); ONNX Runtime takes it and multiplies by something else."""
    weights = Weights()
    model = layer(weights, QWEN)
    swapped = np.ascontiguousarray(weights.both("", 1).swapaxes(1, 2))
    (tensor,) = [t for t in model.graph.initializer if "gate_up" in t.name]
    tensor.CopyFrom(numpy_helper.from_array(swapped, tensor.name))
    _assert_refused(_rewrite(model, tmp_path), "has shape (6, 16, 48); needed is", tmp_path)


def test_some_biases_are_refused(tmp_path: Path) -> None:
    model = layer(Weights(biases=True), QWEN)
    next(n for n in model.graph.node if n.op_type == "MoE").input[5] = ""
    _assert_refused(_rewrite(model, tmp_path), "only some of its weights have biases", tmp_path)


def test_logits_without_the_shape_of_the_hidden_states_are_refused(tmp_path: Path) -> None:
    model = layer(Weights(), QWEN)
    flat = next(n for n in model.graph.node if n.op_type == "Reshape")
    middle = helper.make_node("Neg", [flat.output[0]], ["logits"])
    moe = next(n for n in model.graph.node if n.op_type == "MoE")
    model.graph.node.insert(4, middle)
    moe.input[1] = "logits"
    reason = "its hidden states have 3 dimensions and its logits 2"
    _assert_refused(_rewrite(model, tmp_path), reason, tmp_path)


def test_too_few_inputs_are_refused(tmp_path: Path) -> None:
    model = layer(Weights(), QWEN)
    del next(n for n in model.graph.node if n.op_type == "MoE").input[3:]
    _assert_refused(_rewrite(model, tmp_path), "it has 3 inputs; needed are at least 5", tmp_path)


def test_two_layers_with_other_nodes_between(tmp_path: Path) -> None:
    first = layer(Weights(seed=1, biases=True), GPT_OSS)
    second = layer(Weights(seed=2, biases=True), GPT_OSS | {"k": 3})
    report = _rewrite(_chain(first, second), tmp_path)
    assert [made.config.top_k for made in report.layers] == [2, 3]
    assert_same_outputs(tmp_path / "in" / "model.onnx", tmp_path / "out" / "model.onnx", inputs())


def _chain(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    """The second model on the first one's output."""
    a = onnx.compose.add_prefix(first, "a.", rename_inputs=False)
    b = onnx.compose.add_prefix(second, "b.", rename_outputs=False)
    return onnx.compose.merge_models(a, b, [("a.y", "b.x")])
