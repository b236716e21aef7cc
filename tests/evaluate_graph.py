"""Evaluates graphs with MoELayer nodes by the float64 oracle, and plain ones by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from moe_infer.op import ATTRIBUTES, DOMAIN, LayerConfig
from moe_infer.reference import moe_layer
from moe_infer.weights import open_expert_weights


def moe_layer_operator(base_dir: Path) -> type[OpRun]:
    """Operator class for ``ReferenceEvaluator``; weight files are resolved in ``base_dir``."""

    class MoELayer(OpRun):
        op_domain = DOMAIN

        def _run(
            self, hidden_states: Any, router_logits: Any = None, next_logits: Any = None, **_: Any
        ) -> tuple[Any]:
            names = {a.name for a in ATTRIBUTES}
            given = {a.name: onnx.helper.get_attribute_value(a) for a in self.onnx_node.attribute}
            assert set(given) <= names
            config = LayerConfig.from_attributes(given)
            weights = open_expert_weights(config, hidden_states.shape[-1], base_dir)
            output = moe_layer(hidden_states, config, weights, router_logits)
            return (output.astype(hidden_states.dtype),)

    return MoELayer


def run_reference(path: Path, inputs: dict[str, Any]) -> list[Any]:
    """Outputs of a rewritten model."""
    model = onnx.load(path)
    evaluator = ReferenceEvaluator(model, new_ops=[moe_layer_operator(path.parent)])
    outputs: list[Any] = evaluator.run(None, inputs)
    return outputs


def run_runtime(path: Path, inputs: dict[str, Any]) -> list[Any]:
    """Outputs of an ordinary model on ONNX Runtime's CPU provider, without its rewrites."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def cannot_run(inputs: dict[str, Any]) -> bool:
    """The original would get an empty input, which this ONNX Runtime does not survive."""
    return no_rows_crash() and any(np.size(value) == 0 for value in inputs.values())


def no_rows_crash() -> bool:
    """Before 1.32 ONNX Runtime's TopK ends the process (SIGFPE) when it is given no row."""
    import onnxruntime

    version = onnxruntime.__version__.split(".")
    return (int(version[0]), int(version[1])) < (1, 32)


def assert_same_outputs(original: Path, rewritten: Path, inputs: dict[str, Any]) -> None:
    """Every output of both models, to 1e-4."""
    if cannot_run(inputs):
        return
    expected, actual = run_runtime(original, inputs), run_reference(rewritten, inputs)
    assert len(expected) == len(actual) > 0
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4)
