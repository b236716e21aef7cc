"""What the MoELayer nodes of a model are and what they take, without running anything."""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass
from typing import Any

from moe_infer.cuda_graph import captured_runs
from moe_infer.graph.lower_fused import CPU_PROVIDER, why_not_fused
from moe_infer.graph.lower_nodes import (
    LayerNode,
    ModelLike,
    inline_functions,
    load_model,
    read_layers,
)
from moe_infer.slot_layout import slot_bytes


@dataclass(frozen=True)
class LayerInfo:
    """One MoELayer node.

    Attributes:
        name: the node's, or its output's where it has none.
        experts: number of experts.
        top_k: experts a token.
        router: ``moe_variant``.
        router_input: ``router_logits`` or ``expert_centroids``.
        guesses_next: whether it is told what the next layer's router gives for its hidden states
            (input 2), so that the next layer's experts can be fetched ahead.
        sublayer: what an expert computes.
        biases: whether the experts have biases.
        d_model: last dimension of hidden_states; 0 if nothing tells it.
        hidden_size: intermediate size of an expert.
        shape: of hidden_states; numbers, symbols or None.
        dtype: of hidden_states.
        weight_dtype: of most of the weights in the file.
        weight_file: its path, "" for a sub-layer without weights.
        weight_format: ``npz`` or ``safetensors``, and whether the experts are stacked.
        parameters: weights of all experts.
        disk_bytes: bytes that the layer's experts take in the file.
        host_bytes: host memory for the experts on a GPU: the part of the file that is read (shared
            by all sessions of a process), or the inflated tensors of a deflated file.
        slots: experts of this layer in GPU memory at once.
        slot_bytes: one expert in the graph's type, each tensor padded to 256 bytes.
        slots_bytes: GPU memory of all slots.
        workspace_bytes: GPU memory that a run needs beside the slots; None if it was not asked for
            or there is no GPU to ask.
        cuda_graph: which runs a CUDA graph can capture, and if none, why
            (:func:`moe_infer.cuda_graph.captured_runs`).
        lowering: what runs the experts on the CPU provider, and why that.
    """

    name: str
    experts: int
    top_k: int
    router: str
    router_input: str
    guesses_next: bool
    sublayer: str
    biases: bool
    d_model: int
    hidden_size: int
    shape: tuple[int | str | None, ...] | None
    dtype: str
    weight_dtype: str
    weight_file: str
    weight_format: str
    parameters: int
    disk_bytes: int
    host_bytes: int
    slots: int
    slot_bytes: int
    slots_bytes: int
    workspace_bytes: int | None
    cuda_graph: str
    lowering: str

    @property
    def gpu_bytes(self) -> int:
        """Slots and, where it is known, workspace."""
        return self.slots_bytes + (self.workspace_bytes or 0)


def inspect_model(
    model: ModelLike,
    base_dir: str | os.PathLike[str] | None = None,
    tokens: int | None = None,
) -> list[LayerInfo]:
    """Describes every MoELayer of a model, after checking it and its weight file's index.

    Args:
        model: path of a model, its bytes, or a model.
        base_dir: where relative weight paths are looked for first; the model's folder by default.
        tokens: ask the plugin for the workspace of a run with so many tokens; this needs a GPU and
            makes each layer there for a moment.

    Raises:
        FileNotFoundError: the model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        ValueError: the model, a layer or ``tokens`` is not right.
    """
    if tokens is not None and tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    loaded, folder = load_model(model, base_dir)
    return [describe(layer, tokens) for layer in read_layers(inline_functions(loaded), folder)]


def describe(layer: LayerNode, tokens: int | None = None) -> LayerInfo:
    """Describes one layer; see :func:`inspect_model`."""
    config, weights = layer.config, layer.weights
    shapes = [t.shape(layer.d_model, config.hidden_size) for t in config.tensors]
    slot = slot_bytes(config, layer.d_model, layer.dtype)
    # A sub-layer without weights needs no slots.
    slots = min(config.max_concurrency, config.expert_count) if shapes else 0
    return LayerInfo(
        name=layer.name,
        experts=config.expert_count,
        top_k=config.top_k,
        router=config.moe_variant,
        router_input="router_logits" if layer.router_logits else "expert_centroids",
        guesses_next=layer.next_router_logits is not None,
        sublayer=config.expert_sublayer_type,
        biases=bool(config.expert_bias),
        d_model=layer.d_model,
        hidden_size=config.hidden_size,
        shape=layer.shape,
        dtype=layer.dtype,
        weight_dtype=weights.dtype if shapes else "none",
        weight_file=str(weights.file.path) if weights.file else "",
        weight_format=f"{weights.file.format}, {weights.form}" if weights.file else "none",
        parameters=config.expert_count * sum(math.prod(shape) for shape in shapes),
        disk_bytes=_disk_bytes(layer),
        host_bytes=weights.nbytes if shapes else 0,
        slots=slots,
        slot_bytes=slot,
        slots_bytes=slots * slot,
        workspace_bytes=None if tokens is None else _workspace(layer, tokens),
        cuda_graph=captured_runs(layer),
        lowering=_lowering(layer),
    )


def _lowering(layer: LayerNode) -> str:
    if not layer.config.tensors:
        return "nothing to run"
    reason = why_not_fused(layer, CPU_PROVIDER)
    return f"an If for each expert ({reason})" if reason else "com.microsoft.MoE"


def _disk_bytes(layer: LayerNode) -> int:
    """Bytes in the file: as stored, or compressed."""
    file = layer.weights.file
    if file is None:
        return 0
    prefix = layer.config.expert_weight_prefix
    infos = [info for name, info in file.tensors.items() if name.startswith(prefix)]
    if all(info.stored for info in infos):
        return layer.weights.nbytes
    with zipfile.ZipFile(file.path) as archive:
        return sum(m.compress_size for m in archive.infolist() if m.filename.startswith(prefix))


def _workspace(layer: LayerNode, tokens: int) -> int | None:
    from moe_infer.runtime import plugin

    if not plugin.status().usable:
        return None
    from moe_infer.runtime import native

    attributes: dict[str, Any] = layer.config.to_attributes()
    if layer.weights.file is not None:
        attributes["expert_weight_file"] = str(layer.weights.file.path)
    native_layer = native.Layer(
        attributes, layer.d_model, layer.dtype, has_logits=layer.router_logits is not None
    )
    return int(native_layer.workspace(tokens))
