"""Guesses of the next layer's experts in graphs of real exporters, against PyTorch's routers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from models_guess import layers, run  # noqa: E402
from moe_infer.cli import main  # noqa: E402
from moe_infer.torch import export_pretrained  # noqa: E402

pytestmark = pytest.mark.needs_torch

EXPORTS = [
    ("Mixtral", "dynamo"),
    ("Mixtral", "torchscript"),
    ("Qwen2-MoE", "torchscript"),
    ("Qwen3-MoE", "transformers"),
    ("OLMoE", "dynamo"),
    ("gpt-oss", "dynamo"),
    ("gpt-oss", "torchscript"),
    ("DeepSeek-V3", "dynamo"),
    ("DeepSeek-V3", "torchscript"),
    ("Granite-MoE", "transformers"),
    ("Phi-MoE", "torchscript"),
    ("JetMoE", "dynamo"),
]


def last_router(family: str) -> tuple[np.ndarray, np.ndarray | float]:
    """Weight (experts, d_model) and bias of the last layer's router in PyTorch."""
    found = {
        name.rpartition(".")[2]: value.detach().numpy()
        for name, value in model_zoo.make(family).model.named_parameters()
        if re.search(r"\.(mlp|block_sparse_moe)\.(gate|router)\.", name)
    }
    return found["weight"], found.get("bias", 0.0)


@pytest.mark.parametrize(("family", "exporter"), EXPORTS)
def test_the_guess_is_pytorchs_router(family: str, exporter: str, tmp_path: Path) -> None:
    if why := model_zoo.unavailable(exporter):
        pytest.skip(why)
    path, out = model_zoo.export(family, exporter), tmp_path / "model.onnx"
    plain = moe_infer.rewrite(path, tmp_path, max_concurrency=2, progress=False)
    feeds = {
        i.name: model_zoo.make(family).arrays[i.name]
        for i in onnx.load(out, load_external_data=False).graph.input
    }
    (before,) = run(onnx.load(out), tmp_path, feeds, "logits")
    report = moe_infer.rewrite(path, tmp_path, max_concurrency=2, fetch_ahead=True, progress=False)
    assert report.guesses and [g.reason for g in report.guesses.guesses] == [""], str(report)
    assert report.untyped_values == plain.untyped_values
    model = onnx.load(out)
    first, _ = layers(model)
    guess, hidden, after = run(model, tmp_path, feeds, first.input[2], first.input[0], "logits")
    weight, bias = last_router(family)
    np.testing.assert_allclose(guess, hidden @ weight.T + bias, rtol=0, atol=1e-5)
    assert np.array_equal(before, after)


@pytest.mark.parametrize("insert", [False, True])
def test_export(insert: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    model_zoo.make("Mixtral").model.save_pretrained(source)
    command = ["export", str(source), str(out), "--fetch-ahead", "--max-concurrency", "2"]
    assert main([*command, "--check", *["--insert"] * insert]) == 0
    told = capsys.readouterr().out
    assert "fetching ahead: 1 of 1 layers" in told and "largest difference to PyTorch" in told
    found = [layer.guesses_next for layer in moe_infer.inspect_model(out / "model.onnx")]
    assert found == [True, False]
    # Off again, it is the graph that is exported without.
    moe_infer.set_fetch_ahead(out / "model.onnx", False, out / "model.onnx")
    export_pretrained(source, tmp_path / "plain", insert=insert, max_concurrency=2)
    graphs = [onnx.load(f / "model.onnx").graph for f in (out, tmp_path / "plain")]
    assert [list(n.output) for n in graphs[0].node] == [list(n.output) for n in graphs[1].node]


def test_a_budget_and_bfloat16(tmp_path: Path) -> None:
    """The budget decides what streams, so it comes first; bfloat16 is lowered, too."""
    source = tmp_path / "in"
    model_zoo.make("Qwen3-MoE").model.save_pretrained(source)
    options = {"insert": True, "dtype": "bfloat16", "fetch_ahead": True, "check": True}
    whole = export_pretrained(source, tmp_path / "whole", **options)
    assert whole.guesses is not None and whole.guesses.resident
    nbytes = sum(x.slots_bytes for x in moe_infer.inspect_model(whole.model_path)) // 2
    report = export_pretrained(source, tmp_path / "half", gpu_budget=nbytes, **options)
    assert report.guesses and report.difference is not None and report.difference < 0.1
    assert "1 of 1 layers" in str(report)
