"""Layers on a GPU through the C entry, with memory from PyTorch and guards around every buffer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layer_models import NUMPY, config_of, layer_attributes, make_parts, write_experts
from moe_infer.op import SUBLAYERS
from moe_infer.reference import moe_layer
from moe_infer.runtime.native import Layer
from moe_infer.weights import open_expert_weights

GUARD = 4096
PATTERN = 0xA5
Array = np.ndarray[Any, Any]


class Buffer:
    """Device bytes with a guard before and behind, 256-byte aligned."""

    def __init__(self, size: int, fill: Array | None = None) -> None:
        self.size = size
        self.bytes = torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8, device="cuda")
        if fill is not None and size:
            raw = np.ascontiguousarray(fill).view(np.uint8).reshape(-1).copy()
            self.bytes[GUARD : GUARD + size] = torch.from_numpy(raw).cuda()

    @property
    def address(self) -> int:
        return self.bytes.data_ptr() + GUARD

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        data: Array = self.bytes[GUARD : GUARD + self.size].cpu().numpy()
        return data.view(dtype).reshape(shape)

    def check_guards(self, name: str) -> None:
        for side, guard in (("before", self.bytes[:GUARD]), ("behind", self.bytes[-GUARD:])):
            assert bool((guard == PATTERN).all()), f"written {side} {name}"


def run(layer: Layer, x: Array, logits: Array | None = None, stream: Any = None) -> Array:
    """One run; x is (tokens, d_model)."""
    workspace = Buffer(layer.workspace(len(x)))
    buffers = {"hidden_states": Buffer(x.nbytes, x), "output": Buffer(x.nbytes)}
    if logits is not None:
        buffers["router_logits"] = Buffer(logits.nbytes, logits)
    buffers["workspace"] = workspace
    stream = stream or torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    layer.run(
        buffers["hidden_states"].address,
        buffers["router_logits"].address if logits is not None else None,
        buffers["output"].address,
        len(x),
        workspace.address,
        workspace.size,
        stream.cuda_stream,
    )
    stream.synchronize()
    for name, buffer in buffers.items():
        buffer.check_guards(name)
    assert np.array_equal(_bits(buffers["hidden_states"].array(x.dtype, x.shape)), _bits(x))
    return buffers["output"].array(x.dtype, x.shape)


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8)


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.array_equal(_bits(a), _bits(b))


def make_layer(
    attributes: Mapping[str, Any],
    d_model: int,
    dtype: str,
    logits_dtype: str | None = None,
) -> Layer:
    return Layer(attributes, d_model, dtype, logits_dtype is not None, logits_dtype)


def make_attributes(
    folder: Path,
    sublayer: str,
    router: str,
    experts: int,
    d_model: int,
    hidden: int,
    top_k: int = 1,
    dtype: str = "float32",
    form: str = "safetensors stacked",
    centroids: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Attributes of a layer whose weights were written for it."""
    bias = bool(more.get("expert_bias"))
    name = sublayer + "-biased" * bias
    path = folder / f"{name}-{experts}-{d_model}-{hidden}-{dtype}-{form.replace(' ', '_')}"
    suffix = ".npz" if form.startswith("npz") else ".safetensors"
    written = Path(f"{path}{suffix}")
    if SUBLAYERS[sublayer].tensors and not written.exists():
        parts = make_parts(sublayer, experts, d_model, hidden, dtype, bias=bias)
        written = write_experts(path, parts, sublayer, experts, form)
    more.setdefault("max_concurrency", experts)
    return layer_attributes(
        sublayer, router, experts, d_model, hidden, top_k, written, centroids, **more
    )


def make_input(tokens: int, width: int, dtype: str, seed: int = 1) -> Array:
    values = np.random.default_rng([seed, tokens, width]).standard_normal((tokens, width))
    return values.astype(NUMPY[dtype])


def decided(attributes: Mapping[str, Any], x: Array) -> Array:
    """x without tokens whose last chosen expert leads the next by less than float32 can tell.

    Among thousands of random tokens there are some; each becomes a copy of the first that is clear.
    """
    top_k, experts = attributes["top_k"], attributes["expert_count"]
    if not len(x) or top_k == experts:
        return x
    centroids = np.array(attributes["expert_centroids"], np.float64).reshape(-1, experts)
    scores = np.sort(x.astype(np.float64) @ centroids, -1)[:, ::-1]
    clear = scores[:, top_k - 1] - scores[:, top_k] > 1e-4
    assert clear.mean() > 0.9, "these inputs are mostly ties"
    return np.where(clear[:, None], x, x[np.argmax(clear)])


def reference(attributes: Mapping[str, Any], x: Array, logits: Array | None = None) -> Array:
    """The oracle, with the weights in the type of the inputs, as the kernels read them."""
    config = config_of(attributes)
    weights: Any = {}
    if config.tensors:
        opened = open_expert_weights(config, x.shape[-1])
        weights = {
            e: {n: a.astype(x.dtype) for n, a in opened.expert(e).items()}
            for e in range(config.expert_count)
        }
    return moe_layer(x, config, weights, logits)
