"""Where a weight file is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_infer.weights import WeightFileError, resolve_weight_path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("model", "environment", "working")}
    for folder in made.values():
        folder.mkdir()
    monkeypatch.setenv("MOE_INFER_WEIGHT_DIR", str(made["environment"]))
    monkeypatch.chdir(made["working"])
    return made


def test_order(folders: dict[str, Path]) -> None:
    for folder in reversed(folders.values()):
        (folder / "w.npz").touch()
        assert resolve_weight_path("w.npz", folders["model"]) == folder / "w.npz"
    assert resolve_weight_path("w.npz") == folders["environment"] / "w.npz"


def test_working_folder_without_the_variable(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("MOE_INFER_WEIGHT_DIR")
        else:
            monkeypatch.setenv("MOE_INFER_WEIGHT_DIR", value)
        (folders["working"] / "w.npz").touch()
        assert resolve_weight_path("w.npz") == folders["working"] / "w.npz"


def test_absolute_is_taken_as_it_is(folders: dict[str, Path]) -> None:
    (folders["environment"] / "w.npz").touch()
    absolute = folders["working"] / "w.npz"
    with pytest.raises(FileNotFoundError) as error:
        resolve_weight_path(absolute, folders["model"])
    assert str(folders["environment"]) not in str(error.value)
    absolute.touch()
    assert resolve_weight_path(absolute, folders["model"]) == absolute


def test_message_lists_what_was_tried(folders: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"'w\.npz' not found; tried .*; set MOE_INFER_W"):
        resolve_weight_path("w.npz", folders["model"])
    try:
        resolve_weight_path("w.npz", folders["model"])
    except FileNotFoundError as error:
        tried = [str(folder / "w.npz") for folder in folders.values()]
        assert ", ".join(tried) in str(error)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_no_path(path: str) -> None:
    with pytest.raises(WeightFileError, match="must be a non-empty text without NUL, got"):
        resolve_weight_path(path)
