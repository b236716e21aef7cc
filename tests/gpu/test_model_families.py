"""Every family of the model zoo, exported here and run through ONNX Runtime's TensorRT provider."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from gpu_models import run  # noqa: E402
from tensorrt_needed import ENGINE, TRT  # noqa: E402

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from layer_models import assert_close  # noqa: E402

EXPORTERS = ("dynamo", "torchscript")
"""The first that works."""
CUDA = "CUDAExecutionProvider"
LOWERED = ("Mixtral", "gpt-oss", "DeepSeek-V3", "OLMoE")
NO_ENGINE = "JetMoE"
"""docs/models.md has the operators of its attention that TensorRT cannot build."""


pytestmark = ENGINE


def exported(family: str) -> tuple[str, Path]:
    """Exporter and graph; skips with the exporters' own words where none of them can."""
    errors = []
    for exporter in EXPORTERS:
        try:
            return exporter, model_zoo.export(family, exporter)
        except Exception as error:  # exporters let any exception through
            errors.append(f"{exporter}: {type(error).__name__}: {error}")
    pytest.skip(f"{family} cannot be exported with torch {torch.__version__}: {' | '.join(errors)}")


@pytest.mark.parametrize("family", [f for f in model_zoo.FAMILIES if f != NO_ENGINE])
def test_family(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """All logits at the tolerance of a single layer in float32 (1e-5, 1e-4), TF32 off."""
    exporter, path = exported(family)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == model_zoo.FAMILIES[family].moe_layers, str(report)
    ran = run(tmp_path / "out/model.onnx", model_zoo.make(family).arrays, tmp_path)
    expected = model_zoo.expected(family)
    record_property("exporter", exporter)
    record_property("nodes", ran.parts())
    record_property("difference", float(np.abs(ran.logits - expected).max()))
    ran.check_on_tensorrt()
    assert ran.layers == len(report.layers)
    assert_close(ran.logits, expected, "float32")


def test_a_model_without_an_engine(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Its run says how the layers go to TensorRT alone, which is right, as it is lowered."""
    # TorchScript's export is right for its sample input only.
    path = model_zoo.export(NO_ENGINE, "dynamo")
    report = moe_infer.rewrite(path, tmp_path / "out")
    feeds, model = model_zoo.make(NO_ENGINE).arrays, tmp_path / "out/model.onnx"
    with pytest.raises(Exception, match=r"failed to create engine.*layers_only=True"):
        run(model, feeds, tmp_path)
    ran = run(model, feeds, tmp_path, layers_only=True)
    ran.check_on_tensorrt()
    record_property("nodes", ran.parts())
    # Copies between devices stand under this provider, too.
    engines = {name for provider, _, name in ran.nodes if provider == TRT and "TRTKernel" in name}
    assert len(engines) == len(report.layers)
    assert_close(ran.logits, model_zoo.expected(NO_ENGINE), "float32")
    check_lowered(NO_ENGINE, model, len(report.layers), tmp_path)


@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason=f"no {CUDA}")
@pytest.mark.parametrize("family", LOWERED)
def test_lowered_for_cuda(family: str, tmp_path: Path) -> None:
    """What a machine with a GPU and without TensorRT runs."""
    _, path = exported(family)
    report = moe_infer.rewrite(path, tmp_path / "out")
    check_lowered(family, tmp_path / "out/model.onnx", len(report.layers), tmp_path)


def check_lowered(family: str, model: Path, layers: int, folder: Path) -> None:
    """On CUDA, and the CPU for what CUDA lacks: PyTorch's logits at the tolerance of a layer."""
    # By default ONNX Runtime's CUDA provider rounds float32 products to TF32.
    cuda = (CUDA, {"use_tf32": "0"})
    ran = run(model, model_zoo.make(family).arrays, folder, [cuda, "CPUExecutionProvider"])
    assert ran.lowered
    assert ran.layers == layers
    assert any(provider == CUDA for provider, _, _ in ran.nodes)
    assert_close(ran.logits, model_zoo.expected(family), "float32")
