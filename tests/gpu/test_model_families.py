"""Every family of the model zoo, exported here and run through ONNX Runtime's TensorRT provider."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from gpu_models import run  # noqa: E402
from tensorrt_needed import ENGINE  # noqa: E402

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
from layer_models import assert_close  # noqa: E402

EXPORTERS = ("dynamo", "torchscript")
EXPORTERS_OF = {"JetMoE": ("dynamo", "transformers")}
"""The first that works; TorchScript's export of JetMoE is right for its sample input only."""


pytestmark = ENGINE


def exported(family: str) -> tuple[str, Path]:
    """Exporter and graph; skips with the exporters' own words where none of them can."""
    errors = []
    for exporter in EXPORTERS_OF.get(family, EXPORTERS):
        try:
            return exporter, model_zoo.export(family, exporter)
        except Exception as error:  # exporters let any exception through
            errors.append(f"{exporter}: {type(error).__name__}: {error}")
    pytest.skip(f"{family} cannot be exported with torch {torch.__version__}: {' | '.join(errors)}")


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
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
