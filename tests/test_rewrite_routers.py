"""Routers and sub-layers of recent models, on ONNX text: what must match, and what nearly does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from evaluate_graph import assert_same_outputs
from models_text import BLOCK, block, changed, tokens
from moe_infer.graph.report import RewriteReport
from moe_infer.graph.rewrite import rewrite
from moe_infer.op import OP_TYPE

ROUTER = BLOCK[BLOCK.index("  logits = MatMul") : BLOCK.index("  wide = Unsqueeze")]

EIGHT = changed(
    BLOCK,
    {
        "float[6, 4] router": "float[6, 8] router, float[8] bias",
        "float[4, 8, 6] gate, float[4, 8, 6] up, float[4, 6, 8] down": (
            "float[8, 8, 6] gate, float[8, 8, 6] up, float[8, 6, 8] down"
        ),
    },
)
"""As many experts as rows in each: sizes alone do not tell the axes apart."""

SIGMOID = changed(
    EIGHT,
    {
        ROUTER: """
  logits = MatMul (h, router)
  scores = Sigmoid (logits)
  biased = Add (scores, bias)
  best, top_i = TopK <axis = -1> (biased, k)
  top_w = GatherElements <axis = 1> (scores, top_i)
  sum = ReduceSum <keepdims = 1> (top_w, last)
  tiny = Constant <value_float = 1e-20> ()
  total = Add (sum, tiny)
  share = Div (top_w, total)
  scale = Constant <value_float = 2.5> ()
  weight = Mul (share, scale)
"""
    },
)

GROUPED = changed(
    SIGMOID,
    {
        "  best, top_i = TopK <axis = -1> (biased, k)\n": """
  by_group = Constant <value = int64[3] {-1, 4, 2}> ()
  groups = Reshape (biased, by_group)
  two = Constant <value = int64[1] {2}> ()
  pair, pair_i = TopK <axis = -1> (groups, two)
  quality = ReduceSum <keepdims = 0> (pair, last)
  kept = Constant <value = int64[1] {3}> ()
  best_groups, group_i = TopK <axis = -1, sorted = 0> (quality, kept)
  group_shape = Shape (quality)
  nothing = ConstantOfShape (group_shape)
  chosen_shape = Shape (group_i)
  ones = ConstantOfShape <value = float[1] {1.0}> (chosen_shape)
  group_mask = ScatterElements <axis = 1> (nothing, group_i, ones)
  mask3 = Unsqueeze (group_mask, last)
  spread = Constant <value = int64[3] {1, 4, 2}> ()
  mask8 = Expand (mask3, spread)
  flat = Constant <value = int64[2] {-1, 8}> ()
  mask = Reshape (mask8, flat)
  inside = Cast <to = 9> (mask)
  outside = Not (inside)
  lowest = Constant <value_float = -inf> ()
  masked = Where (outside, lowest, biased)
  best, top_i = TopK <axis = -1, sorted = 0> (masked, k)
"""
    },
)

MIXER = changed(
    EIGHT,
    {
        ROUTER: """
  logits = MatMul (h, router)
  lowest = Constant <value_float = -inf> ()
  limit = Constant <value_float = 0.2> ()
  size = Abs (logits)
  best1 = ReduceMax <keepdims = 1> (logits, last)
  i1 = ArgMax <axis = -1, keepdims = 1> (logits)
  factor1 = Max (size, best1)
  less1 = Sub (best1, logits)
  far1 = Div (less1, factor1)
  drop1 = Greater (far1, limit)
  masked1 = Where (drop1, lowest, logits)
  soft1 = Softmax <axis = -1> (masked1)
  w1 = GatherElements <axis = -1> (soft1, i1)
  shape1 = Shape (i1)
  lows = Expand (lowest, shape1)
  left = ScatterElements <axis = -1> (logits, i1, lows)
  best2 = ReduceMax <keepdims = 1> (left, last)
  i2 = ArgMax <axis = -1, keepdims = 1> (left)
  factor2 = Max (size, best2)
  less2 = Sub (best2, logits)
  far2 = Div (less2, factor2)
  drop2 = Greater (far2, limit)
  masked2 = Where (drop2, lowest, left)
  soft2 = Softmax <axis = -1> (masked2)
  w2 = GatherElements <axis = -1> (soft2, i2)
  weight = Concat <axis = -1> (w1, w2)
  top_i = Concat <axis = -1> (i1, i2)
