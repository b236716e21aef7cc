"""What tests/gpu does with whole models, on the CPU: the same functions, small sizes, lowered."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

import gpu_models  # noqa: E402
import large_models  # noqa: E402

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from layer_models import assert_close  # noqa: E402

pytestmark = pytest.mark.needs_torch

CPU = ["CPUExecutionProvider"]
SMALL = {
    "hidden_size": 128,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def test_a_family(tmp_path: Path) -> None:
    report = moe_infer.rewrite(model_zoo.export("Mixtral", "dynamo"), tmp_path / "out")
    feeds = model_zoo.make("Mixtral").arrays
    ran = gpu_models.run(tmp_path / "out/model.onnx", feeds, tmp_path, CPU)
    assert ran.layers == len(report.layers) == 2
    assert ran.lowered
    assert set(ran.parts()) == set(CPU)
    with pytest.raises(AssertionError):
        ran.check_on_tensorrt()
    assert_close(ran.logits, model_zoo.expected("Mixtral"), "float32")


def test_what_counts_as_on_tensorrt() -> None:
    engine = (gpu_models.TRT, "TRTKernel_0", "TRTKernel_0_kernel_time")
    rest = (CPU[0], "Gather", "embed_kernel_time")
    logits = np.zeros(1)
    gpu_models.Ran(logits, False, 1, [engine, rest]).check_on_tensorrt()
    alone = (gpu_models.TRT, "MoELayer", "MoELayer.0_kernel_time")
    for lowered, layers, nodes in (
        (True, 1, [engine]),
        (False, 0, [engine]),
        (False, 1, [rest]),
        (False, 1, [engine, alone]),
    ):
        with pytest.raises(AssertionError):
            gpu_models.Ran(logits, lowered, layers, nodes).check_on_tensorrt()


def test_a_large_model_made_small(tmp_path: Path) -> None:
    model = large_models.make(large_models.SHAPES["Qwen3-30B-A3B"], "cpu", **SMALL)
    inputs = large_models.make_inputs(model)
    expected = large_models.references(model, inputs)
    path = large_models.export(model, inputs, tmp_path)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    ranges = {"batch": (1, 2, 2), "seq": (1, 64, 64)}
    ran = gpu_models.run(path, feeds, tmp_path, CPU, dims=ranges)
    assert ran.layers == 2
    large_models.closeness(ran.logits, expected).check()
    # What is wrong is told: logits of other tokens, and of a model without its experts.
    for wrong in (np.roll(ran.logits, 1, axis=1), expected.without_experts):
        with pytest.raises(AssertionError):
            large_models.closeness(wrong, expected).check()
