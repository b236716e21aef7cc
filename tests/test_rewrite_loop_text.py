"""Unrolled loops in ONNX text: other experts, other numbers of choices, the memory of a rewrite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import moe_infer
from compare_rewrites import check_same
from models_loop import D_MODEL, loop
from moe_infer.graph.external import ExternalDataError
from moe_infer.weights import open_weight_file
from rewrite_memory import grown_by_rewrite


def _feeds(count: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(count).standard_normal((count, D_MODEL))
    return {"x": x.astype(np.float32)}


@pytest.mark.parametrize("plain", [False, True], ids=["gated", "plain with biases"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_apart_are_found_and_compute_the_same(
    top_k: int, plain: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(loop(top_k, plain), path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == 1, str(report)
    (layer,) = report.layers
    assert layer.config.top_k == top_k
    assert layer.config.expert_bias == int(plain)
    assert layer.config.expert_sublayer_type == ("ReLU_FF" if plain else "Gated_SiLU")
    assert report.model_path is not None
    check_same(path, report.model_path, [_feeds(n) for n in (1, 0, 9)])


def _large(folder: Path) -> tuple[Path, int]:
    """Experts of 3 times 8 MB each in one external file, and the bytes of all."""
    model = loop(hidden=4096, d_model=512, values=False)
    path, offset = folder / "in" / "model.onnx", 0
    path.parent.mkdir()
    generator = np.random.default_rng(0)
    with open(path.with_name("weights"), "wb") as file:
        for info in list(model.graph.value_info):
            if info.type.tensor_type.elem_type != TensorProto.FLOAT:
                continue
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            values = generator.standard_normal(shape, dtype=np.float32)
            file.write(values.tobytes())
            tensor = model.graph.initializer.add(
                name=info.name, data_type=TensorProto.FLOAT, dims=shape
            )
            tensor.data_location = TensorProto.EXTERNAL
            told = (("location", "weights"), ("offset", offset), ("length", values.nbytes))
            for key, value in told:
                tensor.external_data.add(key=key, value=str(value))
            offset += values.nbytes
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())
    return path, offset


def test_experts_apart_are_written_one_by_one(tmp_path: Path) -> None:
    """Of 100 MB of experts memory holds a part of one: 8 MB, its transpose, the packed 16 MB."""
    path, total = _large(tmp_path)
    assert total > 100e6
    grown = grown_by_rewrite(path, tmp_path / "out")
    assert grown < 70e6, f"{grown / 1e6:.0f} MB"
    file = open_weight_file(tmp_path / "out" / "experts.safetensors")
    model = onnx.load(path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    gate_up = file.read("layers.0.gate_up")
    for e in range(4):
        np.testing.assert_array_equal(gate_up[e, 0::2], stored[f"gate_{e}"].T)
        np.testing.assert_array_equal(gate_up[e, 1::2], stored[f"up_{e}"].T)
    np.testing.assert_array_equal(file.read("layers.0.down")[3], stored["down_3"].T)


def test_a_weight_outside_its_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path, total = _large(tmp_path)
    with open(path.with_name("weights"), "r+b") as file:
        file.truncate(total - 1)
    with pytest.raises(ExternalDataError, match="down_3"):
        moe_infer.rewrite(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_several_types_are_refused_or_kept(tmp_path: Path) -> None:
    """A stacked tensor has one type; experts of several are not mixed."""
    model = loop()
    for tensor in model.graph.initializer:
        if tensor.name == "down_2":
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, "down_2"))
    (product,) = [n for n in model.graph.node if "down_2" in n.input]
    product.input[1] = "wide"
    cast = onnx.helper.make_node("Cast", ["down_2"], ["wide"], to=TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExternalDataError, match="differ in shape or type"):
        moe_infer.rewrite(tmp_path / "model.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
