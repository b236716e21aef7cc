"""``moe_infer.set_gpu_budget``: writes a model whose layers have the slots of a budget."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moe_infer.budget import Budget
from moe_infer.byte_size import ByteSize, parse_bytes
from moe_infer.graph.lower_builder import Names
from moe_infer.graph.lower_data import ExpertData, make_absolute, place_beside
from moe_infer.graph.lower_nodes import LayerNode, inline_functions, load_model, read_layers
from moe_infer.graph.outputs import make_place, refuse_overwriting
from moe_infer.graph.update import split_layers, update_layers, with_slots
from moe_infer.op import LayerConfig
from moe_infer.weights import resolve_weight_path
from moe_infer.weights.atomic import AtomicFile


def set_gpu_budget(
    path: str | os.PathLike[str], gpu_budget: ByteSize, out: str | os.PathLike[str]
) -> Budget:
    """Writes a copy of a model in which ``max_concurrency`` of each layer follows from a budget.

    For a plain ``onnxruntime.InferenceSession``, which knows no budget;
    :class:`moe_infer.InferenceSession` takes one itself. Layers that change get a new digest in
    their output's name. The experts stay where they are. Other weights outside the model file are
    linked into the folder of ``out`` where that is another one (copied where they cannot be
    linked).

    Args:
        path: of the model, which is left as it is.
        gpu_budget: bytes for the experts of all layers, or a text such as ``8G``; see
            :func:`moe_infer.budget.split_budget`.
        out: of the result. May be ``path``, which is then replaced when the result is whole.

    Returns:
        The slots of each layer.

    Raises:
        FileNotFoundError: the model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        OSError: ``out`` is a folder, or its folder cannot be written.
        ValueError: it is no model with MoELayer nodes, a layer is not right, the budget does not
            hold the experts of one token, or ``out`` is a file with weights of the model.
    """
    nbytes = parse_bytes(gpu_budget, "gpu_budget")
    model, folder = load_model(path)
    model = inline_functions(model)
    layers = read_layers(model, folder)
    if not layers:
        raise ValueError(f"'{path}' has no MoELayer; `moe-infer rewrite` makes them")
    budget = split_layers(nbytes, layers, "gpu_budget")
    refuse_overwriting(Path(out), model, layers, folder)
    target = make_place(out)
    moves = folder is not None and target.parent.resolve() != folder.resolve()
    configs = []
    for layer, part in zip(layers, budget.layers, strict=True):
        config = with_slots(layer, part.slots)
        configs.append(_found_from(target.parent, layer, config) if moves else config)
    update_layers(model, layers, configs)
    if moves:
        make_absolute(model, folder)
        place_beside(model, ExpertData(Names(model)), target)
    with AtomicFile(target) as file:
        file.file.write(model.SerializeToString())
        file.commit()
    return budget


def _found_from(folder: Path, layer: LayerNode, config: LayerConfig) -> LayerConfig:
    """The attributes with a weight path that leads to the same file from another folder."""
    file = layer.weights.file
    if file is None:
        return config
    with suppress(FileNotFoundError):
        if os.path.samefile(resolve_weight_path(config.expert_weight_file, folder), file.path):
            return config
    return replace(config, expert_weight_file=str(file.path.resolve()))
