"""Small models with MoELayer nodes, and random experts for them, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from moe_infer.op import DOMAIN, ROUTERS, SUBLAYERS, ExpertTensor, LayerConfig
from moe_infer.weights import SafetensorsWriter, write_npz

ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
TOLERANCES = {"float32": (1e-5, 1e-4), "float16": (2e-3, 2e-3), "bfloat16": (1.6e-2, 1.6e-2)}
FORMATS = ("npz stored", "npz deflated", "safetensors separate", "safetensors stacked")

Parts = dict[str, np.ndarray[Any, Any]]


def tensors_of(sublayer: str, bias: bool = False) -> tuple[ExpertTensor, ...]:
    """What an expert has in a file."""
    found = SUBLAYERS[sublayer]
    return found.tensors + (found.biases if bias else ())


def make_parts(
    sublayer: str,
    experts: int,
    d_model: int,
    hidden: int,
    dtype: str,
    seed: int = 0,
    bias: bool = False,
) -> Parts:
    """Tensors of separate experts by their names in a file; outputs have about unit variance."""
    rng = np.random.default_rng(seed)
    parts: Parts = {}
    for e in range(experts):
        for tensor in tensors_of(sublayer, bias):
            for part in tensor.parts:
                shape = tensor.resolve_part_shape(d_model, hidden)
                # Biases as large as the sums would leave outputs far from unit variance.
                vector = 0.25 if part.endswith("_bias") else 1
                values = rng.standard_normal(shape)
                values *= 1 / np.sqrt(shape[-1]) if len(shape) > 1 else vector
                parts[f"{e}/{part}"] = values.astype(NUMPY[dtype])
    return parts


def write_experts(path: Path, parts: Parts, sublayer: str, experts: int, form: str) -> Path:
    """Writes parts in one of FORMATS; the suffix is added to the path."""
    if form.startswith("npz"):
        path = path.with_suffix(".npz")
        write_npz(path, parts.items(), compress=form == "npz deflated")
        return path
    path = path.with_suffix(".safetensors")
    if form == "safetensors stacked":
        parts = stack(parts, sublayer, experts)
    with SafetensorsWriter(path, {n: (a.dtype.name, a.shape) for n, a in parts.items()}) as writer:
        for name, array in parts.items():
            writer.write(name, array)
    return path


def stack(parts: Parts, sublayer: str, experts: int) -> Parts:
    """The stacked, packed tensors, with alternating rows where a tensor has two parts."""
    stacked: Parts = {}
    bias = any(name.endswith("_bias") for name in parts)
    for tensor in tensors_of(sublayer, bias):
        packed = []
        for e in range(experts):
            arrays = [parts[f"{e}/{part}"] for part in tensor.parts]
            if len(arrays) == 2:
                both = np.empty((2 * len(arrays[0]), *arrays[0].shape[1:]), arrays[0].dtype)
                both[0::2], both[1::2] = arrays
                arrays = [both]
            packed.append(arrays[0])
        stacked[tensor.name] = np.stack(packed)
    return stacked


def layer_attributes(
    sublayer: str,
    router: str,
    experts: int,
    d_model: int,
    hidden: int,
    top_k: int,
    path: Path | str,
    centroids: bool,
    **more: Any,
) -> dict[str, Any]:
    """Attributes of a MoELayer; centroids where asked for and what the router needs.

    ``sigmoid_topk`` gets a bias, which decides between experts whose scores are near each other.
    """
    rng = np.random.default_rng(7)
    attributes: dict[str, Any] = {
        "expert_count": experts,
        "hidden_size": hidden if SUBLAYERS[sublayer].tensors else 0,
        "expert_sublayer_type": sublayer,
        "moe_variant": router,
        "top_k": top_k,
        **more,
    }
    if SUBLAYERS[sublayer].tensors:
        attributes["expert_weight_file"] = str(path)
    if centroids:
        weights = rng.standard_normal(d_model * experts) / np.sqrt(d_model)
        attributes["expert_centroids"] = [float(np.float32(w)) for w in weights]
    if router == "cpm_2":
        attributes["layernorm_weight"] = [
            float(np.float32(w)) for w in rng.uniform(0.5, 2, d_model)
        ]
    if router == "sigmoid_topk":
        bias = np.random.default_rng(8).uniform(-0.2, 0.2, experts)
        attributes.setdefault("router_bias", [float(np.float32(b)) for b in bias])
    return attributes


def write_layer(
    path: Path,
    sublayer: str,
    router: str,
    experts: int,
    d_model: int,
    hidden: int,
    *,
    top_k: int | None = None,
    form: str = "safetensors stacked",
    dtype: str = "float32",
    centroids: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Writes random experts, where the sub-layer has any, and gives the layer's attributes.

    Args:
        path: of the weight file, without its suffix.
        top_k: None: two, or one for a router that takes a single expert.
        dtype: of the weights.
        **more: attributes.
    """
    written = path
    if SUBLAYERS[sublayer].tensors:
        bias = bool(more.get("expert_bias"))
        parts = make_parts(sublayer, experts, d_model, hidden, dtype, bias=bias)
        written = write_experts(path, parts, sublayer, experts, form)
    top_k = top_k or (1 if ROUTERS[router].single_expert else 2)
    return layer_attributes(
        sublayer, router, experts, d_model, hidden, top_k, written, centroids, **more
    )