"""
    },
)

BIASED = changed(
    EIGHT,
    {
        "float[8] bias,": "float[8, 8] gate_b, float[8, 8] up_b, float[8, 6] down_b,",
        "  g = Squeeze (g3, last)\n": """
  g2 = Squeeze (g3, last)
  gb = Gather <axis = 0> (gate_b, chosen)
  g = Add (g2, gb)
""",
        "  u = Squeeze (u3, last)\n": """
  u2 = Squeeze (u3, last)
  ub = Gather <axis = 0> (up_b, chosen)
  u = Add (u2, ub)
""",
        "  o = Squeeze (o3, last)\n": """
  o2 = Squeeze (o3, last)
  ob = Gather <axis = 0> (down_b, chosen)
  o = Add (ob, o2)
""",
    },
)

CLAMPED = changed(
    BIASED,
    {
        "  sg = Sigmoid (g)\n  act = Mul (g, sg)\n  hidden = Mul (act, u)\n": """
  top = Constant <value_float = 0.75> ()
  bottom = Constant <value_float = -0.75> ()
  alpha = Constant <value_float = 1.702> ()
  one_f = Constant <value_float = 1.0> ()
  gc = Clip (g, , top)
  uc = Clip (u, bottom, top)
  ga = Mul (gc, alpha)
  sg = Sigmoid (ga)
  act = Mul (gc, sg)
  u1 = Add (uc, one_f)
  hidden = Mul (u1, act)
