"""The general replacement between given tensors, on graphs in ONNX text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from evaluate_graph import assert_same_outputs, run_reference, run_runtime
from models_text import block, tokens
from moe_infer.graph.layer_checks import ReplaceError
from moe_infer.graph.replace import attribute_digest, replace_with_moe_layer
from moe_infer.graph.rewrite import rewrite
from moe_infer.op import DOMAIN, OP_TYPE, LayerConfig


def _config(**changes: object) -> LayerConfig:
    attributes: dict[str, object] = {
        "expert_count": 4,
        "hidden_size": 8,
        "expert_sublayer_type": "Gated_SiLU",
        "expert_weight_file": "experts.safetensors",
        "expert_weight_prefix": "layers.0.",
        "top_k": 2,
        "moe_variant": "softmax_topk",
        "normalize_routing_weights": 1,
    }
    return LayerConfig.from_attributes({**attributes, **changes})


BETWEEN = {"hidden_states": "h", "output": "moe", "router_logits": "logits"}


def test_the_block_goes_and_everything_else_stays() -> None:
    model = block()
    model.metadata_props.add(key="author", value="somebody")
    for node in model.graph.node:
        node.name = f"n_{node.output[0]}"
    before = {n.name: n.SerializeToString() for n in model.graph.node}
    done = replace_with_moe_layer(model, **BETWEEN, config=_config(), name="layer")
    # The constants that only the block used go with it.
    assert [n.output[0] for n in model.graph.node] == ["h", "logits", done.output, "y"]
    for node in model.graph.node:
        if node.output[0] in ("h", "logits"):
            assert node.SerializeToString() == before[node.name]
    assert list(model.graph.node[-1].input) == [done.output, "x"]
    assert {t.name for t in model.graph.initializer} == {"router"}
    assert set(done.removed_constants) >= {"gate", "up", "down", "pairs"}
    assert len(done.removed_nodes) == len(before) - 3
    assert model.metadata_props[0].value == "somebody"
    moe = model.graph.node[2]
    assert (moe.name, moe.op_type, moe.domain) == ("layer", OP_TYPE, DOMAIN)
    assert list(moe.input) == ["h", "logits"]
    given = {a.name: helper.get_attribute_value(a) for a in moe.attribute}
    assert LayerConfig.from_attributes(given) == _config()
    assert done.output == f"moe.moe_{attribute_digest(_config())}"
    info = next(v for v in model.graph.value_info if v.name == done.output)
    assert info.type.tensor_type.elem_type == TensorProto.FLOAT
    assert [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim] == ["n", 6]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20), (DOMAIN, 1)]


def test_a_graph_output_keeps_its_name(tmp_path: Path) -> None:
    model = block({"=> (float[n, 6] y)": "=> (float[n, 6] y, float[n, 6] moe)"})
    onnx.save(model, tmp_path / "original.onnx")
    report = rewrite(tmp_path / "original.onnx", tmp_path / "out")
    assert len(report.layers) == 1
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert [o.name for o in made.graph.output] == ["y", "moe"]
    assert_same_outputs(tmp_path / "original.onnx", tmp_path / "out" / "model.onnx", tokens(4))


def test_every_attribute_changes_the_output_name() -> None:
    configs = [
        _config(),
        _config(max_concurrency=3),
        _config(top_k=1),
        _config(expert_weight_digest="00000000-1"),
        _config(expert_weight_prefix="layers.1."),
        _config(normalize_routing_weights=0),
        _config(moe_variant="topk_softmax"),
    ]
    assert len({attribute_digest(c) for c in configs}) == len(configs)


def test_an_outer_value_read_in_a_subgraph_counts_as_use() -> None:
    model = block()
    then = helper.make_graph(
        [helper.make_node("Identity", ["hidden"], ["then_out"])],
        "then",
        [],
        [helper.make_tensor_value_info("then_out", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["else_out"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)],
    )
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    node = helper.make_node("If", ["flag"], ["z"], "choose", then_branch=then, else_branch=other)
    model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    with pytest.raises(ReplaceError, match=r"its output 'hidden'.*is also used by 'choose' \(If"):
        replace_with_moe_layer(model, **BETWEEN, config=_config())


def test_the_output_read_in_a_subgraph_is_renamed(tmp_path: Path) -> None:
    model = block()
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["moe"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, ["n", 6])],
        )
        for op in ("Neg", "Abs")
    ]
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    node = helper.make_node(
        "If", ["flag"], ["z"], "choose", then_branch=branches[0], else_branch=branches[1]
    )
    model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 6]))
    onnx.save(model, tmp_path / "original.onnx")
    assert len(rewrite(tmp_path / "original.onnx", tmp_path / "out").layers) == 1
    for flag in (True, False):
        inputs = {**tokens(3), "flag": np.array(flag)}
        assert_same_outputs(tmp_path / "original.onnx", tmp_path / "out" / "model.onnx", inputs)


REFUSED: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    # name: (changes of the block, changes of the tensors, the message)
    "inner value used elsewhere": (
        {"y = Add (moe, x)": "extra = Exp (hidden)\n  y = Add (moe, x)"},
        {},
        r"Mul -> hidden: its output 'hidden', inside the layer, is also used by Exp -> extra",
    ),
    "inner value an output": (
        {"=> (float[n, 6] y)": "=> (float[n, 6] y, int64[n, 2] top_i)"},
        {},
        "TopK -> top_w: its output 'top_i', inside the layer, is an output of the graph",
    ),
    "weight shared": (
        {"y = Add (moe, x)": "extra = Exp (down)\n  y = Add (moe, x)"},
        {},
        "Exp -> extra: reads 'down', which is shared with the layer",
    ),
    "weight shared through a transpose": (
        {
            "g3 = MatMul (gates, xc)": (
                "turned = Transpose <perm = [0, 2, 1]> (square)\n"
                "  more = Gather <axis = 0> (turned, chosen)\n"
                "  wider = MatMul (gates, more)\n  extra = Exp (turned)\n  g3 = MatMul (wider, xc)"
            ),
            "float[4, 8, 6] gate": "float[4, 6, 6] square, float[4, 8, 6] gate",
        },
        {},
        "Exp -> extra: reads 'square', which is shared with the layer, through Transpose -> turned",
    ),
    "weight an input": (
        {
            "moe (float[n, 6] x)": "moe (float[n, 6] x, float[4, 8, 6] gate)",
            "float[4, 8, 6] gate,": "",
        },
        {},
        "Gather -> gates: reads 'gate', which is an input of the graph: weights must be constants",
    ),
    "weight an input with an initial value": (
        {"moe (float[n, 6] x)": "moe (float[n, 6] x, float[4, 8, 6] gate)"},
        {},
        "Gather -> gates: reads 'gate', which is an input of the graph, though it has an initial",
    ),
    "weight computed from an input": (
        {
            "moe (float[n, 6] x)": "moe (float[n, 6] x, float scale)",
            "gates = Gather <axis = 0> (gate, chosen)": (
                "scaled = Mul (gate, scale)\n  gates = Gather <axis = 0> (scaled, chosen)"
            ),
        },
        {},
        "Mul -> scaled: reads 'scale', which is an input of the graph",
    ),
    "another input": ({}, {"hidden_states": "logits"}, "reads 'x', which is an input of the graph"),
    "not computed from it": ({}, {"output": "h"}, "not computed from|input of the graph"),
    "no such tensor": ({}, {"output": "nothing"}, "'nothing': the graph has no such tensor"),
}


@pytest.mark.parametrize(("changes", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_node_and_change_nothing(
    changes: dict[str, str], tensors: dict[str, str], message: str
) -> None:
    model = block(changes)
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(ReplaceError, match=message):
        replace_with_moe_layer(model, **{**BETWEEN, **tensors}, config=_config())
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        (
            {},
            {"output": "slots"},
            r"'slots': its shape is \(.*, 2, 6\), that of the input \(n, 6\)",
        ),
        ({}, {"router_logits": "x"}, r"'x': its shape is \(n, 6\); needed is \(n, 4\)"),
        (
            {"float[6, 4] router": "float[6, 5] router"},
            {},
            r"'logits': its shape is \(n, 5\); needed is \(n, 4\)",
        ),
        (
            {
                "(float[n, 6] x) => (float[n, 6] y)": "(double[n, 6] x) => (double[n, 6] y)",
                "h = Relu (x)": "h = Relu (x)\n  x32 = Cast <to = 1> (h)",
                "logits = MatMul (h,": "logits = MatMul (x32,",
                "wide = Unsqueeze (h,": "wide = Unsqueeze (x32,",
                "y = Add (moe, x)": "m64 = Cast <to = 11> (moe)\n  y = Add (m64, x)",
            },
            {},
            "'h': its type is DOUBLE; needed is float32, float16 or bfloat16",
        ),
    ],
)
def test_shapes_and_types_are_checked(
    changes: dict[str, str], tensors: dict[str, str], message: str
) -> None:
    with pytest.raises(ReplaceError, match=message):
        replace_with_moe_layer(block(changes), **{**BETWEEN, **tensors}, config=_config())


def test_a_layer_in_float32_on_half_input_is_cast_back(tmp_path: Path) -> None:
    """The block computes in float32 on a float16 input; what follows reads float32 as before."""
    changes = {
        "h = Relu (x)": "r = Relu (x)\n  h16 = Cast <to = 10> (r)\n  h = Cast <to = 1> (h16)",
    }
    path = tmp_path / "original.onnx"
    onnx.save(block(changes), path)
    report = rewrite(path, tmp_path / "out")
    assert len(report.layers) == 1, str(report)
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert next(n for n in made.graph.node if n.op_type == OP_TYPE).input[0] == "h"
    # Asked for, the float16 tensor is the input, and the layer's output is cast.
    made = block(changes)
    between = {**BETWEEN, "hidden_states": "h16"}
    replace_with_moe_layer(made, **between, config=report.layers[0].config)
    onnx.save(made, tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(made)
    types = {v.name: v.type.tensor_type.elem_type for v in made.graph.value_info}
    moe = next(n for n in made.graph.node if n.op_type == OP_TYPE)
    assert moe.input[0] == "h16"
    assert types[moe.output[0]] == TensorProto.FLOAT16
    after = next(n for n in made.graph.node if moe.output[0] in n.input)
    assert after.op_type == "Cast"
    assert types[after.output[0]] == TensorProto.FLOAT
    expected = run_runtime(path, tokens(5))[0]
    actual = run_reference(tmp_path / "out" / "model.onnx", tokens(5))[0]
    # The output passes through float16: half of its unit in the last place at the largest value.
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
