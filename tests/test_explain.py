"""``moe-infer rewrite --explain``: every candidate, how far it went, and why no further."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export_fixtures import unpack
from models_text import block
from moe_infer.cli import main
from moe_infer.graph.explain import explain


def _save(model: onnx.ModelProto, folder: Path) -> str:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return str(path)


def test_a_match_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewrite", _save(block(), tmp_path), "--explain"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("1 candidate:\nTopK -> top_w\n  matches family 'stacked': 4 experts")
    assert "softmax_topk top 2, normalised; from 'h' and 'logits' to 'moe'" in told
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_nearest_pattern_and_its_end_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = block({"sg = Sigmoid (g)": "sg = Softplus (g)"})
    assert main(["rewrite", _save(model, tmp_path), "--explain"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "1 candidate:",
        "TopK -> top_w",
        "  nearest is family 'stacked', which reached the experts' first projections",
        "  stopped at Softplus -> sg",
        "  because: Softplus is no part of a MoE block that is known",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_block_that_may_not_be_replaced_is_told() -> None:
    model = block({"y = Add (moe, x)": "y = Add (moe, o)"})
    explanation = explain(model)
    assert not explanation
    (miss,) = explanation.near_misses
    assert "inside the layer, is also used by" in miss.reason
    assert "which reached a whole block" in str(explanation)


def test_a_wrong_export_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = unpack("mixtral-torchscript-missing", tmp_path)
    assert main(["rewrite", str(path), "--explain"]) == 3
    told = capsys.readouterr().out
    assert "nearest is family 'unrolled'" in told
    assert "the export holds 2 of 4 experts" in told
    assert told.rstrip().endswith("the export is wrong; a rewrite would write nothing")


def test_a_graph_without_any_choice_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
    )
    assert str(explain(model)).startswith("no candidates: the graph has no TopK")


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _save(block(), tmp_path)
    assert main(["rewrite", path, str(tmp_path / "out"), "--explain"]) == 1
    assert "--explain writes nothing" in capsys.readouterr().err
    assert main(["rewrite", path]) == 1
    assert "out_dir is missing" in capsys.readouterr().err
