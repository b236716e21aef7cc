"""What goes to ONNX Runtime: the model as it is, or lowered, and where its data are."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from moe_infer.graph.lower import EMBED_LIMIT, Lowered, lower_model
from moe_infer.graph.lower_data import (
    ELEMENT_TYPES,
    embed_inflated,
    make_absolute,
    place_in_memory,
)
from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.op import DOMAIN
from moe_infer.weights import resolve_weight_path

FOLDER = "session.model_external_initializers_file_folder_path"
_PREPACKING = "session.disable_prepacking"


@dataclass
class Prepared:
    """What goes to ONNX Runtime."""

    model: str | os.PathLike[str] | bytes
    entries: dict[str, str] = field(default_factory=dict)
    kept_alive: list[Any] = field(default_factory=list)


def foreign_domains(model: onnx.ModelProto) -> set[str]:
    """Domains of the model's operators, without our own and those that it defines itself."""
    return {o.domain for o in model.opset_import} - {DOMAIN} - {f.domain for f in model.functions}


def lower_for(
    model: onnx.ModelProto,
    folder: Path | None,
    provider: str,
    layers: list[LayerNode],
    options: ort.SessionOptions,
) -> Prepared:
    """The model with its layers lowered for a provider; ``options`` may get arrays."""
    lowered = lower_model(model, folder, provider, layers)
    kept_alive: list[Any] = []
    if lowered.data.inflated_bytes > EMBED_LIMIT:
        kept_alive = _give_arrays(lowered, options)
    else:
        embed_inflated(lowered.model, lowered.data)
    # Without prepacking the weights stay in the mapped file and only what is used is read; with
    # it every expert would be repacked into private memory now.
    entries = {_PREPACKING: "1"}
    found = place_in_memory(lowered.model)
    if found is not None:
        entries[FOLDER] = str(found)
    return Prepared(lowered.model.SerializeToString(), entries, kept_alive)


def _give_arrays(lowered: Lowered, options: ort.SessionOptions) -> list[Any]:
    """Hands deflated experts to ONNX Runtime in memory, beside a model that could not hold them."""
    names: list[str] = []
    values: list[Any] = []
    kept: list[Any] = []
    for name, array in lowered.data.arrays():
        dtype = ELEMENT_TYPES[array.dtype.name]
        bits = array.view("u2") if array.dtype.name == "bfloat16" else array
        names.append(name)
        values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype))
        kept += [array, values[-1]]
    options.add_external_initializers(names, values)
    return kept


def for_tensorrt(
    path: str | os.PathLike[str] | bytes,
    model: onnx.ModelProto,
    folder: Path | None,
    layers: list[LayerNode],
    changed: bool,
) -> Prepared:
    """The model for TensorRT, whose plugin does not know the model's folder."""
    for layer in layers:
        file = layer.weights.file
        if file is None or _plugin_finds(layer.config.expert_weight_file, file.path):
            continue
        changed = True
        for attribute in model.graph.node[layer.index].attribute:
            if attribute.name == "expert_weight_file":
                attribute.s = os.fsencode(file.path)
    if not changed:
        return Prepared(path)
    make_absolute(model, folder)
    found = place_in_memory(model)
    entries = {} if found is None else {FOLDER: str(found)}
    return Prepared(model.SerializeToString(), entries)


def _plugin_finds(text: str, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samefile(resolve_weight_path(text), path)
    return False
