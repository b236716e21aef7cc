"""Small changes of a graph: names, types that are stated, nodes that nothing reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import onnx
from onnx import NodeProto, helper

from moe_infer.graph.match import GraphView, values_read
from moe_infer.graph.shapes import ValueTypes
from moe_infer.op import DOMAIN, OPSET_VERSION


def add_opset(model: onnx.ModelProto) -> None:
    """Imports the operator's domain, once."""
    if not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, OPSET_VERSION))


def rename_value(graph: onnx.GraphProto, types: ValueTypes, old: str, new: str) -> None:
    """Gives what a node of the main graph makes another name, everywhere but among the outputs."""
    for node in graph.node:
        rename_input(node, old, new)
        for i, name in enumerate(node.output):
            if name == old:
                node.output[i] = new
    for info in graph.value_info:
        if info.name == old:
            info.name = new
    if old in types.infos:
        info = onnx.ValueInfoProto()
        info.CopyFrom(types.infos[old])
        info.name = new
        types.infos[new] = info


def rename_input(node: NodeProto, old: str, new: str) -> None:
    """Gives a value that a node reads another name, in its subgraphs, too."""
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else []
        for graph in (*graphs, *attribute.graphs):
            for inner in graph.node:
                rename_input(inner, old, new)
            for result in graph.output:
                if result.name == old:
                    result.name = new


def remove_unread(model: onnx.ModelProto, candidates: Collection[str]) -> None:
    """Removes the nodes that make these values and that nothing reads any more."""
    view = GraphView(model, ValueTypes(), Path("."))
    nodes = {view.position[c] for c in candidates if c in view.position}
    uses = {name: len(users) for name, users in view.users.items()}
    dead: set[int] = set()
    constants: set[str] = set()
    for index in sorted(nodes, reverse=True):
        node = view.nodes[index]
        if any(uses.get(o, 0) or o in view.graph_outputs for o in node.output if o):
            continue
        dead.add(index)
        for name in dict.fromkeys(values_read(node)):
            uses[name] -= 1
            if not uses[name] and name in view.constants and name not in view.graph_outputs:
                constants.add(name)
    if not dead:
        return
    dead |= {view.position[name] for name in constants if name in view.position}
    keep = [node for i, node in enumerate(view.nodes) if i not in dead]
    gone = {o for i in dead for o in view.nodes[i].output}
    del model.graph.node[:]
    model.graph.node.extend(keep)
    remove_named(model.graph.initializer, constants)
    remove_named(model.graph.value_info, gone | constants)


def remove_what_made(model: onnx.ModelProto, values: Collection[str]) -> None:
    """Removes the nodes and constants that only these values needed, which nothing reads now."""
    if not values:
        return
    view = GraphView(model, ValueTypes(), Path("."))
    candidates: set[str] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        node = view.producer(value)
        if node is not None and value not in candidates:
            candidates.add(value)
            pending += values_read(node)
    remove_unread(model, candidates)


def remove_named(repeated: list[onnx.TensorProto], names: Collection[str]) -> None:
    """Removes what has one of the names from a repeated field."""
    for i in range(len(repeated) - 1, -1, -1):
        if repeated[i].name in names:
            del repeated[i]


def state_like(
    graph: onnx.GraphProto, types: ValueTypes, name: str, like: Sequence[str], kind: int
) -> None:
    """States a value's type, and as its shape what one of the others tells."""
    shapes = [s for s in map(types.shape, like) if s is not None]
    # A number says more than a symbol, and the input's symbol more than one made by inference.
    shape = [
        next((d for d in dims if isinstance(d, int)), next((d for d in dims if d), None))
        for dims in zip(*shapes, strict=True)
    ]
    graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))
    types.infos[name] = graph.value_info[-1]


def add_value_info(model: onnx.ModelProto, types: ValueTypes) -> list[str]:
    """Writes type and shape of every value that has none in the graph, as far as they are known.

    Returns:
        Values that still have none, which TensorRT's provider may refuse.
    """
    graph = model.graph
    have = {i.name: i for i in graph.value_info}
    named = {o.name for o in graph.output}
    lacking = []
    for node in graph.node:
        for name in node.output:
            if not name or name in named:
                continue
            stated = ValueTypes({name: have[name]} if name in have else {})
            if stated.complete(name):
                continue
            if not types.complete(name):
                lacking.append(name)
            elif name in have:
                have[name].CopyFrom(types.infos[name])
            else:
                graph.value_info.append(types.infos[name])
    return lacking
