"""Lowering against the float64 reference on ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from layer_models import (
    FORMATS,
    NUMPY,
    assert_close,
    config_of,
    layer_attributes,
    layer_model,
    make_parts,
    write_experts,
)
from moe_infer import reference
from moe_infer.graph.lower import FOLDER_KEY, lower
from moe_infer.op import ROUTERS, SUBLAYERS
from moe_infer.weights import open_expert_weights

D_MODEL, HIDDEN, EXPERTS = 24, 40, 6
CPU = ["CPUExecutionProvider"]


def run_model(model: onnx.ModelProto, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    folder = {p.key: p.value for p in model.metadata_props}.get(FOLDER_KEY)
    if folder:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    return ort.InferenceSession(model.SerializeToString(), options, CPU).run(None, feeds)[0]


def separated_scores(rng: np.random.Generator, tokens: int, experts: int) -> np.ndarray[Any, Any]:
    """Scores of unit variance, no two of a token closer than what a 16-bit type can tell apart."""
    ranks = np.argsort(rng.random((tokens, experts)), axis=1)
    return ((ranks - (experts - 1) / 2) * (2 / experts)).astype(np.float32)


def case(
    tmp_path: Path,
    sublayer: str = "Gated_SiLU",
    router: str = "softmax_topk",
    form: str = "safetensors stacked",
    dtype: str = "float32",
    weights: str = "float32",
    top_k: int | None = None,
    centroids: bool = False,
    **more: Any,
) -> dict[str, Any]:
    parts = make_parts(sublayer, EXPERTS, D_MODEL, HIDDEN, weights)
    path = tmp_path / "none"
    if SUBLAYERS[sublayer].tensors:
        path = write_experts(tmp_path / "experts", parts, sublayer, EXPERTS, form)
    top_k = top_k or (1 if ROUTERS[router].single_expert else 2)
    return layer_attributes(
        sublayer, router, EXPERTS, D_MODEL, HIDDEN, top_k, path, centroids, **more
    )


def check(
    attributes: dict[str, Any],
    dtype: str,
    shape: tuple[int, ...],
    logits_dtype: str = "float32",
    logits: np.ndarray[Any, Any] | None = None,
    x: np.ndarray[Any, Any] | None = None,
    model: onnx.ModelProto | None = None,
) -> np.ndarray[Any, Any]:
    """Runs the lowered layer and compares it with the reference."""
    rng = np.random.default_rng(3)
    config = config_of(attributes)
    tokens = int(np.prod(shape))
    if x is None:
        x = rng.standard_normal((*shape, D_MODEL)).astype(NUMPY[dtype])
    feeds = {"x": x.astype(np.float32) if dtype == "bfloat16" else x}
    if config.expert_centroids is None:
        if logits is None:
            logits = separated_scores(rng, tokens, EXPERTS)
        logits = logits.reshape(*shape, EXPERTS).astype(NUMPY[logits_dtype])
        feeds["logits"] = logits.astype(np.float32) if logits_dtype == "bfloat16" else logits
    if model is None:
        model = lower(layer_model([attributes], D_MODEL, dtype, len(shape) + 1, logits_dtype))
    found = run_model(model, feeds)
    expected = reference.moe_layer(x, config, open_expert_weights(config, D_MODEL), logits)
    assert_close(found, expected, dtype)
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_matches_the_reference(
    tmp_path: Path, sublayer: str, router: str, dtype: str, form: str
) -> None:
    centroids = router == "cpm_2"
    attributes = case(tmp_path, sublayer, router, form, dtype, dtype, centroids=centroids)
    check(attributes, dtype, (2, 9))
