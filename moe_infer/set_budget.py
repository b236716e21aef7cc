"""``moe_infer.set_gpu_budget``: writes a model whose layers have the slots of a budget."""

from __future__ import annotations

import os

from moe_infer.budget import Budget
from moe_infer.byte_size import ByteSize, parse_bytes
from moe_infer.graph.edit_file import read_file, write_file
from moe_infer.graph.update import split_layers, with_slots


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
    model, folder, layers = read_file(path)
    budget = split_layers(nbytes, layers, "gpu_budget")
    configs = [
        with_slots(layer, part.slots) for layer, part in zip(layers, budget.layers, strict=True)
    ]
    write_file(model, folder, layers, configs, out)
    return budget
