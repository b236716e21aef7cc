"""Every row of docs/models.md: a real model's export, rewritten, run, compared with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import model_rows  # noqa: E402
import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from compare_rewrites import TOLERANCE, run_lowered  # noqa: E402
from evaluate_graph import run_runtime  # noqa: E402
from export_fixtures import recorded, unpack  # noqa: E402
from model_rows import GENAI, ROWS, Outcome, Row  # noqa: E402
from moe_infer.graph.families.fused import _FC3 as THIRD  # noqa: E402
from moe_infer.graph.families.fused import DOMAIN as MICROSOFT  # noqa: E402
from moe_infer.op import OP_TYPE  # noqa: E402

pytestmark = pytest.mark.needs_torch


def _parameter(row: Row) -> Any:
    marks = [pytest.mark.needs_onnxruntime_1_32] if row.exporter == GENAI else []
    return pytest.param(row, id="-".join(filter(None, row.key)), marks=marks)


@pytest.mark.parametrize("row", [_parameter(row) for row in ROWS])
def test_row(row: Row, tmp_path: Path) -> None:
    if row.fixture:
        path = unpack(row.fixture, tmp_path)
        feeds, expected = recorded(row.fixture)
    else:
        why = model_zoo.unavailable(row.exporter)
        if why:
            pytest.skip(why)
        path = model_zoo.export(row.family, row.exporter)
        feeds, expected = model_zoo.make(row.family).arrays, model_zoo.expected(row.family)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == row.blocks, str(report)
    difference, refusal = None, ""
    if row.blocks:
        for layer in report.layers:
            found = {name: getattr(layer.config, name) for name in row.layer}
            assert found == row.layer, str(report)
        assert row.near_misses == bool(report.near_misses), str(report)
        # ONNX cannot infer the types of ONNX Runtime's own operators.
        assert not report.untyped_values or row.exporter == "transformers-cuda"
        rewritten = tmp_path / "out" / "model.onnx"
        loop = bool(row.fixture) and row.exporter != "transformers"
        difference = _compare(path, rewritten, feeds, expected, loop)
    else:
        refusal = report.near_misses[0].reason
        assert row.refusal and row.refusal in refusal, str(report)
        assert not (tmp_path / "out").exists()
    version = row.transformers if row.fixture else transformers.__version__
    family, exporter, _ = row.key
    made = Outcome(family, exporter, version, bool(row.fixture), row.blocks, difference, refusal)
    model_rows.record(made)


def _compare(
    path: Path, rewritten: Path, feeds: dict[str, Any], expected: Any, loop: bool
) -> float:
    """Compares all logits with PyTorch's and with the unrewritten graph's; the first difference."""
    model = onnx.load(rewritten)
    assert all(n.op_type != "MoE" for n in model.graph.node)
    _check_types(model)
    feeds = _given(model, feeds)
    logits, *_ = run_lowered(rewritten, feeds)
    assert logits.shape == expected.shape
    difference = float(np.abs(logits - expected).max())
    assert difference <= TOLERANCE
    if _runs_on_the_cpu(path):
        one = {name: values[:1, :1] for name, values in feeds.items()}
        # A traced loop has a node for each chosen expert, and fails where one is not.
        for inputs in (feeds,) if loop else (feeds, one):
            before, after = run_runtime(path, inputs)[0], run_lowered(rewritten, inputs)[0]
            assert before.shape == after.shape
            np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE)
    return difference


def _given(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a graph has, masks and positions made from the numbers of the tokens."""
    ids = feeds["input_ids"]
    seq = np.arange(ids.shape[1], dtype=np.int64)[None].repeat(len(ids), 0)
    made = {"attention_mask": np.ones_like(ids), "position_ids": seq, **feeds}
    return {i.name: made[i.name] for i in model.graph.input}


def _runs_on_the_cpu(path: Path) -> bool:
    """ONNX Runtime's CPU has no MoE with a third weight."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    fused = [n for n in nodes if n.domain == MICROSOFT and n.op_type == "MoE"]
    return not any(len(n.input) > THIRD and n.input[THIRD] for n in fused)


def _check_types(model: onnx.ModelProto) -> None:
    """MoELayer's output, and what follows it in ONNX's own domain, has type and shape."""
    have = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        if node.op_type == OP_TYPE:
            assert set(node.output) <= have


def test_the_page_has_these_rows() -> None:
    page = model_rows.load(model_rows.PAGE)
    assert list(page) == [row.key for row in ROWS], "run tools/make_models.py"
    for row in ROWS:
        written = page[row.key]
        assert written.blocks == row.blocks
        assert row.refusal in written.refusal and bool(row.refusal) == bool(written.refusal)
        assert (written.difference is None) == bool(row.refusal)
        assert written.difference is None or written.difference <= TOLERANCE


def test_every_model_of_the_zoo_has_a_row() -> None:
    assert {row.family for row in ROWS if not row.fixture} == set(model_zoo.FAMILIES)
