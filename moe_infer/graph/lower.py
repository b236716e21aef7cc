"""Lowers a model: every MoELayer becomes operators that ONNX Runtime's own providers have.

The way of a layer: ``lower_nodes`` reads and checks the node, ``lower_router`` adds the routing,
then ``lower_fused`` the fused operator where it computes the same, otherwise ``lower_experts`` one
If for each expert; ``lower_data`` keeps the weights in their file. docs/lowering.md explains it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from moe_infer.graph.edits import remove_what_made
from moe_infer.graph.lower_bfloat16 import bfloat16_values, wrap_bfloat16
from moe_infer.graph.lower_builder import MICROSOFT, Builder, Names
from moe_infer.graph.lower_data import (
    ELEMENT_TYPES,
    FOLDER_KEY,
    ExpertData,
    embed_inflated,
    make_absolute,
    place_beside,
    place_in_memory,
)
from moe_infer.graph.lower_experts import lower_experts
from moe_infer.graph.lower_fused import CPU_PROVIDER, CUDA_PROVIDER, lower_fused, why_not_fused
from moe_infer.graph.lower_nodes import (
    LayerNode,
    ModelLike,
    inline_functions,
    load_model,
    read_layers,
)
from moe_infer.graph.lower_router import Routing, lower_router
from moe_infer.graph.outputs import make_place, refuse_overwriting
from moe_infer.op import DOMAIN
from moe_infer.weights.atomic import AtomicFile

PROVIDERS = (CPU_PROVIDER, CUDA_PROVIDER)
MIN_OPSET = 14
"""Of the default domain: Reshape can keep a dimension of zero only from there on."""
EMBED_LIMIT = 1 << 30
"""Most bytes of deflated weights that are put into a model in memory; protobuf's limit is 2 GiB."""


@dataclass
class Lowered:
    """A lowered model whose external data have absolute locations still.

    Attributes:
        model: without MoELayer nodes.
        data: its weights.
        layers: the nodes that were there.
    """

    model: onnx.ModelProto
    data: ExpertData
    layers: list[LayerNode]


def lower(
    model: ModelLike,
    out: str | os.PathLike[str] | None = None,
    provider: str = CPU_PROVIDER,
    base_dir: str | os.PathLike[str] | None = None,
) -> onnx.ModelProto:
    """Replaces every MoELayer by operators that ONNX Runtime's CPU and CUDA providers have.

    Only experts that a token chose are read and run. The weights stay in their file as external
    data. The model's own external data is not read.

    Args:
        model: path of a model, its bytes, or a model (left as it is).
        out: where to write the result; files outside its folder are hard-linked into it, deflated
            experts are written beside it as ``STEM.experts.safetensors``. None: nothing is
            written; the locations of external data are then relative to the folder in the result's
            metadata ``moe_infer.external_data_folder``.
        provider: ``CPUExecutionProvider`` or ``CUDAExecutionProvider``: the one that the result is
            for. It runs on both unless ``com.microsoft.MoE`` was chosen for a type that the other
            lacks.
        base_dir: where relative weight paths and external data are looked for; the model's folder
            if it is given by its path.

    Returns:
        The lowered model, as it was written if ``out`` is given.

    Raises:
        FileNotFoundError: the model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        OSError: ``out`` is a folder, or its folder cannot be written.
        ValueError: the model, a layer or ``provider`` is not right, there is no MoELayer, or
            ``out`` is the model or a file with its weights.
    """
    loaded, folder = load_model(model, base_dir)
    loaded = inline_functions(loaded)
    layers = read_layers(loaded, folder)
    if not layers:
        raise ValueError("the model has no MoELayer to lower; `moe-infer rewrite` makes them")
    if out is not None:
        if isinstance(model, str | os.PathLike) and Path(out).resolve() == Path(model).resolve():
            raise ValueError(f"writing {out} would overwrite the model that is read; give another")
        refuse_overwriting(Path(out), loaded, layers, folder)
    lowered = lower_model(loaded, folder, provider, layers)
    if out is not None:
        path = make_place(out)
        place_beside(lowered.model, lowered.data, path)
        with AtomicFile(path) as file:
            file.file.write(lowered.model.SerializeToString())
            file.commit()
        return lowered.model
    if lowered.data.inflated_bytes > EMBED_LIMIT:
        raise ValueError(
            f"the experts are deflated and take {lowered.data.inflated_bytes} bytes, more than the"
            f" {EMBED_LIMIT} that a model in memory can hold; give `out`"
        )
    embed_inflated(lowered.model, lowered.data)
    found = place_in_memory(lowered.model)
    if found is not None:
        helper.set_model_props(
            lowered.model,
            {**{p.key: p.value for p in lowered.model.metadata_props}, FOLDER_KEY: str(found)},
        )
    return lowered.model


