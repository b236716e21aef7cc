"""Guesses of the next layer's experts: what they give, where there are none, and the commands."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import moe_infer
from compare_rewrites import producer
from evaluate_graph import run_reference, run_runtime
from export_fixtures import recorded, unpack
from models_guess import D_MODEL, ROUTER, layers, router_alone, run, two_layers
from moe_infer.cli import main
from moe_infer.graph.guess_next import GuessReport, add_guesses, remove_guesses
from moe_infer.graph.shapes import infer_types

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {name: ROOT / f"examples/tiny_moe/{name}.onnx" for name in ("gated_top2", "t5_top1")}
X = {"x": np.random.default_rng(1).standard_normal((5, D_MODEL)).astype(np.float32)}


def guess(model: onnx.ModelProto) -> GuessReport:
    """Adds guesses, and checks that the graph is one still and that all that is new has a type."""
    before = {o for n in model.graph.node for o in n.output}
    types = infer_types(model)
    report = add_guesses(model, types)
    check_order(model)
    new = {o for n in model.graph.node for o in n.output} - before
    assert all(types.complete(name) for name in new), new
    model.graph.value_info.extend(types.infos[name] for name in sorted(new))
    return report


def check_order(model: onnx.ModelProto) -> None:
    """Every value is made once, before it is read; the checker knows no operators of others."""
    graph = model.graph
    there = {v.name for v in (*graph.input, *graph.initializer)} | {""}
    for node in graph.node:
        assert there.issuperset(node.input), node.name
        made = [o for o in node.output if o]
        assert there.isdisjoint(made) and len(made) == len(set(made))
        there.update(made)
    assert len({n.name for n in graph.node if n.name}) == sum(bool(n.name) for n in graph.node)


def weight_of(folder: Path, model: onnx.ModelProto, layer: onnx.NodeProto) -> Any:
    """The constant (d_model, experts) that makes a layer's logits."""
    product = producer(model.graph, layer.input[1])
    tensor = next(t for t in model.graph.initializer if t.name == product.input[1])
    values = numpy_helper.to_array(tensor, str(folder))
    return values.T if product.op_type == "Gemm" else values


# --- What a guess is


