"""moe_infer.verify: the same models, changed weights, random inputs of decoder graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import moe_infer
from moe_infer.cli import main
from moe_infer.compare.difference import Tolerance, compare
from moe_infer.compare.feeds import make_feeds
from moe_infer.weights import open_weight_file

ORIGINAL = Path(__file__).resolve().parent.parent / "examples/tiny_moe/gated_top2.onnx"
CPU = ["CPUExecutionProvider"]
WHAT = ("key", "value")


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewritten")
    moe_infer.rewrite(ORIGINAL, folder)
    return folder / "model.onnx"


@pytest.fixture
def damaged(rewritten: Path, tmp_path: Path) -> Path:
    """The same model with another down projection in expert 0 to 7 of layer 2."""
    folder = tmp_path / "damaged"
    shutil.copytree(rewritten.parent, folder)
    path = folder / "experts.safetensors"
    info = open_weight_file(path).tensors["layers.2.down"]
    with open(path, "r+b") as file:
        file.seek(info.offset)
        values = np.frombuffer(file.read(info.nbytes), np.float16)
        file.seek(info.offset)
        file.write((values + np.float16(0.25)).tobytes())
    return folder / "model.onnx"


def test_a_rewrite_is_the_same(rewritten: Path) -> None:
    report = moe_infer.verify(ORIGINAL, rewritten, dims={"seq": 9}, providers=CPU)
    assert report
    assert report.inputs == {"tokens": ("int64", (1, 9))}
    assert [d.shape for d in report.outputs] == [(1, 9, 512)]
    assert 0 < report.largest < 1e-4
    assert len(report.layers) == 4
    original = onnx.load(ORIGINAL, load_external_data=False)
    made = {o for node in original.graph.node for o in node.output}
    for layer in report.layers:
        assert layer.replaced in made
        assert layer.difference is not None
        assert layer.difference.shape == (9, 160)
        assert layer.difference.scale > 1
    assert "all within" in str(report)


def test_a_difference_is_seen_where_it_begins(rewritten: Path, damaged: Path) -> None:
    report = moe_infer.verify(ORIGINAL, damaged, providers=CPU)
    assert not report
    same = [layer.difference.same for layer in report.layers if layer.difference is not None]
    assert same == [True, True, False, False]
    (logits,) = report.outputs
    assert not logits.same
    assert logits.where and logits.expected != logits.found
    assert moe_infer.verify(ORIGINAL, damaged, providers=CPU, atol=1e6, rtol=0)


def test_command(rewritten: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ORIGINAL), str(rewritten), "--provider", "cpu", "--original-provider", "cpu"]
    assert main(["verify", *arguments, "--dim", "seq=3", "--json"]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["same"] is True
    assert record["inputs"]["tokens"]["shape"] == [1, 3]
    assert len(record["layers"]) == 4
    assert main(["verify", *arguments, "--shape", "tokens=1,2"]) == 0
    shown = capsys.readouterr().out
    assert "MoELayer.3" in shown and "(1, 2, 512)" in shown
    assert main(["verify", str(ORIGINAL), str(damaged), "--provider", "cpu"]) == 4
    assert "3 of 5 not within atol 0.0001, rtol 0.0001" in capsys.readouterr().out


def test_given_inputs(rewritten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.arange(7, dtype=np.int64)[None]
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [str(ORIGINAL), str(rewritten), "--input", f"tokens={tmp_path / 'tokens.npy'}"]
    assert main(["verify", *arguments, "--provider", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["tokens"]["shape"] == [1, 7]
    with pytest.raises(ValueError, match="no input 'ids'; it has tokens"):
        moe_infer.verify(ORIGINAL, rewritten, inputs={"ids": tokens})
    with pytest.raises(ValueError, match="symbolic dimensions are seq"):
        moe_infer.verify(ORIGINAL, rewritten, dims={"length": 4})
    with pytest.raises(ValueError, match=r"has 3 at dimension 1 \(seq\), but 4 is needed"):
        moe_infer.verify(ORIGINAL, rewritten, dims={"seq": 4}, shapes={"tokens": (1, 3)})


def test_models_that_do_not_belong_together(rewritten: Path, tmp_path: Path) -> None:
    other = onnx.load(rewritten, load_external_data=False)
    other.graph.input[0].name = "ids"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"not the same inputs: only in the original \['tokens'\]"):
        moe_infer.verify(ORIGINAL, tmp_path / "other.onnx")


def test_a_node_without_metadata_is_told(rewritten: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(rewritten.parent, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    layers = [node for node in model.graph.node if node.op_type == "MoELayer"]
    del layers[0].metadata_props[:]
    layers[1].metadata_props[0].value = "nowhere"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    report = moe_infer.verify(ORIGINAL, folder / "model.onnx", providers=CPU)
    assert report
    assert [layer.reason for layer in report.layers] == [
        "the node does not tell which value it replaced",
        "the original has no value 'nowhere'",
        "",
        "",
    ]


def test_compare() -> None:
    tolerance = Tolerance(1e-3, 1e-2)
    a = np.array([[1.0, np.nan, np.inf], [-np.inf, 100.0, 0.0]], np.float32)
    assert compare("x", a, a.copy(), tolerance).largest == 0
    b = a.copy()
    b[1, 1] = 100.9
    near = compare("x", a, b, tolerance)
    assert near.same and near.where == (1, 1) and near.scale == 100
    b[0, 1] = 0
    far = compare("x", a, b, tolerance)
    assert not far.same and far.where == (0, 1) and far.largest == np.inf
    assert not compare("x", a, -a, tolerance).same
    wrong = compare("x", a, a.T, tolerance)
    assert not wrong.same and "shape (3, 2), expected (2, 3)" in wrong.problem
    assert compare("x", np.zeros((0, 2)), np.zeros((0, 2)), tolerance).same
    assert not compare("x", np.array(["a"]), np.array(["b"]), tolerance).same


def _decoder(
    mask: str = "past + seq", gqa: bool = False, kind: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """Interface of a decoder graph; what it computes does not matter here."""
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", mask]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "seq"]),
    ]
    for what in WHAT:
        name = f"past_key_values.0.{what}"
        inputs.append(helper.make_tensor_value_info(name, kind, ["batch", 2, "past", 8]))
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
    ]
    if gqa:
        nodes.append(helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft"))
    table = helper.make_tensor("embedding", TensorProto.FLOAT, [11, 4], [0.0] * 44)
    output = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 4])
    return helper.make_model(helper.make_graph(nodes, "decoder", inputs, [output], [table]))


@pytest.mark.parametrize("mask", ["past + seq", "total_sequence_length"])
def test_inputs_of_a_decoder(mask: str) -> None:
    feeds = make_feeds(_decoder(mask), dims={"past": 4, "seq": 3})
    assert feeds["input_ids"].shape == (2, 3)
    assert 2 <= feeds["input_ids"].max() < 11
    assert feeds["input_ids"].dtype == np.int64
    assert feeds["attention_mask"].shape == (2, 7)
    assert feeds["attention_mask"].all()
    assert feeds["position_ids"].tolist() == [[4, 5, 6]] * 2
    assert feeds["past_key_values.0.key"].shape == (2, 2, 4, 8)
    assert feeds["past_key_values.0.key"].std() > 0.5


def test_sizes_that_nobody_gave() -> None:
    feeds = make_feeds(_decoder())
    assert feeds["attention_mask"].shape == (2, 8)
    assert make_feeds(_decoder(gqa=True))["input_ids"].shape[0] == 1
    seeds = [make_feeds(_decoder(), seed=s)["input_ids"].tolist() for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("packed", [True, False])
def test_sizes_that_attention_asks_for(packed: bool) -> None:
    """onnxruntime-genai's builder: heads of a symbolic size, and a window in a buffer."""
    node = helper.make_node(
        "GroupQueryAttention",
        ["qkv", *(["", ""] if packed else ["k", "v"]), *(f"past_key_values.0.{w}" for w in WHAT)],
        ["y"],
        domain="com.microsoft",
        num_heads=4,
        kv_num_heads=2,
        local_window_size=32,
        sliding_window_cache=1,
    )
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    for layer, length in enumerate(("past_window", "past")):
        for what in WHAT:
            dims = ["batch", 2, length, "head"]
            name = f"past_key_values.{layer}.{what}"
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    width = (4 + 2 * 2 if packed else 4) * 24
    query = helper.make_tensor_value_info("qkv", TensorProto.FLOAT, ["batch", "seq", width])
    graph = helper.make_graph([node], "decoder", inputs, [], value_info=[query])
    feeds = make_feeds(helper.make_model(graph))
    assert feeds["past_key_values.0.key"].shape == (1, 2, 32, 24)
    assert feeds["past_key_values.1.value"].shape == (1, 2, 3, 24)
    # The buffer's length is not that of what it holds.
    assert feeds["attention_mask"].shape == (1, 3 + 5)
    assert (
        make_feeds(helper.make_model(graph), dims={"head": 8})["past_key_values.1.key"].shape[-1]
        == 8
    )