def lower_model(
    model: onnx.ModelProto, base_dir: Path | None, provider: str, layers: list[LayerNode]
) -> Lowered:
    """Lowers ``model``, whose layers have been read, in place; see :func:`lower`."""
    if provider not in PROVIDERS:
        raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got '{provider}'")
    names = Names(model)
    data = ExpertData(names)
    make_absolute(model, base_dir)
    # Before the layers are replaced: inference over thousands of experts takes long.
    half = bfloat16_values(model) if provider == CPU_PROVIDER else set()
    if layers:
        _check_opset(model)
        _replace(model, layers, data, provider)
    wrap_bfloat16(model, half, names)
    model.graph.initializer.extend(names.initializers)
    return Lowered(model, data, layers)


def _replace(
    model: onnx.ModelProto, layers: list[LayerNode], data: ExpertData, provider: str
) -> None:
    by_index = {layer.index: layer for layer in layers}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        if index in by_index:
            nodes += _lower_layer(by_index[index], data, provider)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [o for o in model.opset_import if o.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if any(n.domain == MICROSOFT for n in nodes) and all(o.domain != MICROSOFT for o in kept):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    # Where nothing is fetched nothing is guessed.
    remove_what_made(model, [x.next_router_logits for x in layers if x.next_router_logits])


def _lower_layer(layer: LayerNode, data: ExpertData, provider: str) -> list[onnx.NodeProto]:
    b = Builder(data.names, layer.name)
    hidden = layer.hidden_states
    # No Cast to the type that it is: with optimizations disabled ONNX Runtime takes such a one away
    # and leaves its users in the experts' branches without input.
    x = hidden if layer.dtype == "float32" else b.cast(hidden, TensorProto.FLOAT)
    if layer.shape is None or len(layer.shape) != 2:
        last = b.op("Shape", hidden)
        width = b.op("Slice", last, b.ints(-1), b.ints(2**31))
        x = b.op("Reshape", x, b.op("Concat", b.ints(-1), width, axis=0))
    routing = lower_router(b, layer.config, x, layer.router_logits)
    y = _experts(b, layer, data, x, routing, provider)
    if layer.config.moe_variant == "base_layer":
        rest = b.op("Mul", b.op("Sub", b.scalar(1.0), routing.weights), x)
        y = b.op("Add", y, rest)
    if layer.shape is None or len(layer.shape) != 2:
        y = b.op("Reshape", y, b.op("Shape", hidden), allowzero=1)
    name = data.names.new(f"{layer.name}/output")
    output = [layer.node.output[0]]
    if layer.dtype == "float32":
        b.nodes.append(helper.make_node("Identity", [y], output, name))
    else:
        to = ELEMENT_TYPES[layer.dtype]
        b.nodes.append(helper.make_node("Cast", [y], output, name, to=to))
    return b.nodes


def _experts(
    b: Builder, layer: LayerNode, data: ExpertData, x: str, routing: Routing, provider: str
) -> str:
    if not layer.config.tensors:
        # Identity: every choice gives x.
        return b.op("Mul", x, b.sum(routing.weights, 1, keep=True))
    if not why_not_fused(layer, provider):
        return lower_fused(b, layer, data, x, routing, provider)
    return lower_experts(b, layer, data, x, routing)


def _check_opset(model: onnx.ModelProto) -> None:
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if version < MIN_OPSET:
        raise ValueError(
            f"the model's opset is {version}; lowering needs {MIN_OPSET} or newer: export it again"
            " or convert it with onnx.version_converter before the MoELayer nodes are inserted"
        )
