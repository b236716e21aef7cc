"""The command line: its output, its exit codes, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from layer_models import layer_attributes, layer_model, make_parts, write_experts
from moe_infer.cli import main

ROOT = Path(__file__).resolve().parent.parent
D_MODEL, HIDDEN, EXPERTS = 8, 16, 4
CPU = "--provider=cpu"


@pytest.fixture
def model(tmp_path: Path) -> str:
    parts = make_parts("Gated_SiLU", EXPERTS, D_MODEL, HIDDEN, "float32")
    path = write_experts(tmp_path / "experts", parts, "Gated_SiLU", EXPERTS, "npz stored")
    attributes = layer_attributes(
        "Gated_SiLU", "softmax_topk", EXPERTS, D_MODEL, HIDDEN, 2, path.name, centroids=True
    )
    onnx.save(layer_model([attributes], D_MODEL), tmp_path / "model.onnx")
    return str(tmp_path / "model.onnx")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must end with 1 and one line; returns the line."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moe-infer: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_run_for_machines(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", model, CPU, "--shape", "x=2,3,8", "--json", "--repeat", "3", "--expert-use"]
    assert main(arguments) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["moe_provider"] == "CPUExecutionProvider"
    assert record["lowered"] is True
    assert record["inputs"] == {"x": {"dtype": "float32", "shape": [2, 3, 8]}}
    assert record["outputs"] == {"y": {"dtype": "float32", "shape": [2, 3, 8]}}
    assert len(record["run_s"]) == 3
    assert all(t > 0 for t in record["run_s"])
    assert sum(record["expert_use"]["moe_0"]) == 2 * 3 * 2


def test_run_chooses_shapes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", model, CPU, "--dim", "seq=4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["inputs"]["x"]["shape"] == record["outputs"]["y"]["shape"] == [2, 4, D_MODEL]


def test_run_for_people(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.ones((1, 4, D_MODEL), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "all.npz", x=x)
    for given in (f"x={tmp_path / 'x.npy'}", str(tmp_path / "all.npz")):
        assert main(["run", model, CPU, "--input", given, "--expert-use"]) == 0
        shown = capsys.readouterr().out
        assert "provider: CPUExecutionProvider, lowered" in shown
        assert "output y: float32 (1, 4, 8)" in shown
        assert "experts of moe_0: 2 of 4 used" in shown


def test_inspect(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)
    assert (layer["name"], layer["experts"], layer["top_k"]) == ("moe_0", 4, 2)
    assert layer["slots_bytes"] == 2 * layer["slot_bytes"]
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    for text in ("moe_0", "4, top 2", "Gated_SiLU 8 x 16", "npz, separate", "float32", "6.0 KiB"):
        assert text in shown


def test_lower(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "lowered.onnx"
    assert main(["lower", model, str(out)]) == 0
    assert "0 layers by com.microsoft.MoE, 4 experts by If" in capsys.readouterr().out
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 2, D_MODEL)).astype(np.float32)
    assert np.isfinite(session.run(None, {"x": x})[0]).all()
    assert main(["inspect", str(out)]) == 0
    assert "no MoELayer" in capsys.readouterr().out


def test_rewrite(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = ROOT / "examples/tiny_moe/gated_top2.onnx"
    out = tmp_path / "rewritten"
    assert main(["rewrite", str(exported), str(out), "--max-concurrency", "3"]) == 0
    assert "4 MoE layers rewritten" in capsys.readouterr().out
    assert main(["inspect", str(out / "model.onnx"), "--json"]) == 0
    assert [layer["slots"] for layer in json.loads(capsys.readouterr().out)] == [3] * 4
    # Nothing to find is no error, and not the same as done.
    assert main(["rewrite", model, str(tmp_path / "other")]) == 3
    assert "no MoE layer was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "z=1,2,8"], "the model has no input 'z'; it has x"),
        (["--dim", "past=3"], "no input has a dimension 'past'; symbolic dimensions are"),
        (["--shape", "x"], "--shape must be NAME=VALUE, got 'x'"),
        (["--shape", "x=1,b,8"], "--shape must be like NAME=1,8"),
        (["--shape", "x=1,2,9"], "input 'x' has 9 at dimension 2 (8), but 8 is needed there"),
        (["--shape", "x=1,2,8", "--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--input", "x=none.npy"], "none.npy"),
        (["--shape", "x=1,2,8", "--range", "x=1,2"], "a range must be three shapes"),
        (["--shape", "x=1,2,8", "--range", "y=1,2,3"], "no input has a dimension 'y'"),
    ],
)
def test_run_refuses(
    model: str, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["run", model, CPU, *arguments]) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("moe-infer")]
    assert len(error) == 1
    assert message in error[0]


def test_errors_are_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not found" in fails(capsys, "inspect", str(tmp_path / "none.onnx"))
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        said = fails(capsys, "run", model, "--provider", "tensorrt", "--shape", "x=1,2,8")
        assert "moe-infer[gpu]" in said
    experts = tmp_path / "experts.npz"
    experts.write_bytes(experts.read_bytes()[:-10])
    for command in (["inspect", model], ["lower", model, str(tmp_path / "o.onnx")]):
        assert "layer 'moe_0'" in fails(capsys, *command)
    assert not (tmp_path / "o.onnx").exists()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"], ["run"], ["run", "m.onnx", "--provider", "abacus"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == ["moe-infer", (ROOT / "VERSION").read_text().strip()]


def test_as_a_process(model: str) -> None:
    """Without a traceback, and without cutting a table that goes into a pipe."""
    command = [sys.executable, "-m", "moe_infer.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "inspect", "none.onnx"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [*command, "inspect", model], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert "…" not in done.stdout


def test_the_import_is_light() -> None:
    code = (
        "import sys, moe_infer; heavy = {'onnx', 'onnxruntime', 'torch', 'rich', 'numpy'};"
        " print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "[]", done.stderr