def test_sizes_from_arrays() -> None:
    past = np.zeros((1, 2, 6, 8), np.float32)
    feeds = make_feeds(_decoder(), given={"past_key_values.0.value": past})
    assert feeds["past_key_values.0.value"] is past
    assert feeds["past_key_values.0.key"].shape == past.shape
    assert feeds["attention_mask"].shape == (1, 11)
    with pytest.raises(ValueError, match="is -1 with"):
        make_feeds(_decoder("past - seq"), dims={"past": 3, "seq": 4})
    with pytest.raises(ValueError, match="rank 2, but shape"):
        make_feeds(_decoder(), shapes={"input_ids": (3,)})
    with pytest.raises(ValueError, match="must be a size of at least 0, got -1"):
        make_feeds(_decoder(), dims={"seq": -1})


def test_types_of_random_values() -> None:
    feeds = make_feeds(_decoder(kind=TensorProto.BFLOAT16))
    assert feeds["past_key_values.0.key"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="type STRING, for which there are no random values"):
        make_feeds(_decoder(kind=TensorProto.STRING))


def test_dimension_texts_are_not_evaluated() -> None:
    """A model is untrusted: only sums and products of names are read."""
    model = _decoder("__import__('os').system('false')")
    assert make_feeds(model)["attention_mask"].shape == (2, 8)
