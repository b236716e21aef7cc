"""Replaces the part of a graph between given tensors by a MoELayer node."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moe_infer.graph.edits import add_opset, remove_named, rename_input, state_like
from moe_infer.graph.layer_checks import ReplaceError, check_types
from moe_infer.graph.match import GraphView, describe, values_read
from moe_infer.graph.region import Region, check_region
from moe_infer.graph.shapes import ValueTypes, infer_types
from moe_infer.op import DOMAIN, OP_TYPE, LayerConfig

REPLACES = "moe_infer.replaces"
"""Key in a MoELayer's metadata: name of the value that it took the place of."""

GIVES = "moe_infer.gives"
"""Key in a MoELayer's metadata: name of the value in that place, when it is not the layer's output
itself but its product with a mask."""

_DIGEST = re.compile(r"\.moe_[0-9a-f]{8}$")


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace_with_moe_layer` did."""

    node_name: str
    output: str
    """The MoELayer's output; its name carries the digest of attributes and weights."""
    value: str
    """What takes the place of the old output: this, its cast, or the old name."""
    removed_nodes: tuple[str, ...]
    removed_constants: tuple[str, ...]
    """Initializers, and outputs of Constant nodes, that nothing reads any more."""
    left: frozenset[str]
    """Values inside the layer that are still computed, for their shape; see `remove_unread`."""


def replace_with_moe_layer(
    model: onnx.ModelProto,
    *,
    hidden_states: str,
    output: str,
    router_logits: str | None = None,
    config: LayerConfig,
    name: str | None = None,
    types: ValueTypes | None = None,
    copy_shared_weights: bool = False,
    kept: str = "",
    like: str = "",
) -> Replacement:
    """Replaces what lies between ``hidden_states`` (and ``router_logits``) and ``output``.

    The nodes that nothing reads any more and the initializers that only they read are removed;
    everything else stays as it is, in its order. The new output's name carries a digest of the
    attributes (the weight file's digest is one of them), since ONNX Runtime's TensorRT engine cache
    tells models apart by names and not by attributes. If ``output`` is an output of the graph it
    keeps its name through an Identity.

    Args:
        model: changed in place.
        hidden_states: name of the tensor (batch, seq, d_model) or (tokens, d_model).
        output: name of the tensor that the layer gives, of the same shape.
        router_logits: name of the scores (..., expert_count), or None when the configuration has
            ``expert_centroids``.
        config: attributes of the node.
        name: of the node; by default ``OUTPUT.MoELayer``.
        types: of :func:`moe_infer.graph.shapes.infer_types`, before any replacement; inferred here
            when None. They become value_info, since MoELayer has no inference of its own.
        copy_shared_weights: replace although other nodes read a weight; the graph then keeps it.
        kept: name of a mask (..., expert_count) of 0 and 1 whose sum over the experts multiplies
            the output; none by default.
        like: name of a tensor whose shape ``output`` has, when it is another layout of the tokens;
            by default ``output`` has that of ``hidden_states``.

    Raises:
        ReplaceError: see :func:`check_region`; also when types or shapes do not fit. The model is
            unchanged.
        ValueError: the configuration does not fit the inputs.
    """
    types = types or infer_types(model)
    view = GraphView(model, types, Path("."))
    for tensor in filter(None, (hidden_states, output, router_logits)):
        if tensor not in view.position and tensor not in view.graph_inputs:
            raise ReplaceError(f"'{tensor}'", "the graph has no such tensor")
    region = check_region(
        view,
        hidden_states=hidden_states,
        output=output,
        router_logits=router_logits,
        copy_shared_weights=copy_shared_weights,
    )
    check_types(view, hidden_states, output, router_logits, config, like)
    node_name = name or f"{output}.{OP_TYPE}"
    if any(n.name == node_name for n in view.nodes):
        raise ReplaceError(f"'{node_name}'", "a node of this name exists; give another 'name'")
    made = digest_name(output, config)
    node = helper.make_node(
        OP_TYPE,
        [hidden_states, *([router_logits] if router_logits else [])],
        [made],
        name=node_name,
        domain=DOMAIN,
        **config.to_attributes(),
    )
    node.metadata_props.add(key=REPLACES, value=output)
    return _replace(view, region, node, output, kept, like)


def attribute_digest(config: LayerConfig) -> str:
    """Eight hexadecimal digits that change with any attribute."""
    text = json.dumps(config.to_attributes(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def digest_name(name: str, config: LayerConfig) -> str:
    """A MoELayer's output name with the digest of its attributes, in place of one it has."""
    return f"{_DIGEST.sub('', name)}.moe_{attribute_digest(config)}"


def _replace(
    view: GraphView, region: Region, node: NodeProto, output: str, kept: str, like: str
) -> Replacement:
    model, graph, types = view.model, view.graph, view.types
    added = [node]
    # The block may compute in float32 on a float16 input; MoELayer gives its input's type.
    wanted, given = types.element_type(output), types.element_type(node.input[0])
    replaced = node.output[0]
    shaped = (node.input[0],) if like else (node.input[0], output)
    state_like(graph, types, node.output[0], shaped, given)
    if kept:
        added += _masked(view, node, kept, given)
        replaced = added[-1].output[0]
        node.metadata_props.add(key=GIVES, value=replaced)
        state_like(graph, types, replaced, (node.input[0], output), given)
    if like:
        shape, replaced = f"{node.output[0]}.shape", f"{node.output[0]}.reshaped"
        added += [
            helper.make_node("Shape", [like], [shape], f"{node.name}.shape"),
            helper.make_node(
                "Reshape", [added[-1].output[0], shape], [replaced], f"{node.name}.reshape"
            ),
        ]
        node.metadata_props.add(key=GIVES, value=replaced)
        rank = len(types.shape(like) or ())
        info = helper.make_tensor_value_info(shape, TensorProto.INT64, [rank])
        graph.value_info.append(info)
        types.infos[shape] = info
        state_like(graph, types, replaced, (like, output), given)
    if wanted and wanted != given:
        before, replaced = replaced, f"{node.output[0]}.cast"
        added.append(helper.make_node("Cast", [before], [replaced], f"{node.name}.cast", to=wanted))
        state_like(graph, types, replaced, (like or node.input[0], output), wanted)
    if output in view.graph_outputs:
        added.append(helper.make_node("Identity", [replaced], [output], f"{node.name}.output"))
    else:
        for user in view.users.get(output, ()):
            rename_input(view.nodes[user], output, replaced)
    place = view.position[output]
    old = view.nodes[place]
    nodes = [*view.nodes[:place], *added, *view.nodes[place + 1 :]]
    dead, constants = _dead(nodes, old, {id(view.nodes[i]) for i in region.ancestors}, view)
    gone = {id(n) for n in dead}
    keep = [n for n in nodes if id(n) not in gone]
    del graph.node[:]
    graph.node.extend(keep)
    values = {o for n in dead for o in n.output if o} - {output} | ({output} - view.graph_outputs)
    remove_named(graph.initializer, constants)
    remove_named(graph.value_info, constants | values)
    add_opset(model)
    names = tuple(describe(n) for n in dead)
    value = output if output in view.graph_outputs else replaced
    inner = {o for i in region.inner for o in view.nodes[i].output if o}
    left = frozenset(inner - values - {output})
    return Replacement(node.name, node.output[0], value, names, tuple(sorted(constants)), left)


def _masked(view: GraphView, node: NodeProto, mask: str, kind: int) -> list[NodeProto]:
    """Nodes that multiply the output by the sum of a mask (..., experts) over the experts."""
    made, axes = node.output[0], f"{node.output[0]}.experts_axis"
    view.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), axes))
    names = [f"{made}.{end}" for end in ("mask", "within_capacity", "masked")]
    nodes = [
        helper.make_node("Cast", [mask], [names[0]], f"{node.name}.mask", to=kind),
        helper.make_node("ReduceSum", [names[0], axes], [names[1]], f"{node.name}.within"),
        helper.make_node("Mul", [made, names[1]], [names[2]], f"{node.name}.masked"),
    ]
    shape = view.types.shape(mask)
    for name, last in zip(names[:2], (None, 1), strict=True):
        dims = None if shape is None else [*shape[:-1], shape[-1] if last is None else last]
        info = helper.make_tensor_value_info(name, kind, dims)
        view.graph.value_info.append(info)
        view.types.infos[name] = info
    return nodes


def _dead(
    nodes: Sequence[NodeProto], replaced: NodeProto, removable: Collection[int], view: GraphView
) -> tuple[list[NodeProto], set[str]]:
    """Nodes of the region that nothing reads any more, and constants that only these read."""
    uses: dict[str, int] = dict.fromkeys(view.graph_outputs, 1)
    for node in nodes:
        for name in values_read(node):
            uses[name] = uses.get(name, 0) + 1
    dead = [replaced]
    read = set(values_read(replaced))
    for node in reversed(nodes):
        if id(node) in removable and not any(uses.get(o, 0) for o in node.output if o):
            dead.append(node)
            for name in values_read(node):
                uses[name] -= 1
                read.add(name)
    constants = {n for n in read if n in view.constants and not uses.get(n, 0)}
    return dead, constants