@pytest.mark.parametrize(
    ("changes", "reads", "count"),
    [
        ({}, "h1", 2),
        # Constants are shared, also those that nodes make of constants; these move ahead.
        (
            {
                ROUTER: "turned = Transpose <perm = [1, 0]> (rows_1)\n"
                "logits_1 = MatMul (h1, turned)\n",
                "router_1,": "router_1, float[8, 6] rows_1,",
            },
            "h1",
            1,
        ),
        (
            {
                ROUTER: "logits_1 = Gemm <transB = 1> (h1, rows_1, bias_1)\n",
                "6, 8] router": "8, 6] rows",
            },
            "h1",
            1,
        ),
        # A norm before the product, and a copy of the hidden states' own shape.
        (
            {
                ROUTER: "half = Constant <value = float {0.5}> ()\n"
                "square = Mul (h1, h1)\n"
                "mean = ReduceMean <keepdims = 1> (square, last)\n"
                "root = Sqrt (mean)\n"
                "normed = Div (h1, root)\n"
                "weighed = Mul (normed, norm_1)\n"
                "sizes = Shape (h1)\n"
                "flat = Reshape (weighed, sizes)\n"
                "product = MatMul (flat, router_1)\n"
                "logits_1 = Mul (product, half)\n",
                "  h0 =": "  last = Constant <value = int64[1] {-1}> ()\n  h0 =",
            },
            "h1",
            9,
        ),
        # The router reads what the hidden states are a reshape of, in both layers.
        (
            {
                "h0 = Relu (x)": "row = Constant <value = int64[2] {-1, 6}> ()\n"
                "r0 = Relu (x)\nh0 = Reshape (r0, row)",
                "h1 = Tanh (m0)": "r1 = Tanh (m0)\nh1 = Reshape (r1, row)",
                "MatMul (h1, ": "MatMul (r1, ",
            },
            "r1",
            2,
        ),
        # What repeats nothing: torch's `expand` in exports of gpt-oss.
        (
            {
                "h1 = Tanh (m0)": "ones = Constant <value = int64[2] {1, 1}> ()\n"
                "r1 = Tanh (m0)\nh1 = Expand (r1, ones)",
                "MatMul (h1, ": "MatMul (r1, ",
            },
            "r1",
            2,
        ),
        # Float16, and a router in float32.
        (
            {
                "h0 = Relu (x)": "xh = Cast <to = 10> (x)\nh0 = Relu (xh)",
                "(h0, router_0)": "(h0, half_0)",
                "float[6, 4] router_0": "float16[6, 4] half_0, float16[n, 6] m0, float16[n, 6] m1",
                "MatMul (h1, router_1)": "MatMul (wide, router_1)",
                "  product": "  wide = Cast <to = 1> (h1)\n  product",
                "y = Add (m1, x)": "mf = Cast <to = 1> (m1)\ny = Add (mf, x)",
            },
            "h1",
            3,
        ),
    ],
    ids=["product", "transpose", "gemm", "norm", "reshape", "expand", "float16"],
)
def test_it_is_the_next_router_on_these_hidden_states(
    changes: dict[str, str], reads: str, count: int, tmp_path: Path
) -> None:
    model = two_layers(tmp_path, changes)
    plain = run(model, tmp_path, X, "y")[0]
    (hidden,) = run(model, tmp_path, X, "h0")
    initializers = [t.name for t in model.graph.initializer]
    report = guess(model)
    assert [(g.layer, g.following, g.nodes, g.reason) for g in report.guesses] == [
        ("moe_0", "moe_1", count, "")
    ]
    assert [t.name for t in model.graph.initializer] == initializers
    first, second = layers(model)
    assert len(first.input) == 3 and len(second.input) == 2
    found, y = run(model, tmp_path, X, first.input[2], "y")
    expected = router_alone(model, reads, "logits_1", hidden)
    assert found.shape == (5, 8)
    # ONNX Runtime's CPU rounds to float16 here and not there.
    exact = hidden.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-2)
    assert np.array_equal(y, plain)
    assert remove_guesses(model) == 1
    assert not [n for n in model.graph.node if n.name.startswith("moe_0.guess")]
    assert np.array_equal(run(model, tmp_path, X, "y")[0], plain)


@pytest.mark.parametrize("name", EXAMPLES)
def test_trained_models(name: str, tmp_path: Path) -> None:
    """Every layer but the last; by the reference and lowered, too, nothing changes."""
    moe_infer.rewrite(EXAMPLES[name], tmp_path / "plain", max_concurrency=2, progress=False)
    report = moe_infer.rewrite(
        EXAMPLES[name], tmp_path / "out", max_concurrency=2, fetch_ahead=True, progress=False
    )
    assert report.guesses and "3 of 3 layers" in str(report)
    assert not report.untyped_values
    model = onnx.load(tmp_path / "out/model.onnx")
    moe = layers(model)
    assert [len(node.input) for node in moe] == [3, 3, 3, 2]
    tokens = {"tokens": np.arange(12)[None]}
    for node, following in pairwise(moe):
        found, hidden = run(model, tmp_path / "out", tokens, node.input[2], node.input[0])
        expected = hidden @ weight_of(tmp_path / "out", model, following)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        own = hidden @ weight_of(tmp_path / "out", model, node)
        assert np.abs(found - own).max() > 0.1  # this layer's own router gives something else
    paths = [tmp_path / folder / "model.onnx" for folder in ("plain", "out")]
    for evaluate in (run_reference, run_lowered):
        before, after = (evaluate(path, tokens) for path in paths)
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert [layer.guesses_next for layer in moe_infer.inspect_model(paths[1])] == [
        *[True] * 3,
        False,
    ]


def run_lowered(path: Path, tokens: dict[str, Any]) -> list[Any]:
    """By plain ONNX Runtime; of the guesses nothing is left."""
    out = path.with_name("lowered.onnx")
    lowered = moe_infer.lower(path, out)
    assert not [n for n in lowered.graph.node if ".guess/" in n.name]
    return run_runtime(out, tokens)


