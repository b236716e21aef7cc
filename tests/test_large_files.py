"""Offsets beyond 2 and 4 GiB, in files that are mostly holes and cost no disk."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import moe_infer
from evaluate_graph import assert_same_outputs
from layer_models import assert_close, config_of, layer_attributes, layer_model, make_parts, stack
from models_text import block
from moe_infer import reference
from moe_infer.graph.rewrite import rewrite
from moe_infer.runtime import native
from moe_infer.weights import open_expert_weights
from native.weight_reader import WeightReader, build, why_not

ROOT = Path(__file__).resolve().parent.parent
FAR = (9 << 29) + 64  # 4.5 GiB and a bit
EXPERTS, D_MODEL, HIDDEN = 4, 16, 24


def make_sparse(path: Path, size: int) -> None:
    """A file of that size without a block on the disk."""
    path.touch()
    try:
        os.truncate(path, size)
    except OSError as error:
        pytest.skip(f"no such large files here: {error}")
    if path.stat().st_blocks * 512 > 1 << 20:
        path.unlink()
        pytest.skip("no sparse files here")


def move_away(model: onnx.ModelProto, folder: Path) -> None:
    """Puts the experts' weights into external data behind FAR."""
    path = folder / "weights.data"
    tensors = [t for t in model.graph.initializer if len(t.dims) == 3]
    make_sparse(path, FAR + sum(len(t.raw_data) for t in tensors))
    offset = FAR
    with path.open("r+b") as file:
        for tensor in tensors:
            file.seek(offset)
            file.write(tensor.raw_data)
            where = {"location": path.name, "offset": offset, "length": len(tensor.raw_data)}
            offset += len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))


def test_rewrite_reads_external_data_from_behind_4_gib(tmp_path: Path) -> None:
    model = block()
    plain = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    folder = tmp_path / "in"
    folder.mkdir()
    move_away(model, folder)
    onnx.save(model, folder / "model.onnx")
    report = rewrite(folder / "model.onnx", tmp_path / "out")
    assert len(report.layers) == 1
    found = open_expert_weights(report.layers[0].config, base_dir=tmp_path / "out").expert(3)
    assert np.array_equal(found["gate_up"][0::2], plain["gate"][3])
    assert np.array_equal(found["down"], plain["down"][3])
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    assert_same_outputs(folder / "model.onnx", tmp_path / "out/model.onnx", {"x": x})


def write_far(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """A safetensors file whose first tensor, of 4.5 GiB, is a hole."""
    entries = {"hole": {"dtype": "F32", "shape": [FAR // 4], "data_offsets": [0, FAR]}}
    offset = FAR
    for name, array in tensors.items():
        span = [offset, offset + array.nbytes]
        entries[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    make_sparse(path, 8 + len(header) + offset)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(8 + len(header) + FAR)
        for array in tensors.values():
            file.write(array.tobytes())


@pytest.fixture
def far(tmp_path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """A layer whose weights lie behind 4.5 GiB of its file, and its packed tensors."""
    parts = make_parts("T5_FF", EXPERTS, D_MODEL, HIDDEN, "float32")
    tensors = {f"last.{name}": a for name, a in stack(parts, "T5_FF", EXPERTS).items()}
    path = tmp_path / "experts.safetensors"
    write_far(path, tensors)
    attributes = layer_attributes("T5_FF", "softmax_topk", EXPERTS, D_MODEL, HIDDEN, 2, path, False)
    return {**attributes, "expert_weight_prefix": "last."}, tensors


def test_a_session_reads_weights_from_behind_4_gib(far: Any) -> None:
    attributes, tensors = far
    config = config_of(attributes)
    weights = open_expert_weights(config)
    for name, array in weights.expert(2).items():
        assert np.array_equal(array, tensors[f"last.{name}"][2])
    rng = np.random.default_rng(2)
    x = rng.standard_normal((7, D_MODEL)).astype(np.float32)
    logits = rng.standard_normal((7, EXPERTS)).astype(np.float32)
    model = layer_model([attributes], D_MODEL, rank=2)
    session = moe_infer.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"x": x, "logits": logits})[0]
    assert_close(found, reference.moe_layer(x, config, weights, logits), "float32")


@pytest.mark.needs_library
def test_the_library_reads_weights_from_behind_4_gib(far: Any) -> None:
    attributes, tensors = far
    native.check(attributes)
    if reason := why_not():
        pytest.skip(reason)
    # To lock the file's pages it would be read first, holes and all.
    environment = {"MOE_INFER_CHECK_FINITE": "1", "MOE_INFER_PINNED_BYTES": "0"}
    reader = WeightReader(build(ROOT / "build/read_weights"), environment)
    path = attributes["expert_weight_file"]
    found = reader.ask("experts", path, "last.", EXPERTS, HIDDEN)
    assert isinstance(found, dict), found
    for e, expert in enumerate(found["experts"]):
        for name, (_, _, crc) in expert.items():
            assert crc == zlib.crc32(tensors[f"last.{name}"][e].tobytes())
    assert reader.finish() == ""
