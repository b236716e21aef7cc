"""moe-infer export: from a transformers folder to a graph with a key/value cache."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from moe_infer.cli import main  # noqa: E402
from moe_infer.compare.feeds import make_feeds  # noqa: E402
from moe_infer.torch import ExportError, export_pretrained  # noqa: E402

pytestmark = pytest.mark.needs_torch

CPU = ["CPUExecutionProvider"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the export opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def _save(family: str, folder: Path) -> Path:
    model_zoo.make(family).model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_command_rewrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _save("Mixtral", tmp_path / "in")
    assert main(["export", str(source), str(tmp_path / "out"), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "2 MoE layers rewritten" in shown
    assert "largest difference to PyTorch" in shown
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "experts.safetensors", "config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".export-")]
    model = onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    inputs = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in model.graph.input
    }
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert [o.name for o in model.graph.output][:2] == ["logits", "present.0.key"]


def test_command_takes_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = _save("Mixtral", tmp_path / "in"), tmp_path / "out"
    command = ["export", str(source), str(out), "--insert", "--gpu-budget"]
    assert main([*command, "much"]) == 1
    said = capsys.readouterr().err
    assert "gpu_budget must be a number of bytes such as 8G or 512M, got 'much'" in said
    assert not out.exists()
    # What is there is whole when the budget does not suffice, and the least that does is told.
    assert main([*command, "1"]) == 1
    said = capsys.readouterr().err
    (least,) = re.findall(r"give at least (\d+)", said)
    assert f"{out / 'model.onnx'} is whole, with slots for all experts" in said
    assert all(x.slots == x.experts for x in moe_infer.inspect_model(out / "model.onnx"))
    assert main([*command, least]) == 0
    layers = moe_infer.inspect_model(out / "model.onnx")
    assert [x.slots for x in layers] == [x.top_k for x in layers]
    assert sum(x.slots_bytes for x in layers) == int(least)


@pytest.mark.parametrize("insert", [False, True])
def test_a_budget_in_python(insert: bool, tmp_path: Path) -> None:
    """That of the function, and that of a graph which replace_moe or the rewriter made before."""
    source = _save("Mixtral", tmp_path / "in")
    later = export_pretrained(source, tmp_path / "later", insert=insert).model_path
    nbytes = sum(layer.slots_bytes for layer in moe_infer.inspect_model(later)) * 3 // 4
    moe_infer.set_gpu_budget(later, nbytes, later)
    given = export_pretrained(
        source, tmp_path / "given", insert=insert, gpu_budget=nbytes, check=True
    )
    layers = moe_infer.inspect_model(given.model_path)
    assert [layer.slots for layer in layers] == [3, 3]  # of 4
    assert [x.slots for x in moe_infer.inspect_model(later)] == [3, 3]
    assert later.read_bytes() == given.model_path.read_bytes()


def test_a_budget_that_is_none_is_told_before_the_export(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(ValueError, match=r"gpu_budget must be a number of bytes .* got 'much'"):
        export_pretrained(source, out, gpu_budget="much")
    with pytest.raises(ValueError, match=r"max_concurrency 2 and gpu_budget '1G' are both given"):
        export_pretrained(source, out, gpu_budget="1G", max_concurrency=2)
    assert not out.exists()


def test_a_past_changes_nothing(tmp_path: Path) -> None:
    """Inserted; the same tokens in one run and in two, the second with the first's cache."""
    source = _save("DeepSeek-V3", tmp_path / "in")
    report = export_pretrained(source, tmp_path / "out", insert=True, max_concurrency=3, check=True)
    assert report.difference is not None and report.difference < 1e-5
    assert "2 MoE modules replaced" in str(report)
    assert {layer.slots for layer in moe_infer.inspect_model(report.model_path)} == {3}
    session = moe_infer.InferenceSession(report.model_path, providers=CPU)
    names = [o.name for o in session.get_outputs()]
    model = onnx.load(report.model_path, load_external_data=False)
    sizes = {"past_sequence_length": 0, "sequence_length": 7}
    feeds = make_feeds(model, dims=sizes)
    whole = dict(zip(names, session.run(None, feeds), strict=True))
    first = {**feeds, "attention_mask": feeds["attention_mask"][:, :4]}
    for name in ("input_ids", "position_ids"):
        first[name] = feeds[name][:, :4]
    begun = dict(zip(names, session.run(None, first), strict=True))
    second = {
        "attention_mask": feeds["attention_mask"],
        "input_ids": feeds["input_ids"][:, 4:],
        "position_ids": feeds["position_ids"][:, 4:],
        **{n.replace("present", "past_key_values"): v for n, v in begun.items() if n != "logits"},
    }
    ended = dict(zip(names, session.run(None, second), strict=True))
    np.testing.assert_allclose(ended["logits"], whole["logits"][:, 4:], rtol=0, atol=1e-4)
    with torch.no_grad():
        made = model_zoo.make("DeepSeek-V3")
        expected = made.model(torch.from_numpy(feeds["input_ids"])).logits.numpy()
    np.testing.assert_allclose(whole["logits"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_a_cache_and_in_another_type(dtype: str, tmp_path: Path) -> None:
    source = _save("Qwen3-MoE", tmp_path / "in")
    report = export_pretrained(
        source, tmp_path / "out", insert=True, cached=False, dtype=dtype, check=True
    )
    assert report.difference is not None and report.difference < 0.1
    model = onnx.load(report.model_path, load_external_data=False)
    assert [v.name for v in model.graph.input] == ["input_ids", "attention_mask"]
    assert [v.name for v in model.graph.output] == ["logits"]
    (layer, *_) = moe_infer.inspect_model(report.model_path)
    assert (layer.dtype, layer.weight_dtype) == (dtype, dtype)


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path), out]) == 1
    assert "has no config.json; expected a folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert main(["export", str(tmp_path), out]) == 1
    assert "transformers cannot load" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExportError, match="transformers cannot load"):
        export_pretrained(tmp_path, out)
    damaged = _save("Mixtral", tmp_path / "damaged")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert main(["export", str(damaged), out]) == 1
    assert f"transformers cannot load {damaged}: SafetensorError" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give another one"):
        export_pretrained(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of"):
        export_pretrained(tmp_path, out, dtype="int8")
    assert not (tmp_path / "out").exists()


def test_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "pip install 'moe-infer[torch]'" in capsys.readouterr().err


@pytest.mark.parametrize("insert", [False, True])
def test_an_export_that_fails_is_explained_and_leaves_nothing(
    insert: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it touch what was there before."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Could not guard on data-dependent expression Eq(u0, 1)\nlong trace")

    source = _save("Mixtral", tmp_path / "in")
    monkeypatch.setattr(torch.onnx, "export", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/experts.safetensors").write_text("of another model")
    remedy = "" if insert else ".*--insert"
    with pytest.raises(ExportError, match=rf"could not export MixtralForCausalLM{remedy}"):
        export_pretrained(source, tmp_path / "out", insert=insert)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["experts.safetensors"]
    assert (tmp_path / "out/experts.safetensors").read_text() == "of another model"


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/torch.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "MODEL_DIR" in c]
    _save("Qwen3-MoE", tmp_path / "MODEL_DIR")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/torch.md", "exec"), {})
    session = moe_infer.InferenceSession("out/model.onnx", providers=CPU)
    made = model_zoo.make("Qwen3-MoE")
    (logits,) = session.run(None, {"input_ids": made.arrays["input_ids"]})
    np.testing.assert_allclose(logits, model_zoo.expected("Qwen3-MoE"), rtol=0, atol=1e-4)
