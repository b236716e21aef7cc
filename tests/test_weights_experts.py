"""A layer's experts in a file: both forms, and one bad file for every error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_infer.op import LayerConfig
from moe_infer.weights import (
    ExpertWeights,
    SafetensorsWriter,
    WeightFileError,
    open_expert_weights,
    open_weight_file,
    write_npz,
)

EXPERTS, D, H = 3, 4, 6
Arrays = dict[str, np.ndarray]


def config(path: Path, **changes: Any) -> LayerConfig:
    attributes = {
        "expert_count": EXPERTS,
        "hidden_size": H,
        "expert_sublayer_type": "T5_FF",
        "expert_weight_file": str(path),
    }
    return LayerConfig.from_attributes({**attributes, **changes})


def separate(dtype: Any = np.float32, prefix: str = "", experts: int = EXPERTS) -> Arrays:
    rng = np.random.default_rng(3)
    shapes = {"layer_norm_weight": (D,), "wi_0_weight": (H, D), "wi_1_weight": (H, D)}
    shapes["wo_weight"] = (D, H)
    return {
        f"{prefix}{e}/{part}": rng.standard_normal(shape).astype(dtype)
        for e in range(experts)
        for part, shape in shapes.items()
    }


def stacked(arrays: Arrays, prefix: str = "", experts: int = EXPERTS) -> Arrays:
    """The rows of wi_0 and wi_1 in turn, written by a loop as the definition says it."""

    def stack(part: str) -> np.ndarray:
        return np.array([arrays[f"{prefix}{e}/{part}"] for e in range(experts)])

    gate, up = stack("wi_0_weight"), stack("wi_1_weight")
    gate_up = np.zeros((experts, 2 * H, D), gate.dtype)
    for row in range(H):
        gate_up[:, 2 * row], gate_up[:, 2 * row + 1] = gate[:, row], up[:, row]
    return {
        f"{prefix}layer_norm": stack("layer_norm_weight"),
        f"{prefix}gate_up": gate_up,
        f"{prefix}down": stack("wo_weight"),
    }


def save(path: Path, arrays: Arrays) -> Path:
    if path.suffix == ".npz":
        write_npz(path, arrays.items(), compress="deflated" in path.name)
    else:
        kinds = {name: (a.dtype.name, a.shape) for name, a in arrays.items()}
        with SafetensorsWriter(path, kinds) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
    return path


FILES = ["w.npz", "deflated.npz", "w.safetensors"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", ["", "layers.3."])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_forms_agree(form: str, name: str, prefix: str, dtype: Any, tmp_path: Path) -> None:
    arrays = separate(dtype, prefix)
    packed = stacked(arrays, prefix)
    other = {f"layers.4.{n}": a for n, a in arrays.items()} if prefix else {}
    path = save(tmp_path / name, {**(arrays if form == "separate" else packed), **other})
    weights = open_expert_weights(config(path, expert_weight_prefix=prefix))
    assert isinstance(weights, ExpertWeights)
    assert (weights.form, weights.d_model) == (form, D)
    assert weights.dtype == np.dtype(dtype).name
    assert weights.dtypes == dict.fromkeys(("layer_norm", "gate_up", "down"), weights.dtype)
    assert weights.nbytes == sum(a.nbytes for a in arrays.values())
    weights.check_finite()
    for e in range(EXPERTS):
        expert = weights.expert(e)
        assert list(expert) == ["layer_norm", "gate_up", "down"]
        for tensor, array in expert.items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, packed[prefix + tensor][e])
            assert not array.flags.writeable
    with pytest.raises(IndexError, match="expert 3 of 3"):
        weights.expert(EXPERTS)
    with pytest.raises(IndexError):
        weights.expert(-1)
    info = weights.stacked("gate_up")
    part = weights.part(2, "wi_1_weight")
    if form == "stacked":
        assert info is not None and info.shape == (EXPERTS, 2 * H, D) and part is None
    else:
        assert part is not None and part.name == f"{prefix}2/wi_1_weight" and info is None


def test_types_may_differ_between_tensors(tmp_path: Path) -> None:
    arrays = separate(np.float16)
    for name in arrays:
        if "norm" in name:
            arrays[name] = arrays[name].astype(np.float32)
    weights = open_expert_weights(config(save(tmp_path / "w.npz", arrays)))
    assert weights.dtype == "float16"
    assert weights.dtypes == {"layer_norm": "float32", "gate_up": "float16", "down": "float16"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_biases(form: str, name: str, tmp_path: Path) -> None:
    """One-dimensional, and alternating as the rows of their tensor do."""
    rng = np.random.default_rng(4)
    shapes = {"gate_weight": (H, D), "up_weight": (H, D), "down_weight": (D, H)}
    shapes |= {"gate_bias": (H,), "up_bias": (H,), "down_bias": (D,)}
    arrays = {
        f"{e}/{part}": rng.standard_normal(shape).astype(np.float32)
        for e in range(EXPERTS)
        for part, shape in shapes.items()
    }
    expected = {}
    for tensor, parts in {
        "gate_up": ("gate_weight", "up_weight"),
        "down": ("down_weight",),
        "gate_up_bias": ("gate_bias", "up_bias"),
        "down_bias": ("down_bias",),
    }.items():
        packed = [
            [row for rows in zip(*(arrays[f"{e}/{p}"] for p in parts), strict=True) for row in rows]
            for e in range(EXPERTS)
        ]
        expected[tensor] = np.array(packed)
    path = save(tmp_path / name, arrays if form == "separate" else expected)
    layer = config(path, expert_sublayer_type="Clamped_SwiGLU", expert_bias=1)
    weights = open_expert_weights(layer)
    assert (weights.form, weights.d_model) == (form, D)
    assert weights.nbytes == sum(a.nbytes for a in arrays.values())
    for e in range(EXPERTS):
        expert = weights.expert(e)
        assert list(expert) == list(expected)
        for tensor, array in expert.items():
            np.testing.assert_array_equal(array, expected[tensor][e])
    unbiased = config(path, expert_sublayer_type="Clamped_SwiGLU")
    with pytest.raises(WeightFileError, match=r"do not belong .*_bias'.*; check .* 'expert_bias'"):
        open_expert_weights(unbiased)
    arrays = arrays if form == "separate" else expected
    arrays.pop("0/up_bias" if form == "separate" else "down_bias")
    save(path, arrays)
    with pytest.raises(WeightFileError, match=r"experts of \w+ with biases are missing: '.*_bias"):
        open_expert_weights(layer)


def test_sublayer_without_weights_opens_no_file() -> None:
    identity = config(Path("nowhere.npz"), expert_sublayer_type="Identity", hidden_size=0)
    weights = open_expert_weights(identity, d_model=5)
    assert (weights.file, weights.d_model, weights.nbytes) == (None, 5, 0)
    assert (weights.expert(0), weights.dtype, weights.stacked("down")) == ({}, "float32", None)
    weights.check_finite()


def rename(old: str, new: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {new if n == old else n: a for n, a in arrays.items()}


def replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {n: make(a) if n == name else a for n, a in arrays.items()}


def without(start: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {n: a for n, a in arrays.items() if not n.startswith(start)}


BAD: dict[str, tuple[str, Callable[[Arrays], Arrays], str]] = {
    "expert_missing": (
        "separate",
        without("1/"),
        "4 of 12 tensors for 3 experts of T5_FF are missing: '1/layer_norm_weight', .*"
        "the file holds .* check attributes 'expert_count'.*or write the file again",
    ),
    "part_missing": ("separate", without("2/wo"), "1 of 12 .* are missing: '2/wo_weight';"),
    "expert_surplus": (
        "separate",
        lambda arrays: separate(experts=4),
        "4 tensors under prefix '' do not belong to 3 experts of T5_FF: '3/layer_norm_weight', .*"
        "check attributes 'expert_count'",
    ),
    "expert_numbered_oddly": (
        "separate",
        rename("1/wo_weight", "01/wo_weight"),
        "1 of 12 .* are missing: '1/wo_weight'",
    ),
    "part_surplus": (
        "separate",
        lambda a: {**a, "0/bias": np.zeros(3, np.float32)},
        "1 tensors under prefix '' do not belong .*: '0/bias'",
    ),
    "stacked_missing": ("stacked", without("down"), "1 of 3 .* are missing: 'down'; the file"),
    "stacked_surplus": (
        "stacked",
        lambda a: {**a, "gate_up_bias": np.zeros(3, np.float32)},
        "1 tensors under prefix '' do not belong .*: 'gate_up_bias'",
    ),
    "both_forms": (
        "stacked",
        lambda a: {**a, **separate(experts=1)},
        "4 tensors under prefix '' do not belong",
    ),
    "shape_wrong_by_one": (
        "separate",
        replace("1/wi_0_weight", lambda a: np.zeros((H, D + 1), np.float32)),
        r"'1/wi_0_weight' has shape \(6, 5\), expected \(6, 4\) \(expert_count 3, hidden_size 6,"
        r" d_model 4\); correct the attributes or write the file again",
    ),
    "transposed": (
        "separate",
        replace("0/wo_weight", lambda a: a.T.copy()),
        r"'0/wo_weight' has shape \(6, 4\), expected \(4, 6\)",
    ),
    "rank": (
        "separate",
        replace("0/layer_norm_weight", lambda a: a.reshape(())[()] if a.size == 1 else a[None]),
        r"'0/layer_norm_weight' has shape \(1, 4\), expected",
    ),
    "stacked_shape_wrong_by_one": (
        "stacked",
        replace("gate_up", lambda a: a[:, :-1]),
        r"'gate_up' has shape \(3, 11, 4\), expected \(3, 12, 4\)",
    ),
    "stacked_experts": (
        "stacked",
        replace("down", lambda a: a[:-1]),
        r"'down' has shape \(2, 4, 6\), expected \(3, 4, 6\)",
    ),
    "mixed_types": (
        "separate",
        replace("2/wi_1_weight", lambda a: a.astype(np.float16)),
        "'2/wi_1_weight' is float16, but '0/wi_0_weight' is float32; .* must have one type",
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", BAD)
def test_bad_layer(case: str, name: str, tmp_path: Path) -> None:
    form, change, message = BAD[case]
    arrays = separate() if form == "separate" else stacked(separate())
    path = save(tmp_path / name, change(arrays))
    with pytest.raises(WeightFileError, match=message) as error:
        open_expert_weights(config(path))
    assert str(path) in str(error.value)


def test_d_model_that_does_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "w.npz", separate())
    message = r"'0/layer_norm_weight' has shape \(4,\), expected \(5,\) .*d_model 5"
    with pytest.raises(WeightFileError, match=message):
        open_expert_weights(config(path), d_model=5)


def test_prefix_that_is_not_there(tmp_path: Path) -> None:
    path = save(tmp_path / "w.npz", separate(prefix="layers.0."))
    with pytest.raises(WeightFileError, match=r"missing: 'layers.1.0/.*; the file holds 'layers.0"):
        open_expert_weights(config(path, expert_weight_prefix="layers.1."))


def test_digest(tmp_path: Path) -> None:
    path = save(tmp_path / "w.safetensors", separate())
    digest = open_weight_file(path).digest
    open_expert_weights(config(path, expert_weight_digest=digest))
    arrays = separate()
    arrays["2/wo_weight"][0, 0] += 1  # same index but for the contents' digest
    save(path, arrays)
    message = f"attribute 'expert_weight_digest' is '{digest}': .* put that file back, or rewrite"
    with pytest.raises(WeightFileError, match=message):
        open_expert_weights(config(path, expert_weight_digest=digest))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", FILES)
def test_not_finite(name: str, dtype: Any, value: float, tmp_path: Path) -> None:
    arrays = separate(dtype)
    arrays["1/wo_weight"][2, 3] = value
    weights = open_expert_weights(config(save(tmp_path / name, arrays)))
    with pytest.raises(WeightFileError, match=rf"'1/wo_weight' holds {value} at \[2, 3\]; expec"):
        weights.check_finite()
    weights = open_expert_weights(config(save(tmp_path / name, stacked(arrays))))
    with pytest.raises(WeightFileError, match=rf"expert 1 of tensor 'down' holds {value} at \[1,"):
        weights.check_finite()


def test_relative_to_the_model(tmp_path: Path) -> None:
    save(tmp_path / "w.npz", separate())
    weights = open_expert_weights(config(Path("w.npz")), base_dir=tmp_path)
    assert weights.file is not None and weights.file.path == tmp_path / "w.npz"
