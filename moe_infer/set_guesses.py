"""``moe_infer.set_fetch_ahead``: writes a model whose layers guess the next one's experts."""

from __future__ import annotations

import os

from moe_infer.graph.edit_file import read_file, write_file
from moe_infer.graph.edits import add_value_info
from moe_infer.graph.guess_next import GuessReport, add_guesses, remove_guesses
from moe_infer.graph.lower_nodes import read_layers
from moe_infer.graph.shapes import infer_types


def set_fetch_ahead(
    path: str | os.PathLike[str], fetch_ahead: bool, out: str | os.PathLike[str]
) -> GuessReport:
    """Writes a copy of a model in which each layer guesses the next one's experts, or none does.

    A guess is the next layer's router, applied to this layer's hidden states: nodes in the graph
    that give the layer's input 2. It changes no output, and it is only for layers that stream: a
    layer gets none where all experts of the next one, or its own, stay on the GPU. So set a GPU
    budget first. Guesses that are there already are made anew.

    Args:
        path: of the model, which is left as it is.
        fetch_ahead: False removes guesses, and nodes that only they needed.
        out: of the result. May be ``path``, which is then replaced when the result is whole. Where
            weights lie: see :func:`moe_infer.set_gpu_budget`.

    Returns:
        Which layers guess, and why the others do not.

    Raises:
        FileNotFoundError: the model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        OSError: ``out`` is a folder, or its folder cannot be written.
        ValueError: it is no model with MoELayer nodes, a layer is not right, or ``out`` is a file
            with weights of the model.
    """
    model, folder, _ = read_file(path)
    remove_guesses(model)
    report = GuessReport()
    if fetch_ahead:
        types = infer_types(model)
        report = add_guesses(model, types)
        add_value_info(model, types)
    layers = read_layers(model, folder)
    write_file(model, folder, layers, [layer.config for layer in layers], out)
    return report
