"""What a user may give wrongly: one line that says what was found, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import moe_infer
from moe_infer import cli
from moe_infer.cli import main
from moe_infer.compare.feeds import make_feeds
from test_cli import D_MODEL, fails, model

__all__ = ["model"]  # a fixture

EXPORTED = str(Path(__file__).resolve().parent.parent / "examples/tiny_moe/gated_top2.onnx")
CPU = "--provider=cpu"


def everything(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    } | {str(p.relative_to(folder)): b"a folder" for p in folder.rglob("*") if p.is_dir()}


@pytest.fixture
def with_data(model: str) -> Path:
    """The model with a weight of its own in model.data, in a folder of its own."""
    folder = Path(model).parent / "whole"
    folder.mkdir()
    shutil.copy(Path(model).with_name("experts.npz"), folder)
    loaded = onnx.load(model)
    bias = onnx.numpy_helper.from_array(np.ones(300, np.float32), "bias")
    loaded.graph.initializer.append(bias)
    path = folder / "model.onnx"
    onnx.save(loaded, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


# --- Models


@pytest.mark.parametrize("command", ["inspect", "run", "lower", "budget", "rewrite", "verify"])
def test_what_is_no_model(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same words from every command."""
    more = {
        "lower": [str(tmp_path / "o/o.onnx")],
        "budget": ["--gpu-budget", "1G", "-o", str(tmp_path / "o/o.onnx")],
        "rewrite": [str(tmp_path / "o")],
        "verify": [EXPORTED],
    }.get(command, [])
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "empty.onnx").touch()
    for name, message in (
        ("none.onnx", "none.onnx' not found (working directory"),
        ("text.onnx", "text.onnx' is no ONNX model"),
        ("empty.onnx", "empty.onnx' is no ONNX model: it has no graph; expected the .onnx file"),
        ("", "is a folder; give a model in it: empty.onnx, text.onnx"),
    ):
        assert message in fails(capsys, command, str(tmp_path / name), *more)
    assert not (tmp_path / "o").exists()


def test_a_folder_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder; there is no .onnx file in it" in fails(capsys, "inspect", str(tmp_path))