"""
    },
)

MATCHING: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    # name: (text, changes, attributes of the layer)
    "sigmoid": (
        SIGMOID,
        {},
        {"moe_variant": "sigmoid_topk", "routed_scaling_factor": 2.5, "n_group": 1},
    ),
    "sigmoid, no 1e-20, no scale": (
        SIGMOID,
        {
            "total = Add (sum, tiny)": "total = Identity (sum)",
            "value_float = 2.5": "value_float = 1.0",
        },
        {"normalize_routing_weights": 1, "routed_scaling_factor": 1.0},
    ),
    "sigmoid, not normalised": (
        SIGMOID,
        {
            "  sum = ReduceSum <keepdims = 1> (top_w, last)\n": "",
            "  total = Add (sum, tiny)\n": "",
            "share = Div (top_w, total)": "share = Identity (top_w)",
        },
        {"normalize_routing_weights": 0, "routed_scaling_factor": 2.5},
    ),
    "sigmoid, no bias": (
        SIGMOID,
        {"biased = Add (scores, bias)": "biased = Identity (scores)"},
        {"router_bias": None},
    ),
    "groups": (
        GROUPED,
        {},
        {"moe_variant": "sigmoid_topk", "n_group": 4, "topk_group": 3, "top_k": 2},
    ),
    "one group": (
        GROUPED,
        {"kept = Constant <value = int64[1] {3}>": "kept = Constant <value = int64[1] {1}>"},
        {"n_group": 4, "topk_group": 1},
    ),
    "the only group": (
        GROUPED,
        {
            "{-1, 4, 2}": "{-1, 1, 8}",
            "{1, 4, 2}": "{1, 1, 8}",
            "kept = Constant <value = int64[1] {3}>": "kept = Constant <value = int64[1] {1}>",
        },
        {"moe_variant": "sigmoid_topk", "n_group": 1, "top_k": 2},
    ),
    "the only group, of which three experts are chosen": (
        GROUPED,
        {
            "{-1, 4, 2}": "{-1, 1, 8}",
            "{1, 4, 2}": "{1, 1, 8}",
            "kept = Constant <value = int64[1] {3}>": "kept = Constant <value = int64[1] {1}>",
            "  k = Constant <value = int64[1] {2}>": "  k = Constant <value = int64[1] {3}>",
            "pairs = Constant <value = int64[3] {-1, 2, 6}>": (
                "pairs = Constant <value = int64[3] {-1, 3, 6}>"
            ),
            "repeat = Constant <value = int64[3] {1, 2, 1}>": (
                "repeat = Constant <value = int64[3] {1, 3, 1}>"
            ),
        },
        {"moe_variant": "sigmoid_topk", "n_group": 1, "top_k": 3},
    ),
    "groups masked by the lowest number": (
        GROUPED,
        {"value_float = -inf": "value_float = -3.4028234663852886e38"},
        {"n_group": 4, "topk_group": 3},
    ),
    "groups masked the other way": (
        GROUPED,
        {
            "outside = Not (inside)\n": "",
            "Where (outside, lowest, biased)": "Where (inside, biased, lowest)",
        },
        {"n_group": 4, "topk_group": 3},
    ),
    "sparse mixer": (MIXER, {}, {"moe_variant": "sparse_mixer", "top_k": 2, "router_jitter": 0.1}),
    "biases": (BIASED, {}, {"expert_sublayer_type": "Gated_SiLU", "expert_bias": 1}),
    "clamped": (
        CLAMPED,
        {},
        {
            "expert_sublayer_type": "Clamped_SwiGLU",
            "expert_bias": 1,
            "activation_alpha": 1.702,
            "activation_beta": 1.0,
            "swiglu_limit": 0.75,
        },
    ),
    "clamped by Min and Max": (
        CLAMPED,
        {
            "gc = Clip (g, , top)": "gc = Min (top, g)",
            "uc = Clip (u, bottom, top)": "um = Max (u, bottom)\n  uc = Min (um, top)",
        },
        {"expert_sublayer_type": "Clamped_SwiGLU", "swiglu_limit": 0.75},
    ),
    "not clamped, with alpha": (
        CLAMPED,
        {
            "gc = Clip (g, , top)": "gc = Identity (g)",
            "uc = Clip (u, bottom, top)": "uc = Identity (u)",
        },
        {"expert_sublayer_type": "Clamped_SwiGLU", "swiglu_limit": 0.0},
    ),
}


def _rewrite(model: onnx.ModelProto, folder: Path) -> RewriteReport:
    (folder / "in").mkdir()
    onnx.save(model, folder / "in" / "model.onnx")
    return rewrite(folder / "in" / "model.onnx", folder / "out")


@pytest.mark.parametrize(("text", "changes", "wanted"), MATCHING.values(), ids=MATCHING.keys())
def test_what_matches(
    text: str, changes: dict[str, str], wanted: dict[str, Any], tmp_path: Path
) -> None:
    report = _rewrite(block(changes, text=text), tmp_path)
    assert len(report.layers) == 1, str(report)
    assert not report.near_misses, str(report)
    config = report.layers[0].config
    assert {name: getattr(config, name) for name in wanted} == wanted
    made = onnx.load(tmp_path / "out" / "model.onnx")
    left = {n.op_type for n in made.graph.node}
    assert not left & {"TopK", "ArgMax", "Gather", "Sigmoid", "ReduceSum", "Where"}, left
    assert OP_TYPE in left
    for count in (1, 0, 40):
        assert_same_outputs(
            tmp_path / "in" / "model.onnx", tmp_path / "out" / "model.onnx", tokens(count)
        )


@pytest.mark.parametrize("text", [GROUPED, MIXER, CLAMPED], ids=["groups", "mixer", "clamped"])
def test_invalid_nodes_are_left_alone(text: str, tmp_path: Path) -> None:
    """A node with too few inputs, or with attributes out of range, is no reason to fail."""
    model = block(text=text)
    for node in model.graph.node:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        del node.input[-1:]
        _rewrite_any(model, tmp_path)
        node.CopyFrom(kept)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = 99
        _rewrite_any(model, tmp_path)
        node.CopyFrom(kept)


def _rewrite_any(model: onnx.ModelProto, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rewrite(model, folder / "any")


def test_the_router_bias_is_that_of_the_graph(tmp_path: Path) -> None:
    model = block(text=GROUPED)
    report = _rewrite(model, tmp_path)
    (bias,) = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "bias"]
    np.testing.assert_array_equal(np.float32(report.layers[0].config.router_bias), bias)


DECOMPOSED = """
<ir_version: 9, opset_import: ["" : 20]>
moe (float[b, s, 6] x) => (float[b, s, 6] y)
<float[6, 4] router, float[4] router_b, float[4, 16, 6] gate_up, float[4, 16] gate_up_b,
 float[4, 6, 8] down, float[4, 6] down_b>
{
  k = Constant <value = int64[1] {2}> ()
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  last = Constant <value = int64[1] {-1}> ()
  end = Constant <value = int64[1] {9223372036854775807}> ()
  spread = Constant <value = int64[4] {1, 1, 2, 1}> ()
  top = Constant <value_float = 0.75> ()
  bottom = Constant <value_float = -0.75> ()
  alpha = Constant <value_float = 1.702> ()
  one_f = Constant <value_float = 1.0> ()
  h = Relu (x)
  h4 = Unsqueeze (h, two)
  copies = Expand (h4, spread)
  column = Unsqueeze (copies, last)
  scores = MatMul (h, router)
  logits = Add (scores, router_b)
  exact = Cast <to = 1> (logits)
  top_w, top_i = TopK <axis = -1, largest = 1, sorted = 1> (exact, k)
  back = Cast <to = 1> (top_w)
  weight = Softmax <axis = -1> (back)
  w4 = Unsqueeze (weight, last)
  w5 = Unsqueeze (w4, last)
  first = Gather <axis = 0> (gate_up, top_i)
  first_b = Gather <axis = 0> (gate_up_b, top_i)
  first_b5 = Unsqueeze (first_b, last)
  second = Gather <axis = 0> (down, top_i)
  second_b = Gather <axis = 0> (down_b, top_i)
  second_b5 = Unsqueeze (second_b, last)
  product = MatMul (first, column)
  both = Add (product, first_b5)
  g = Slice (both, zero, end, three, two)
  gc = Clip (g, , top)
  u = Slice (both, one, end, three, two)
  uc = Clip (u, bottom, top)
  ga = Mul (gc, alpha)
  sg = Sigmoid (ga)
  act = Mul (gc, sg)
  u1 = Add (uc, one_f)
  hidden = Mul (act, u1)
  out = MatMul (second, hidden)
  biased = Add (out, second_b5)
  weighted = Mul (biased, w5)
  total = ReduceSum <keepdims = 0> (weighted, two)
  moe = Squeeze (total, last)
  y = Add (moe, x)
}
"""


def test_gpt_oss_as_the_builder_takes_it_apart(tmp_path: Path) -> None:
    """onnxruntime-genai's graph where a provider lacks the fused operator: five dimensions."""
    report = _rewrite(block(text=DECOMPOSED), tmp_path)
    assert len(report.layers) == 1, str(report)
    config = report.layers[0].config
    assert config.expert_sublayer_type == "Clamped_SwiGLU"
    assert (config.moe_variant, config.expert_bias, config.swiglu_limit) == (
        "topk_softmax",
        1,
        0.75,
    )
    x = np.random.default_rng(2).standard_normal((2, 5, 6)).astype(np.float32)
    for inputs in ({"x": x}, {"x": x[:1, :1]}):
        assert_same_outputs(tmp_path / "in" / "model.onnx", tmp_path / "out" / "model.onnx", inputs)


