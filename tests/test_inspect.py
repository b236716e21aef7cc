"""What moe_infer.inspect_model tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import moe_infer
from layer_models import layer_attributes, layer_model, make_parts, write_experts
from moe_infer.inspect import LayerInfo

D_MODEL, HIDDEN, EXPERTS = 20, 36, 4


def described(tmp_path: Path, form: str, sublayer: str, dtype: str, **more: Any) -> LayerInfo:
    bias = bool(more.get("expert_bias"))
    parts = make_parts(sublayer, EXPERTS, D_MODEL, HIDDEN, "float16", bias=bias)
    path = write_experts(tmp_path / "experts", parts, sublayer, EXPERTS, form)
    attributes = layer_attributes(
        sublayer, "default", EXPERTS, D_MODEL, HIDDEN, 1, path.name, centroids=False, **more
    )
    onnx.save(layer_model([attributes], D_MODEL, dtype), tmp_path / "model.onnx")
    (layer,) = moe_infer.inspect_model(tmp_path / "model.onnx")
    return layer


def test_sizes(tmp_path: Path) -> None:
    layer = described(tmp_path, "safetensors stacked", "T5_FF", "float32", max_concurrency=3)
    assert (layer.experts, layer.top_k, layer.router) == (4, 1, "default")
    assert layer.router_input == "router_logits"
    assert (layer.d_model, layer.hidden_size, layer.dtype) == (20, 36, "float32")
    assert layer.shape == ("batch", "seq", 20)
    assert layer.weight_dtype == "float16"
    assert layer.weight_format == "safetensors, stacked"
    assert layer.parameters == 4 * (20 + 3 * 20 * 36)
    # float16 in the file, float32 on the GPU: 80, 5760 and 2880 bytes, each padded to 256.
    assert layer.disk_bytes == layer.host_bytes == 2 * layer.parameters
    assert layer.slot_bytes == 256 + 5888 + 3072
    assert layer.slots == 3
    assert layer.slots_bytes == layer.gpu_bytes == 3 * layer.slot_bytes
    assert layer.workspace_bytes is None
    assert layer.cuda_graph == "no: the weights are float16, the model float32"
    assert layer.lowering.startswith("an If for each expert")


def test_slots_are_no_more_than_experts(tmp_path: Path) -> None:
    layer = described(tmp_path, "npz stored", "Gated_SiLU", "float16", max_concurrency=99)
    assert layer.slots == EXPERTS
    assert layer.slot_bytes == 2 * 36 * 20 * 2 + 192 + 1440 + 96


def test_biases(tmp_path: Path) -> None:
    layer = described(tmp_path, "safetensors stacked", "ReLU_FF", "float16", expert_bias=1)
    assert layer.biases
    assert layer.parameters == 4 * (2 * 36 * 20 + 36 + 20)
    assert layer.disk_bytes == layer.host_bytes == 2 * layer.parameters
    assert layer.slot_bytes == 2 * 1536 + 256 + 256
    assert not described(tmp_path, "safetensors stacked", "ReLU_FF", "float16").biases


def test_deflated_experts(tmp_path: Path) -> None:
    layer = described(tmp_path, "npz deflated", "Gated_SiLU", "float32")
    assert layer.host_bytes == 2 * layer.parameters
    size = (tmp_path / "experts.npz").stat().st_size
    assert 0.5 * size < layer.disk_bytes < size
    assert layer.disk_bytes != layer.host_bytes


def test_identity_takes_nothing(tmp_path: Path) -> None:
    attributes = layer_attributes(
        "Identity", "default", EXPERTS, D_MODEL, HIDDEN, 1, "", centroids=True
    )
    (layer,) = moe_infer.inspect_model(layer_model([attributes], D_MODEL))
    assert layer.router_input == "expert_centroids"
    sizes = (layer.parameters, layer.disk_bytes, layer.host_bytes, layer.gpu_bytes, layer.slots)
    assert sizes == (0, 0, 0, 0, 0)
    assert layer.lowering == "nothing to run"


def test_the_same_checks_as_a_session(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"layer 'moe_0': .*nowhere.npz"):
        attributes = layer_attributes(
            "T5_FF", "default", EXPERTS, D_MODEL, HIDDEN, 1, "nowhere.npz", centroids=True
        )
        moe_infer.inspect_model(layer_model([attributes], D_MODEL))


@pytest.mark.parametrize(
    ("form", "sublayer", "more", "said"),
    [
        ("safetensors stacked", "Gated_SiLU", {"max_concurrency": 3}, "up to 3 tokens"),
        ("safetensors stacked", "Gated_SiLU", {"max_concurrency": 1}, "up to 1 token"),
        ("safetensors stacked", "Gated_SiLU", {"max_concurrency": 4}, "any number of tokens"),
        ("npz deflated", "ReLU_FF", {"max_concurrency": 2}, "up to 2 tokens"),
        ("npz stored", "Gated_SiLU", {}, "no: gate_weight and up_weight are tensors of their own"),
        (
            "safetensors stacked",
            "ReLU_FF",
            {"expert_bias": 1},
            "no: an expert's up_bias does not begin at a multiple of 16 bytes",
        ),
    ],
)
def test_cuda_graph(
    tmp_path: Path, form: str, sublayer: str, more: dict[str, Any], said: str
) -> None:
    """36 biases of 2 bytes are no multiple of 16; 20 x 36 weights are one."""
    assert described(tmp_path, form, sublayer, "float16", **more).cuda_graph == said