def test_a_model_without_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.onnx"
    np.save(tmp_path / "x.npy", np.zeros((1, 4), np.int64))
    for arguments in (
        ["lower", EXPORTED, str(out)],
        ["budget", EXPORTED, "--gpu-budget", "1G", "-o", str(out)],
        ["simulate", "--record", EXPORTED, "--input", f"tokens={tmp_path / 'x.npy'}"],
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert "has no MoELayer" in said and "`moe-infer rewrite` makes them" in said
    assert not out.exists()
    # To ask it for its experts is no error: there are none.
    assert main(["run", EXPORTED, CPU, "--expert-use"]) == 0
    session = moe_infer.InferenceSession(
        EXPORTED, providers=["CPUExecutionProvider"], expert_use=True
    )
    assert session.expert_use == []
    assert session.expert_choices({"tokens": np.zeros((1, 4), np.int64)}) == []
    with pytest.raises(ValueError, match="made without expert_use=True"):
        _ = moe_infer.InferenceSession(EXPORTED, providers=["CPUExecutionProvider"]).expert_use


# --- Outputs


def test_no_output_takes_the_place_of_the_models_files(
    with_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(with_data.parent)
    source = str(with_data)
    for name in ("experts.npz", "model.data"):
        out = str(with_data.with_name(name))
        for arguments in (
            ["lower", source, out],
            ["budget", source, "--gpu-budget", "1G", "-o", out],
        ):
            assert "would overwrite weights of the model" in fails(capsys, *arguments)
    said = fails(capsys, "lower", source, source)
    assert "would overwrite the model that is read; give another" in said
    assert everything(with_data.parent) == before


@pytest.mark.parametrize("command", ["lower", "budget"])
def test_where_no_file_can_be_written(
    command: str,
    with_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is linked into a folder, either, before the model cannot be written there."""
    target = tmp_path / "target"
    (target / "inside").mkdir(parents=True)
    (target / "file").write_text("mine")
    before = everything(target)

    def refused(out: str) -> str:
        more = [out] if command == "lower" else ["--gpu-budget", "1G", "-o", out]
        return fails(capsys, command, str(with_data), *more)

    said = refused(str(target / "inside"))
    assert f"'{target / 'inside'}' is a folder; expected the path of a file to write" in said
    for below in ("file/o.onnx", "file/deeper/o.onnx"):
        said = refused(f"{target}/{below}")
        assert f"cannot be made: '{target / 'file'}' is a file; give another path" in said
    monkeypatch.chdir(target)
    assert "is a folder; expected the path of a file" in refused("")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != target)
    assert f"folder '{target}' cannot be written; give one that can" in refused(f"{target}/o.onnx")
    assert everything(target) == before


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "file").touch()
    said = fails(capsys, "rewrite", EXPORTED, str(tmp_path / "file"))
    assert f"folder '{tmp_path / 'file'}' cannot be made: '{tmp_path / 'file'}' is a file" in said
    monkeypatch.setattr(Path, "mkdir", refuse)
    said = fails(capsys, "rewrite", EXPORTED, str(tmp_path / "o"))
    assert "cannot be made: Permission denied; give one that can be written" in said
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = fails(capsys, "rewrite", EXPORTED, str(tmp_path))
    assert "cannot be written; give one that can" in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_leaves_no_half_copy(
    with_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def full(_: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(shutil, "copyfile", full)
    with (
        pytest.warns(UserWarning, match="is copied to"),
        pytest.raises(OSError, match="No space left on device"),
    ):
        moe_infer.lower(with_data, tmp_path / "o/o.onnx")
    assert not list((tmp_path / "o").iterdir())


def test_a_file_that_cannot_be_made_is_told_by_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("moe_infer.runtime.native")
    out = str(tmp_path / "none/t.npz")
    generated = ["--generate", "experts=8,top_k=1,layers=1,tokens=4"]
    said = fails(capsys, "simulate", *generated, "--save", out)
    assert said == f"moe-infer: error: '{out}': No such file or directory\n"


# --- Numbers


@pytest.mark.parametrize("given", [0, -3, 2**31, True, "2", 1.5])
def test_slots_that_are_no_number_of_experts(given: Any, tmp_path: Path) -> None:
    """Told before the experts are written, not after it."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"^max_concurrency must be a number of experts from"):
        moe_infer.rewrite(EXPORTED, out, max_concurrency=given, progress=False)
    assert not out.exists()


def test_seeds_and_tokens(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    generated = "experts=8,top_k=1,layers=1,tokens=4,seed=-1"
    for arguments in (
        ["run", model, CPU, "--seed", "-1"],
        ["verify", model, model, "--seed", "-1"],
        ["simulate", "--generate", generated],
    ):
        assert "seed must be at least 0, got -1" in fails(capsys, *arguments)
    assert "tokens must be at least 0, got -5" in fails(capsys, "inspect", model, "--tokens", "-5")
    for option, value in (("--shape", "x=1,²,8"), ("--dim", "seq=²")):
        assert "must be like NAME=" in fails(capsys, "run", model, CPU, option, value)


# --- Options that do nothing


def test_options_without_their_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "inspect", model, CPU)
    assert "--provider says where --plan makes its session; give --plan, too" in said
    assert "leave --tokens away" in fails(capsys, "inspect", model, "--plan", "--tokens", "4")
    given = ["--generate", "experts=8,top_k=1,layers=1,tokens=4", "--input", "x.npz"]
    assert "--input is for --record MODEL" in fails(capsys, "simulate", *given)


def test_workspace_without_a_gpu(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_infer import inspect

    monkeypatch.setattr(inspect, "_workspace", lambda *_: None)
    for arguments, cell in (([], "not asked (--tokens"), (["--tokens", "4"], "no GPU to ask")):
        assert main(["inspect", model, *arguments]) == 0
        assert cell in capsys.readouterr().out


def test_help_shows_percents_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    shown = capsys.readouterr().out
    assert "16,25%" in shown and "%%" not in shown


# --- Arrays


def test_arrays_that_cannot_be_read(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before a session is made, which on a GPU may take minutes."""

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a session was made")

    monkeypatch.setattr(moe_infer.InferenceSession, "__init__", made)
    monkeypatch.chdir(tmp_path)
    np.savez("whole.npz", x=np.zeros((1, 2, D_MODEL), np.float32))
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:100])
    Path("empty.npy").touch()
    Path("text.npy").write_text("x")
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez("objects.npz", x=np.array([{}], object))
    np.save("one.npy", np.zeros(3, np.float32))
    shutil.copy("one.npy", "one.npz")
    for given in ("x=empty.npy", "x=text.npy", "x=objects.npy", "objects.npz", "cut.npz"):
        said = fails(capsys, "run", model, CPU, "--input", given)
        assert f"--input {given}: '{given.removeprefix('x=')}' is damaged or does not hold" in said
        assert "pickle" not in said  # NumPy's advice is to trust the file
    for given, message in (
        ("x=none.npy", "--input x=none.npy: cannot read 'none.npy': No such file or directory"),
        ("none.npz", "--input none.npz: cannot read 'none.npz': No such file or directory"),
        ("x=.", "cannot read '.': Is a directory"),
        ("one.npy", "--input must be NAME=FILE.npy or FILE.npz, got 'one.npy'"),
        ("one.npz", "--input one.npz: it holds one array; give NAME=one.npz"),
        ("x=whole.npz", "expected one .npy array; an npz takes no name"),
    ):
        assert message in fails(capsys, "run", model, CPU, "--input", given)


def test_arrays_of_another_type(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "input 'x' is {}, but the model takes float32; convert it with astype('float32')"
    for values in (np.zeros((1, 2, D_MODEL)), np.full((1, 2, D_MODEL), "a")):
        np.save(tmp_path / "x.npy", values)
        given = ["--input", f"x={tmp_path / 'x.npy'}"]
        for command in (
            ["run", model, CPU],
            ["verify", model, model],
            ["simulate", "--record", model],
        ):
            assert message.format(values.dtype) in fails(capsys, *command, *given)


def test_bfloat16_arrays_come_back_from_a_file(model: str, tmp_path: Path) -> None:
    graph = onnx.load(model)
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    x = np.linspace(-1, 1, 2 * D_MODEL).reshape(1, 2, D_MODEL).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    feeds = make_feeds(graph, given={"x": np.load(tmp_path / "x.npy")})
    assert feeds["x"].dtype == x.dtype and np.array_equal(feeds["x"], x)
    with pytest.raises(ValueError, match="'x' is float32, but the model takes bfloat16"):
        make_feeds(graph, given={"x": x.astype(np.float32)})


# --- The process


def test_what_is_not_installed_and_control_c(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks(*_: object, **__: object) -> None:
        raise ImportError("a picture needs matplotlib: pip install 'moe-infer[plot]'")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moe_infer, "inspect_model", lacks)
    assert "pip install 'moe-infer[plot]'" in fails(capsys, "inspect", model)
    monkeypatch.setattr(moe_infer, "inspect_model", interrupted)
    assert main(["inspect", model]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "moe-infer: interrupted\n"
