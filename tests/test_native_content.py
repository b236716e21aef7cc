"""What the library checks of the weights themselves, when asked to; and a file cut under its hands.

The sentences must be those of the Python readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_infer.runtime import native
from moe_infer.weights import WeightFileError, open_expert_weights, open_weight_file
from native.weight_reader import WeightReader, build, why_not
from test_weights_experts import EXPERTS, FILES, H, config, save, separate, stacked

ROOT = Path(__file__).resolve().parent.parent
FINITE, CRC = "MOE_INFER_CHECK_FINITE", "MOE_INFER_CHECK_CRC"
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]

pytestmark = pytest.mark.needs_library


@pytest.fixture(scope="module")
def program() -> Path:
    if reason := why_not():
        pytest.skip(reason)
    return build(ROOT / "build/read_weights")


@pytest.fixture(scope="module")
def checking(program: Path) -> Iterator[WeightReader]:
    reader = WeightReader(program, {FINITE: "1", CRC: "1"})
    yield reader
    assert reader.finish() == ""


@pytest.fixture(scope="module")
def trusting(program: Path) -> Iterator[WeightReader]:
    reader = WeightReader(program, {FINITE: "", CRC: "0"})
    yield reader
    assert reader.finish() == ""


def loads(reader: WeightReader, path: Path, prefix: str = "", hidden: int = H) -> str:
    """The error, "" if there is none."""
    answer = reader.ask("experts", path, prefix or "-", EXPERTS, hidden)
    return answer if isinstance(answer, str) else ""


def python_says(path: Path, prefix: str = "", hidden: int = H) -> str:
    try:
        made = config(path, expert_weight_prefix=prefix, hidden_size=hidden)
        open_expert_weights(made).check_finite()
    except WeightFileError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_finite(
    checking: WeightReader,
    trusting: WeightReader,
    form: str,
    name: str,
    dtype: Any,
    value: float,
    tmp_path: Path,
) -> None:
    arrays = separate(dtype) if form == "separate" else stacked(separate(dtype))
    path = save(tmp_path / f"good-{name}", arrays)
    assert loads(checking, path) == ""
    key, index = ("2/wo_weight", (3, 1)) if form == "separate" else ("gate_up", (1, 10, 3))
    arrays[key][index] = value
    path = save(tmp_path / name, arrays)
    said = loads(checking, path)
    assert f"'{key}' holds" in said and str(list(index)) in said
    assert said == python_says(path)
    assert loads(trusting, path) == ""


@pytest.mark.parametrize("name", FILES)
def test_the_first_bad_expert_is_told(checking: WeightReader, name: str, tmp_path: Path) -> None:
    arrays = separate()
    for key in ("2/layer_norm_weight", "1/wo_weight", "1/wi_1_weight"):
        arrays[key].flat[1] = np.nan
    path = save(tmp_path / name, arrays)
    said = loads(checking, path)
    assert "tensor '1/wi_1_weight' holds nan at [0, 1]" in said
    assert said == python_says(path)


@pytest.mark.parametrize("at", [(0, 1), (65_536, 0), (2_500_001, 1), (5_999_999, 1)])
def test_large_tensors_are_checked_in_parts(
    checking: WeightReader, at: tuple[int, int], tmp_path: Path
) -> None:
    """Three experts of 24 MB each: more than one thread's part, and than one read."""
    hidden = 3_000_000
    shapes = {"layer_norm": (2,), "gate_up": (2 * hidden, 2), "down": (2, hidden)}
    arrays = {name: np.ones((EXPERTS, *shape), np.float16) for name, shape in shapes.items()}
    arrays["gate_up"][1][at] = np.nan
    path = save(tmp_path / "w.npz", arrays)
    said = loads(checking, path, hidden=hidden)
    assert f"expert 1 of tensor 'gate_up' holds nan at [1, {at[0]}, {at[1]}]" in said
    assert said == python_says(path, hidden=hidden)


def test_other_layers_of_the_file_are_left_alone(checking: WeightReader, tmp_path: Path) -> None:
    good, bad = separate(prefix="layers.0."), separate(prefix="layers.1.")
    bad["layers.1.0/wo_weight"][0, 0] = np.inf
    path = save(tmp_path / "w.npz", {**good, **bad})
    assert loads(checking, path, "layers.0.") == ""
    assert "'layers.1.0/wo_weight' holds inf at [0, 0]" in loads(checking, path, "layers.1.")


@pytest.mark.parametrize("where", ["header", "data"])
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_stored_members_have_their_crc(
    checking: WeightReader, trusting: WeightReader, form: str, where: str, tmp_path: Path
) -> None:
    arrays = separate() if form == "separate" else stacked(separate())
    path = save(tmp_path / "w.npz", arrays)
    assert loads(checking, path) == ""
    key = "1/wi_0_weight" if form == "separate" else "down"
    whole = bytearray(path.read_bytes())
    info = open_weight_file(path).tensors[key]
    # The lowest bit of a fraction, or a space that pads the .npy header.
    at = info.offset + 8 if where == "data" else info.offset - 2
    assert where == "data" or whole[at : at + 2] == b" \n"
    whole[at] ^= 1 if where == "data" else ord(" ") ^ ord("\t")
    path = tmp_path / "damaged.npz"
    path.write_bytes(whole)
    said = loads(checking, path)
    if where == "data":
        with pytest.raises(WeightFileError) as error:
            open_weight_file(path).verify_content()
        assert said == str(error.value)
        assert f"member '{key}.npy' are damaged (CRC" in said
        assert loads(trusting, path) == ""
    else:
        assert said  # by the CRC, or because such a header is refused anyway


@pytest.mark.parametrize("variable", [FINITE, CRC])
@pytest.mark.parametrize("value", ["yes", "2", " 1"])
def test_bad_values_of_the_variables(
    program: Path, variable: str, value: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "w.safetensors", separate())
    reader = WeightReader(program, {variable: value})
    with pytest.raises(AssertionError, match=f"error 1 .*{variable} must be 1 .*got '{value}'"):
        loads(reader, path)
    assert reader.finish() == ""


def test_check_of_the_c_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arrays = separate()
    arrays["0/wi_0_weight"][2, 1] = np.nan
    path = save(tmp_path / "w.npz", arrays)
    attributes = config(path).to_attributes()
    native.check(attributes)
    monkeypatch.setenv(FINITE, "1")
    with pytest.raises(WeightFileError) as error:
        native.check(attributes)
    assert str(error.value) == python_says(path)
    monkeypatch.setenv(FINITE, "0")
    native.check(attributes)
    monkeypatch.setenv(FINITE, "on")
    with pytest.raises(ValueError, match=f"{FINITE} must be 1"):
        native.check(attributes)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_a_file_that_is_cut_after_loading_is_an_error(
    program: Path, form: str, name: str, tmp_path: Path
) -> None:
    """In place, as no writer should: of a mapping the process would die."""
    arrays = separate() if form == "separate" else stacked(separate())
    reader = WeightReader(program)
    for keep in (0, 0.1, 0.5):
        path = save(tmp_path / name, arrays)
        cut = int(path.stat().st_size * keep)
        answer = reader.ask("cut", cut, path, "-", EXPERTS, H)
        if "deflated" in name:
            assert isinstance(answer, dict)  # it was inflated
        else:
            assert isinstance(answer, str)
            assert f"{path}: " in answer and "the file has shrunk" in answer
    assert reader.finish() == ""