def layer_model(
    layers: list[Mapping[str, Any]],
    d_model: int,
    dtype: str = "float32",
    rank: int = 3,
    logits_dtype: str = "float32",
    opset: int = 18,
) -> onnx.ModelProto:
    """A chain of MoELayer nodes; each without centroids gets an input ``logits`` (``logits_1``...).

    Inputs and outputs are float32 with Casts around where the type has no numpy equivalent in ONNX
    Runtime (bfloat16).
    """
    dims: list[Any] = ["batch", "seq"] if rank == 3 else ["tokens"]
    element = ELEMENTS[dtype]
    outside = TensorProto.FLOAT if dtype == "bfloat16" else element
    inputs = [helper.make_tensor_value_info("x", outside, [*dims, d_model])]
    nodes = [helper.make_node("Cast", ["x"], ["h0"], "enter", to=element)]
    infos = []
    for i, attributes in enumerate(layers):
        names = [f"h{i}"]
        if "expert_centroids" not in attributes:
            name = f"logits_{i}" if i else "logits"
            kind = ELEMENTS[logits_dtype]
            if logits_dtype == "bfloat16":
                kind = TensorProto.FLOAT
                nodes.append(
                    helper.make_node("Cast", [name], [f"{name}_b"], to=TensorProto.BFLOAT16)
                )
            inputs.append(
                helper.make_tensor_value_info(name, kind, [*dims, attributes["expert_count"]])
            )
            names.append(f"{name}_b" if logits_dtype == "bfloat16" else name)
        nodes.append(
            helper.make_node(
                "MoELayer", names, [f"h{i + 1}"], f"moe_{i}", domain=DOMAIN, **attributes
            )
        )
        infos.append(helper.make_tensor_value_info(f"h{i + 1}", element, [*dims, d_model]))
    nodes.append(helper.make_node("Cast", [f"h{len(layers)}"], ["y"], "leave", to=outside))
    graph = helper.make_graph(
        nodes,
        "model",
        inputs,
        [helper.make_tensor_value_info("y", outside, [*dims, d_model])],
        value_info=infos,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return model


def config_of(attributes: Mapping[str, Any]) -> LayerConfig:
    """The checked configuration."""
    return LayerConfig.from_attributes(attributes)


def assert_close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], dtype: str) -> None:
    """Within the design's tolerance on all elements; a mismatch names its place and both values."""
    assert found.shape == expected.shape
    atol, rtol = TOLERANCES[dtype]
    a, b = found.astype(np.float64), expected.astype(np.float64)
    wrong = ~((np.abs(a - b) <= atol + rtol * np.abs(b)) | (np.isnan(a) & np.isnan(b)))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} differ; at {place}: {a[place]}, expected {b[place]}"
        )
