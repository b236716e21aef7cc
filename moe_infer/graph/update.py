"""Changes attributes of MoELayer nodes that are there already, such as their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import helper

from moe_infer.budget import Budget, LayerSlots, split_budget
from moe_infer.graph.edits import rename_value
from moe_infer.graph.lower_builder import Names
from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.graph.replace import digest_name
from moe_infer.graph.shapes import ValueTypes
from moe_infer.op import ATTRIBUTES, LayerConfig


def update_layers(
    model: onnx.ModelProto, layers: Sequence[LayerNode], configs: Sequence[LayerConfig]
) -> list[LayerNode]:
    """Gives layers other attributes.

    A node that changes gets a new digest in its output's name, since ONNX Runtime's TensorRT engine
    cache tells models apart by names and not by attributes. One whose attributes stay keeps its
    name, with a digest or without. An output of the graph keeps its name through an Identity.

    Args:
        model: changed in place; nodes are only appended.
        layers: of this model.
        configs: for each layer.

    Returns:
        The layers as they are now, under the names that they had.
    """
    updated = []
    names = Names(model)
    for layer, config in zip(layers, configs, strict=True):
        if config != layer.config:
            _set_attributes(layer.node, layer.config, config)
            _rename_output(model.graph, names, layer, config)
        updated.append(replace(layer, config=config))
    return updated


def split_layers(nbytes: int, layers: Sequence[LayerNode], what: str) -> Budget:
    """Slots of a model's layers (:func:`moe_infer.budget.split_budget`); changes nothing."""
    needs = [LayerSlots.needs(x.name, x.config, x.d_model, x.dtype) for x in layers]
    return split_budget(nbytes, needs, what)


def with_slots(layer: LayerNode, slots: int) -> LayerConfig:
    """The layer's attributes with so many slots; the very same where that changes nothing."""
    config = layer.config
    if not config.tensors or min(config.max_concurrency, config.expert_count) == slots:
        return config
    return replace(config, max_concurrency=slots)


def _set_attributes(node: onnx.NodeProto, old: LayerConfig, new: LayerConfig) -> None:
    there = {attribute.name: attribute for attribute in node.attribute}
    for name in (a.name for a in ATTRIBUTES):
        value = getattr(new, name)
        if value != getattr(old, name):
            made = helper.make_attribute(name, value)
            if name in there:
                there[name].CopyFrom(made)
            else:
                node.attribute.append(made)


def _rename_output(
    graph: onnx.GraphProto, names: Names, layer: LayerNode, config: LayerConfig
) -> None:
    old = str(layer.node.output[0])
    if digest_name(old, config) == old:
        return
    new = names.new(digest_name(old, config))
    rename_value(graph, ValueTypes(), old, new)
    for output in graph.output:
        if output.name == old:
            info = onnx.ValueInfoProto()
            info.CopyFrom(output)
            info.name = new
            graph.value_info.append(info)  # MoELayer has no shape inference
            name = names.new(f"{layer.name}.output")
            graph.node.append(helper.make_node("Identity", [new], [old], name))
