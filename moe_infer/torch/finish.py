"""Completes an exported graph with MoELayer nodes for ONNX Runtime and TensorRT."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from moe_infer.graph.edits import add_opset, add_value_info, rename_value
from moe_infer.graph.for_tensorrt import suit_tensorrt
from moe_infer.graph.lower_nodes import load_model, read_layers
from moe_infer.graph.replace import digest_name
from moe_infer.graph.shapes import infer_types
from moe_infer.weights.atomic import AtomicFile


def finish(path: str | os.PathLike[str]) -> list[str]:
    """Gives every MoELayer of a graph its digest, and every value its type and shape.

    As :func:`moe_infer.rewrite` does: the outputs' names carry a digest of the attributes (ONNX
    Runtime's engine cache tells models apart by names), there is a value_info for each value
    (MoELayer has no shape inference), the operator's domain is imported, and the layers are checked
    against their weight file. What says nothing new and TensorRT cannot read is removed
    (moe_infer.graph.for_tensorrt). Doing it twice changes nothing.

    Args:
        path: of the graph; written anew, its external data stays. The weight file must be where the
            nodes say, relative to the graph's folder.

    Returns:
        Values without type and shape, which TensorRT's provider may refuse.

    Raises:
        FileNotFoundError: the graph or the weight file is nowhere.
        WeightFileError: the weight file does not fit a layer.
        ValueError: it is no ONNX model, or it has no MoELayer.
    """
    model, folder = load_model(path)
    untyped = finish_model(model, folder)
    with AtomicFile(Path(path)) as file:
        file.file.write(model.SerializeToString())
        file.commit()
    return untyped


def finish_model(model: onnx.ModelProto, folder: Path | None) -> list[str]:
    """The same on a model in memory, which is changed in place."""
    types = infer_types(model)
    layers = read_layers(model, folder)
    if not layers:
        raise ValueError("the graph has no MoELayer; was it exported after replace_moe?")
    outputs = {o.name for o in model.graph.output}
    for i, layer in enumerate(layers):
        node = layer.node
        old = str(node.output[0])
        new = digest_name(old, layer.config)
        node.name = f"MoELayer.{i}"
        if old == new:
            continue
        rename_value(model.graph, types, old, new)
        if old in outputs:
            # The output keeps its name, the node's must carry the digest.
            model.graph.node.append(
                onnx.helper.make_node("Identity", [new], [old], f"{node.name}.output")
            )
    suit_tensorrt(model, types)
    add_opset(model)
    return add_value_info(model, types)
