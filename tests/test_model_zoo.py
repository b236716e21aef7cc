"""The zoo's models are what tests of exports need: every part of them shows in their logits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_zoo  # noqa: E402
from evaluate_graph import run_runtime  # noqa: E402

pytestmark = pytest.mark.needs_torch


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_the_experts_matter(family: str) -> None:
    """An expert more or less changes the logits by far more than the tolerance of comparisons."""
    made, logits = model_zoo.make(family), model_zoo.expected(family)
    assert np.isfinite(logits).all()
    names = [n for n, p in made.model.named_parameters() if p.dim() == 3]
    assert len(names) >= 2 * model_zoo.FAMILIES[family].moe_layers
    with torch.no_grad():
        for name in names:
            parameter = made.model.get_parameter(name)
            kept = parameter[0].clone()
            parameter[0] = 0
            changed = made.model(**made.inputs, use_cache=False).logits.numpy()
            parameter[0] = kept
            assert np.abs(changed - logits).max() > 0.01, name


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3"])
def test_an_export_computes_what_pytorch_does_at_any_length(family: str) -> None:
    path = model_zoo.export(family, "torchscript")
    assert path == model_zoo.export(family, "torchscript")
    made = model_zoo.make(family)
    (logits,) = run_runtime(path, made.arrays)
    np.testing.assert_allclose(logits, model_zoo.expected(family), rtol=0, atol=1e-4)
    model = onnx.load(path)
    for value in model.graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "seq"]
    (shorter,) = run_runtime(path, {n: a[:1, :3] for n, a in made.arrays.items()})
    # The models are causal.
    np.testing.assert_allclose(shorter, logits[:1, :3], rtol=0, atol=1e-4)
