"""A model file with MoELayer nodes that is read, edited, and written there or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx

from moe_infer.graph.lower_builder import Names
from moe_infer.graph.lower_data import ExpertData, make_absolute, place_beside
from moe_infer.graph.lower_nodes import LayerNode, inline_functions, load_model, read_layers
from moe_infer.graph.outputs import make_place, refuse_overwriting
from moe_infer.graph.update import update_layers
from moe_infer.op import LayerConfig
from moe_infer.weights import resolve_weight_path
from moe_infer.weights.atomic import AtomicFile


def read_file(
    path: str | os.PathLike[str],
) -> tuple[onnx.ModelProto, Path | None, list[LayerNode]]:
    """A model without its external data, its folder, and its layers, each checked.

    Raises:
        FileNotFoundError: the model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        ValueError: it is no model with MoELayer nodes, or a layer is not right.
    """
    model, folder = load_model(path)
    model = inline_functions(model)
    layers = read_layers(model, folder)
    if not layers:
        raise ValueError(f"'{path}' has no MoELayer; `moe-infer rewrite` makes them")
    return model, folder, layers


def write_file(
    model: onnx.ModelProto,
    folder: Path | None,
    layers: Sequence[LayerNode],
    configs: Sequence[LayerConfig],
    out: str | os.PathLike[str],
) -> None:
    """Gives layers these attributes and writes the model when it is whole.

    The experts stay where they are. Other weights outside the model file are linked into the folder
    of ``out`` where that is another one (copied where they cannot be linked).

    Args:
        model: of :func:`read_file`, perhaps edited; changed in place.
        folder: where it was.
        layers: as the model has them now.
        configs: for each layer.
        out: of the result; may be the file that was read.

    Raises:
        OSError: ``out`` is a folder, or its folder cannot be written.
        ValueError: ``out`` is a file with weights of the model.
    """
    refuse_overwriting(Path(out), model, layers, folder)
    target = make_place(out)
    moves = folder is not None and target.parent.resolve() != folder.resolve()
    if moves:
        configs = [
            _found_from(target.parent, layer, config)
            for layer, config in zip(layers, configs, strict=True)
        ]
    update_layers(model, layers, configs)
    if moves:
        make_absolute(model, folder)
        place_beside(model, ExpertData(Names(model)), target)
    with AtomicFile(target) as file:
        file.file.write(model.SerializeToString())
        file.commit()


def _found_from(folder: Path, layer: LayerNode, config: LayerConfig) -> LayerConfig:
    """The attributes with a weight path that leads to the same file from another folder."""
    file = layer.weights.file
    if file is None:
        return config
    with suppress(FileNotFoundError):
        if os.path.samefile(resolve_weight_path(config.expert_weight_file, folder), file.path):
            return config
    return replace(config, expert_weight_file=str(file.path.resolve()))