FIXTURES = [
    "gpt-oss-genai",
    "gpt-oss-optimum",
    "gpt-oss-transformers-5.17",
    "mixtral-torchscript",
    "mixtral-transformers-5.17",
    "olmoe-dynamo",
    "olmoe-torchscript",
    "qwen3-moe-optimum",
    "qwen3.5-moe-genai",
    "switch-torchscript",
    "switch-torchscript-5.17",
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.needs_onnxruntime_1_32] if "genai" in n else [])
        for n in FIXTURES
    ],
)
def test_exports_of_one_layer_twice_in_a_graph(name: str, tmp_path: Path) -> None:
    """The second time its router's weights are doubled: the guess is twice the first one's logits,
    to the bit."""
    moe_infer.rewrite(unpack(name, tmp_path), tmp_path / "out", max_concurrency=2, progress=False)
    model = onnx.load(tmp_path / "out/model.onnx")
    twice(model)
    report = guess(model)
    assert [g.reason for g in report.guesses] == [""]
    first, second = layers(model)
    feeds, _ = recorded(name)
    ids = next(iter(feeds.values()))
    made = {"attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    given = {i.name: {**made, **feeds}[i.name] for i in model.graph.input}
    values = run(model, tmp_path / "out", given, first.input[2], first.input[1], second.input[1])
    assert np.array_equal(values[0], 2 * values[1])
    assert np.array_equal(values[0], values[2]), "the second layer has the same hidden states"


def twice(model: onnx.ModelProto) -> None:
    """Puts a second copy of all nodes behind the first, on the same inputs."""
    graph = model.graph
    made = {o for n in graph.node for o in n.output if o}
    infos = [v for v in graph.value_info if v.name in made]
    (layer,) = layers(model)
    router = producer(graph, layer.input[1])
    weights = set(router.input[1:])
    if router.op_type == "Add":  # a bias
        weights |= set(producer(graph, router.input[0]).input[1:])
    tensors = [t for t in graph.initializer if t.name in weights]
    made |= {t.name for t in tensors}
    assert tensors and all(t.dims[-1] in (4, 16) for t in tensors)
    for tensor in tensors:
        doubled = 2 * numpy_helper.to_array(tensor)
        graph.initializer.append(numpy_helper.from_array(doubled, f"again/{tensor.name}"))
    for node in list(graph.node):
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"again/{node.name}"
        copy.input[:] = [f"again/{i}" if i in made else i for i in node.input]
        copy.output[:] = [f"again/{o}" if o else o for o in node.output]
    for info in infos:
        copied = graph.value_info.add()
        copied.CopyFrom(info)
        copied.name = f"again/{info.name}"


# --- Where there is none


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"MoELayer (h1, logits_1)": "MoELayer (h1)"}, "it or moe_1 has no router_logits"),
        ({"MoELayer (h0, logits_0)": "MoELayer (h0)"}, "it or moe_1 has no router_logits"),
        (
            {
                "(m0)\n": "(m0)\n  other = MatMul (x, router_1)\n",
                "(product, bias_1)": "(product, other)",
            },
            "the router of moe_1 reads 'other', which is made of other values than",
        ),
        ({"(h1, router_1)": "(m0, router_1)"}, "logits of moe_1 are not made from its hidden"),
        (
            {"x) =>": "x, float[6, 8] given) =>", "(h1, router_1)": "(h1, given)"},
            "the router of moe_1 reads 'given', which",
        ),
        (
            {
                "h1 = Tanh (m0)": "batch = Constant <value = int64[3] {1, -1, 6}> ()\n"
                "wide = Reshape (m0, batch)\nh1 = Tanh (wide)",
                "y = Add (m1, x)": "row = Constant <value = int64[2] {-1, 6}> ()\n"
                "flat = Reshape (m1, row)\ny = Add (flat, x)",
                "norm_1": "norm_1, float[1, n, 6] m1",
            },
            r"reads hidden states FLOAT \(1, \w+, 6\), this layer's are FLOAT \(n, 6\)",
        ),
        (
            {
                ROUTER: "p0 = MatMul (h1, router_1)\n"
                + "".join(f"p{i + 1} = Identity (p{i})\n" for i in range(32))
                + "logits_1 = Add (p32, bias_1)\n"
            },
            "more than 32 nodes",
        ),
        (
            {
                ROUTER: "yes = Constant <value = bool {1}> ()\nlogits_1 = If (yes) <"
                "then_branch = a () => (float[n, 8] la) { la = MatMul (h1, router_1) },"
                "else_branch = b () => (float[n, 8] lb) { lb = MatMul (h1, router_1) }>\n"
            },
            r"the router of moe_1 has If -> logits_1, which is not copied",
        ),
    ],
)
def test_near_misses(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    model = two_layers(tmp_path, changes)
    before = model.SerializeToString(deterministic=True)
    report = guess(model)
    assert not report and len(report.guesses) == 1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(report.guesses[0].reason)
    assert "0 of 1 layers" in str(report) and report.guesses[0].reason in str(report)
    assert model.SerializeToString(deterministic=True) == before


def test_layers_that_do_not_stream(tmp_path: Path) -> None:
    """The first has 4 experts and the second 8; both have to stream."""
    first = "all experts of moe_0 stay on the GPU"
    for slots, reason in ((3, ""), (4, first), (8, None), (99, None)):
        model = two_layers(tmp_path, max_concurrency=slots)
        report = guess(model)
        assert [g.reason for g in report.guesses] == ([] if reason is None else [reason])
        assert report.resident == (reason is None)
        assert ("all experts stay on the GPU" in str(report)) == report.resident, str(report)
    model = two_layers(tmp_path)
    for attribute in layers(model)[1].attribute:
        if attribute.name == "max_concurrency":
            attribute.i = 8
    report = guess(model)
    assert [g.reason for g in report.guesses] == ["all experts of moe_1 stay on the GPU"]


def test_twice_is_once(tmp_path: Path) -> None:
    model = two_layers(tmp_path)
    assert guess(model)
    before = model.SerializeToString(deterministic=True)
    assert [g.reason for g in guess(model).guesses] == ["it has an input 2 already"]
    assert model.SerializeToString(deterministic=True) == before


# --- Checks of input 2


def with_guess(folder: Path, changes: dict[str, str], name: str = "g") -> onnx.ModelProto:
    """A model whose first layer has a given value as input 2."""
    return two_layers(
        folder,
        {"(h0, logits_0)": f"(h0, logits_0, {name})", "x) =>": "x, float[n, 8] g) =>", **changes},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"(h0, logits_0)": "(h0, , g)"},
            r"'moe_0': MoELayer: input 2 \(next_router_logits\) 'g' needs input 1 \(router_log",
        ),
        ({"(h0, logits_0)": "(h0, logits_0, g, g)"}, "next_router_logits and one output, got 4 in"),
        (
            {"x) =>": "x, double[n, 8] g) =>"},
            "'moe_0': MoELayer: next_router_logits 'g' is DOUBLE; expected FLOAT, as hidden_states",
        ),
        (
            {"x) =>": "x, float[n, 4] g) =>"},
            "'g' has 4 as its last dimension; expected 8, the expert_count of the next MoELayer",
        ),
        ({"x) =>": "x, float g) =>"}, "'g' is a scalar; expected"),
        (
            {"(float[n, 6] x) =>": "(float[5, 6] x, float[3, 8] g) =>"},
            r"'g' has shape \(3, 8\); expected a row for each token of hidden_states \(5, 6\)",
        ),
        (
            {"(float[n, 6] x) =>": "(float[5, 6] x, float[2, 3, 8] g) =>"},
            r"'g' has shape \(2, 3, 8\); expected a row",
        ),
    ],
)
def test_input_2_is_checked(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    basis = {"(h0, logits_0)": "(h0, logits_0, g)", "x) =>": "x, float[n, 8] g) =>"}
    if any(key.endswith("x) =>") for key in changes):
        del basis["x) =>"]
    model = two_layers(tmp_path, {**basis, **changes})
    with pytest.raises(ValueError, match=message):
        moe_infer.inspect_model(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        moe_infer.lower(model, base_dir=tmp_path)


def test_a_guess_of_any_rank_and_of_float32(tmp_path: Path) -> None:
    """As router_logits: a row for each token."""
    for shape in ("[5, 8]", "[1, 5, 8]", "[n, 8]", "[n, k]"):
        changes = {
            "(h0, logits_0)": "(h0, logits_0, g)",
            "(float[n, 6] x) =>": f"(float[5, 6] x, float{shape} g) =>",
        }
        model = two_layers(tmp_path, changes)
        told = moe_infer.inspect_model(model, tmp_path)
        assert [layer.guesses_next for layer in told] == [True, False]


# --- Files and commands


def test_switching_it_on_and_off_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "plain/model.onnx", tmp_path / "plain/ahead.onnx"
    moe_infer.rewrite(EXAMPLES["gated_top2"], source.parent, progress=False)
    before = source.read_bytes()
    # All experts stay: nothing to fetch.
    assert main(["fetch-ahead", str(source), "-o", str(out)]) == 0
    assert "nothing to fetch, all experts stay on the GPU" in capsys.readouterr().out
    assert out.read_bytes() == before
    whole = sum(layer.slots_bytes for layer in moe_infer.inspect_model(source))
    moe_infer.set_gpu_budget(source, whole // 2, source)
    before = source.read_bytes()
    assert main(["fetch-ahead", str(source), "-o", str(out)]) == 0
    told = capsys.readouterr().out
    assert "3 of 3 layers that another one follows guess its experts" in told
    assert f"model: {out}" in told
    assert sum(layer.guesses_next for layer in moe_infer.inspect_model(out)) == 3
    assert source.read_bytes() == before
    # Again, over itself, is the same; off is what there was.
    once = out.read_bytes()
    assert moe_infer.set_fetch_ahead(out, True, out)
    assert out.read_bytes() == once
    assert main(["fetch-ahead", "--off", str(out), "-o", str(out)]) == 0
    assert "fetching ahead: off" in capsys.readouterr().out
    assert out.read_bytes() == before
    # When a budget comes to hold all experts, making them anew removes the guesses.
    moe_infer.set_fetch_ahead(source, True, out)
    moe_infer.set_gpu_budget(out, "1G", out)
    assert moe_infer.set_fetch_ahead(out, True, out).resident
    assert not any(layer.guesses_next for layer in moe_infer.inspect_model(out))


def test_into_another_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "a/model.onnx", tmp_path / "b/model.onnx"
    moe_infer.rewrite(EXAMPLES["gated_top2"], source.parent, max_concurrency=3, progress=False)
    moe_infer.set_fetch_ahead(source, True, out)
    tokens = {"tokens": np.arange(6)[None]}
    values = [
        moe_infer.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, tokens)[0]
        for path in (source, out)
    ]
    assert np.array_equal(*values)
    used = [moe_infer.count_expert_use(path, tokens) for path in (source, out)]
    assert [u.tokens.tolist() for u in used[0]] == [u.tokens.tolist() for u in used[1]]
    assert sum(layer.guesses_next for layer in moe_infer.inspect_model(out)) == 3


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["rewrite", str(EXAMPLES["gated_top2"]), str(out), "--fetch-ahead"]
    assert main(command) == 0
    assert "nothing to fetch, all experts stay on the GPU" in capsys.readouterr().out
    assert main([*command, "--max-concurrency", "3"]) == 0
    assert "fetching ahead: 3 of 3 layers" in capsys.readouterr().out
    assert main(["inspect", str(out / "model.onnx")]) == 0
    assert capsys.readouterr().out.count("guesses") >= 3
    assert main(["fetch-ahead", str(EXAMPLES["gated_top2"]), "-o", str(out / "o.onnx")]) == 1
    assert "has no MoELayer; `moe-infer rewrite` makes them" in capsys.readouterr().err
    assert main(["fetch-ahead", str(out / "model.onnx"), "-o", str(out / "experts.safetensors")])
    assert "would overwrite weights of the model" in capsys.readouterr().err