MISSES: dict[str, tuple[str, dict[str, str], str]] = {
    # name: (text, changes, part of the reason)
    "sigmoid with another epsilon": (
        SIGMOID,
        {"value_float = 1e-20": "value_float = 1e-8"},
        "is added 1e-08, and not 1e-20",
    ),
    "weights of the biased scores": (
        SIGMOID,
        {"top_w = GatherElements <axis = 1> (scores": "top_w = GatherElements <axis = 1> (biased"},
        "not chosen by the router's logits alone",
    ),
    "chosen by scores times bias": (
        SIGMOID,
        {"biased = Add (scores, bias)": "biased = Mul (scores, bias)"},
        "known is the sigmoid of the logits plus a constant for each expert",
    ),
    "groups masked by zero": (
        GROUPED,
        {"value_float = -inf": "value_float = 0.0"},
        "it must be minus infinity",
    ),
    "groups chosen by their best expert": (
        GROUPED,
        {"two = Constant <value = int64[1] {2}>": "two = Constant <value = int64[1] {1}>"},
        "known is the sum of the 2 best scores",
    ),
    "the worst groups": (
        GROUPED,
        {"Where (outside, lowest, biased)": "Where (inside, lowest, biased)"},
        "it must be minus infinity",
    ),
    "groups of unequal meaning": (
        GROUPED,
        {
            "{1, 4, 2}": "{1, 4, 3}",
            "{-1, 8}": "{-1, 12}",
        },
        "repeated",
    ),
    "scores summed over each group": (
        GROUPED,
        {
            "pair, pair_i = TopK <axis = -1> (groups, two)": (
                "pair = ReduceSum <keepdims = 1> (groups, last)"
            ),
            "  two = Constant <value = int64[1] {2}> ()\n": "",
        },
        "known is the sum of the 2 best scores",
    ),
    "sparse mixer with two thresholds": (
        MIXER,
        {
            "drop2 = Greater (far2, limit)": (
                "limit2 = Constant <value_float = 0.3> ()\n  drop2 = Greater (far2, limit2)"
            )
        },
        "known is Phi's sparse mixer",
    ),
    "sparse mixer without a mask": (
        MIXER,
        {"soft2 = Softmax <axis = -1> (masked2)": "soft2 = Softmax <axis = -1> (left)"},
        "differs from Phi's sparse mixer",
    ),
    "sparse mixer that takes one expert twice": (
        MIXER,
        {
            "keepdims = 1> (left)\n  factor2": "keepdims = 1> (logits)\n  factor2",
        },
        "sparse mixer",
    ),
    "one bias is missing": (
        BIASED,
        {
            "  ub = Gather <axis = 0> (up_b, chosen)\n": "",
            "u = Add (u2, ub)": "u = Identity (u2)",
            "float[8, 8] up_b, ": "",
        },
        "only some of the experts' projections have biases",
    ),
    "bias of another expert": (
        BIASED,
        {
            "ub = Gather <axis = 0> (up_b, chosen)": (
                "w0, i0 = TopK <axis = -1> (h, k)\n  other = Reshape (i0, last)\n"
                "  ub = Gather <axis = 0> (up_b, other)"
            )
        },
        "",
    ),
    "limits that differ": (
        CLAMPED,
        {
            "uc = Clip (u, bottom, top)": (
                "more = Constant <value_float = 0.8> ()\n  uc = Clip (u, bottom, more)"
            )
        },
        "the activation between the projections is not known",
    ),
    "clamped far outside": (
        BLOCK,
        {
            "  sg = Sigmoid (g)\n": (
                "  far = Constant <value_float = 20.0> ()\n  gc = Clip (g, , far)\n"
                "  sg = Sigmoid (gc)\n"
            ),
            "act = Mul (g, sg)": "act = Mul (gc, sg)",
        },
        "the activation between the projections is not known",
    ),
    "clamped gate alone": (
        CLAMPED,
        {"uc = Clip (u, bottom, top)": "uc = Identity (u)"},
        "the activation between the projections is not known",
    ),
    "bounds that are not constant": (
        CLAMPED,
        {"top = Constant <value_float = 0.75> ()": "top = ReduceMax <keepdims = 0> (x)"},
        "not constant",
    ),
    "bias added after the activation": (
        BIASED,
        {
            "g = Add (g2, gb)": "g = Identity (g2)",
            "sg = Sigmoid (g)": "sp = Sigmoid (g)\n  sg = Add (sp, gb)",
        },
        "",
    ),
}


@pytest.mark.parametrize(("text", "changes", "reason"), MISSES.values(), ids=MISSES.keys())
def test_near_misses_are_left_alone_and_explained(
    text: str, changes: dict[str, str], reason: str, tmp_path: Path
) -> None:
    report = _rewrite(block(changes, text=text), tmp_path)
    assert not report, str(report)
    assert report.near_misses, str(report)
    assert any(reason in miss.reason for miss in report.near_misses), str(report)
    assert not (tmp_path / "out").exists()
