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

from moe_infer.graph.match import GraphView, describe, values_read
from moe_infer.graph.shapes import Dim, ValueTypes, element_type_name, infer_types
from moe_infer.op import DOMAIN, OP_TYPE, OPSET_VERSION, LayerConfig

REPLACES = "moe_infer.replaces"
"""Key in a MoELayer's metadata: name of the value that it took the place of."""

GIVES = "moe_infer.gives"
"""Key in a MoELayer's metadata: name of the value in that place, when it is not the layer's output
itself but its product with a mask."""

_DIGEST = re.compile(r"\.moe_[0-9a-f]{8}$")
_SHAPE_OPS = ("Shape", "Size")
_VIEW_OPS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_SHARED_REMEDY = "to keep a copy for it in the graph, pass copy_shared_weights=True"
_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


class ReplaceError(ValueError):
    """The part of the graph cannot be replaced; nothing was changed."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node, self.reason = node, reason


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


@dataclass(frozen=True)
class Region:
    """The nodes between the layer's inputs and its output."""

    inner: frozenset[int]
    """Positions of the nodes that compute with the inputs or the weights."""
    ancestors: frozenset[int]
    """These, and the nodes that only shapes and constants feed; others may need these too."""
    weights: tuple[str, ...]
    """Constants of floating-point type with more than one element that inner nodes read."""


def check_region(
    view: GraphView,
    *,
    hidden_states: str,
    output: str,
    router_logits: str | None = None,
    copy_shared_weights: bool = False,
) -> Region:
    """Finds the nodes between tensors and checks that they can go.

    Raises:
        ReplaceError: an inner value is used elsewhere or is an output of the graph, a weight is not
            constant, is an input of the graph or is used elsewhere; names the node.
    """
    sources = {hidden_states} | ({router_logits} if router_logits else set())
    ancestors, constants = _ancestors(view, output, sources)
    inner = _inner(view, ancestors, sources)
    if view.position.get(output) not in inner:
        raise ReplaceError(
            f"'{output}'", f"it is not computed from '{hidden_states}'; check the tensors' names"
        )
    own = inner - _views(view, inner, sources)
    ancestors |= _measured(view, ancestors, own)
    shapes = _shapes(view, ancestors, own)
    # The shape of what only the router computes may be used outside: exporters share equal shapes
    # among layers. What gives it then stays, and goes when its last reader goes.
    heavy = _after_matrices(view, own, constants)
    light = (o for i in own - heavy for o in view.nodes[i].output)
    users = {user for value in light for user in view.users.get(value, ())}
    measured = {u for u in users if view.nodes[u].op_type in _SHAPE_OPS}
    _check_inner_uses(view, own, inner | shapes | measured, output)
    _check_inner_uses(view, _shapes(view, ancestors, heavy), ancestors, output)
    weights = tuple(name for name in constants if _is_weight(view, name))
    # Constants beside the weights (epsilons, axes) are often shared between layers, and stay.
    cast = {o for i in ancestors - inner for o in view.nodes[i].output}
    if not copy_shared_weights:
        allowed = inner | _only_casts(view, ancestors, cast)
        for name in weights:
            _check_weight_uses(view, name, allowed)
    return Region(frozenset(inner), frozenset(ancestors), weights)


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


def add_opset(model: onnx.ModelProto) -> None:
    """Imports the operator's domain, once."""
    if not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, OPSET_VERSION))


def rename_value(graph: onnx.GraphProto, types: ValueTypes, old: str, new: str) -> None:
    """Gives what a node of the main graph makes another name, everywhere but among the outputs."""
    for node in graph.node:
        _rename_input(node, old, new)
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


# Finding the region


def _ancestors(
    view: GraphView, output: str, sources: Collection[str]
) -> tuple[set[int], list[str]]:
    found: set[int] = set()
    constants: dict[str, None] = {}
    stack = [(output, "")]
    initializers = {t.name for t in view.graph.initializer}
    while stack:
        name, reader = stack.pop()
        if not name or name in sources:
            continue
        if name in view.graph_inputs:
            initial = ", though it has an initial value" if name in initializers else ""
            raise ReplaceError(
                reader or f"'{output}'",
                f"reads '{name}', which is an input of the graph{initial}: weights must be"
                " constants, and the layer may"
                f" depend on {_quoted(sources)} only",
            )
        if name in view.constants:
            constants[name] = None
        index = view.position.get(name)
        if index is None or index in found:
            continue
        node = view.nodes[index]
        found.add(index)
        if any(a.HasField("g") for a in node.attribute):
            raise ReplaceError(describe(node), "a node with a subgraph lies inside the layer")
        if node.op_type not in _SHAPE_OPS:
            stack += [(i, describe(node)) for i in node.input]
    return found, list(constants)


def _inner(view: GraphView, ancestors: set[int], sources: Collection[str]) -> set[int]:
    """Ancestors that the sources' values reach, other than as shapes."""
    inner: set[int] = set()
    reached = set(sources)
    for index in sorted(ancestors):
        node = view.nodes[index]
        if node.op_type not in _SHAPE_OPS and any(i in reached for i in node.input):
            inner.add(index)
            reached.update(node.output)
    return inner


def _views(view: GraphView, inner: set[int], sources: Collection[str]) -> set[int]:
    """Inner nodes that only give a source another type or shape; others may use these, too."""
    found: set[int] = set()
    same = set(sources)
    for index in sorted(inner):
        node = view.nodes[index]
        if node.op_type in _VIEW_OPS and node.input[0] in same:
            found.add(index)
            same.update(node.output)
    return found


def _measured(view: GraphView, ancestors: set[int], made: set[int]) -> set[int]:
    """Nodes outside that read what is made inside and of whose results only shapes are used."""
    found: set[int] = set()
    for index in sorted(made):
        for value in view.nodes[index].output:
            for user in view.users.get(value, ()):
                outputs = view.nodes[user].output
                after = [u for o in outputs for u in view.users.get(o, ())]
                measures = all(
                    u in ancestors and view.nodes[u].op_type in _SHAPE_OPS for u in after
                )
                named = any(o in view.graph_outputs for o in outputs)
                if user not in ancestors and after and measures and not named:
                    found.add(user)
                    made_by = (view.position.get(i) for i in view.nodes[user].input)
                    found |= {i for i in made_by if i is not None and _is_constant(view, i)}
    return found


def _is_constant(view: GraphView, index: int) -> bool:
    return bool(view.nodes[index].op_type == "Constant")


def _shapes(view: GraphView, ancestors: set[int], values: set[int]) -> set[int]:
    """Ancestors that compute with the shapes of what other ancestors give."""
    found: set[int] = set()
    inside = {o for i in values for o in view.nodes[i].output}
    shapes: set[str] = set()
    for index in sorted(ancestors):
        node = view.nodes[index]
        read = inside if node.op_type in _SHAPE_OPS else shapes
        if any(i in read for i in node.input if i):
            found.add(index)
            shapes.update(node.output)
    return found


def _after_matrices(view: GraphView, inner: set[int], constants: Collection[str]) -> set[int]:
    """Inner nodes that depend on constants of two or more dimensions: on experts, not on biases."""
    found: set[int] = set()
    reached = {name for name in constants if len(view.constants[name].dims) > 1}
    for index in sorted(inner):
        if any(i in reached for i in view.nodes[index].input if i):
            found.add(index)
            reached.update(view.nodes[index].output)
    return found


def _check_inner_uses(
    view: GraphView, inner: set[int], allowed: Collection[int], output: str
) -> None:
    """What is made inside must be read inside; views of the sources are not among ``inner``."""
    for index in sorted(inner):
        node = view.nodes[index]
        for value in node.output:
            if value == output or not value:
                continue
            if value in view.graph_outputs:
                raise ReplaceError(
                    describe(node),
                    f"its output '{value}', inside the layer, is an output of the graph",
                )
            for user in view.users.get(value, ()):
                if user not in allowed:
                    raise ReplaceError(
                        describe(node),
                        f"its output '{value}', inside the layer, is also used by"
                        f" {describe(view.nodes[user])}",
                    )


def _only_casts(view: GraphView, ancestors: set[int], values: Collection[str]) -> set[int]:
    """Ancestors outside the inner nodes that only constants feed (casts, transposes of weights)."""
    found: set[int] = set()
    for index in sorted(ancestors):
        node = view.nodes[index]
        constant = all(
            i in view.constants or (i in values and view.position.get(i) in found)
            for i in node.input
            if i
        )
        if constant and node.op_type != "Constant":
            found.add(index)
    return found


def _is_weight(view: GraphView, name: str) -> bool:
    tensor = view.constants[name]
    elements = int(np.prod(tensor.dims, dtype=np.int64))
    if elements <= 1 or tensor.data_type not in (*_TYPES, TensorProto.DOUBLE):
        return False
    # Zeros to scatter into, and the like, are often shared between layers.
    small = view.small(name)
    return small is None or bool((small != small.ravel()[0]).any())


def _check_weight_uses(view: GraphView, name: str, allowed: Collection[int]) -> None:
    if name in view.graph_outputs:
        raise ReplaceError(f"weight '{name}'", "it is an output of the graph")
    for user in view.users.get(name, ()):
        node = view.nodes[user]
        if user not in allowed:
            raise ReplaceError(
                describe(node),
                f"reads '{name}', which is shared with the layer; {_SHARED_REMEDY}",
            )
    # A weight may reach another node through its cast.
    for index in view.users.get(name, ()):
        node = view.nodes[index]
        if all(i in view.constants for i in node.input if i):
            for value in node.output:
                for user in view.users.get(value, ()):
                    if user not in allowed:
                        raise ReplaceError(
                            describe(view.nodes[user]),
                            f"reads '{name}', which is shared with the layer, through"
                            f" {describe(node)}; {_SHARED_REMEDY}",
                        )


# Checks of the node


def check_types(
    view: GraphView,
    hidden_states: str,
    output: str,
    router_logits: str | None,
    config: LayerConfig,
    like: str = "",
) -> None:
    """Checks that the tensors have the types and shapes that the operator takes.

    Args:
        view: the graph.
        hidden_states: see :func:`replace_with_moe_layer`, as the others.
        output: of the layer.
        router_logits: or None.
        config: of the node.
        like: whose shape the output has.

    Raises:
        ReplaceError: names the tensor, what it is and what is needed.
        ValueError: the configuration does not fit the inputs.
    """
    types = view.types
    shape, result = types.shape(hidden_states), types.shape(output)
    if shape is None or len(shape) not in (2, 3) or not isinstance(shape[-1], int):
        raise ReplaceError(
            f"'{hidden_states}'",
            f"its shape is {_shape(shape)}; needed is (batch, seq, d_model) or (tokens, d_model)"
            " with a fixed d_model",
        )
    if types.element_type(hidden_states) not in _TYPES:
        kind = element_type_name(types.element_type(hidden_states))
        raise ReplaceError(f"'{hidden_states}'", f"its type is {kind}; needed is {_type_names()}")
    due = types.shape(like) if like else shape
    if result is not None and (due is None or not _may_equal(due, result)):
        raise ReplaceError(
            f"'{output}'", f"its shape is {_shape(result)}, that of the input {_shape(due)}"
        )
    config.check_inputs(shape[-1], router_logits is not None)
    if router_logits is None:
        return
    scores = types.shape(router_logits)
    if scores is None or not _may_equal((*shape[:-1], config.expert_count), scores):
        wanted = _shape((*shape[:-1], config.expert_count))
        raise ReplaceError(
            f"'{router_logits}'", f"its shape is {_shape(scores)}; needed is {wanted}"
        )
    given = types.element_type(router_logits)
    if given not in (TensorProto.FLOAT, types.element_type(hidden_states)):
        raise ReplaceError(
            f"'{router_logits}'",
            f"its type is {element_type_name(given)}; needed is float32 or the input's",
        )


def _may_equal(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(
        not (isinstance(x, int) and isinstance(y, int)) or x == y for x, y in zip(a, b, strict=True)
    )


def _shape(shape: Sequence[Dim] | None) -> str:
    return "not known" if shape is None else "(" + ", ".join(str(d or "?") for d in shape) + ")"


def _type_names() -> str:
    return "float32, float16 or bfloat16"


def _quoted(names: Collection[str]) -> str:
    return " and ".join(f"'{n}'" for n in sorted(names))


# Surgery


def _replace(
    view: GraphView, region: Region, node: NodeProto, output: str, kept: str, like: str
) -> Replacement:
    model, graph, types = view.model, view.graph, view.types
    added = [node]
    # The block may compute in float32 on a float16 input; MoELayer gives its input's type.
    wanted, given = types.element_type(output), types.element_type(node.input[0])
    replaced = node.output[0]
    shaped = (node.input[0],) if like else (node.input[0], output)
    _add_value_info(graph, types, node.output[0], shaped, given)
    if kept:
        added += _masked(view, node, kept, given)
        replaced = added[-1].output[0]
        node.metadata_props.add(key=GIVES, value=replaced)
        _add_value_info(graph, types, replaced, (node.input[0], output), given)
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
        _add_value_info(graph, types, replaced, (like, output), given)
    if wanted and wanted != given:
        before, replaced = replaced, f"{node.output[0]}.cast"
        added.append(helper.make_node("Cast", [before], [replaced], f"{node.name}.cast", to=wanted))
        _add_value_info(graph, types, replaced, (like or node.input[0], output), wanted)
    if output in view.graph_outputs:
        added.append(helper.make_node("Identity", [replaced], [output], f"{node.name}.output"))
    else:
        for user in view.users.get(output, ()):
            _rename_input(view.nodes[user], output, replaced)
    place = view.position[output]
    old = view.nodes[place]
    nodes = [*view.nodes[:place], *added, *view.nodes[place + 1 :]]
    dead, constants = _dead(nodes, old, {id(view.nodes[i]) for i in region.ancestors}, view)
    gone = {id(n) for n in dead}
    keep = [n for n in nodes if id(n) not in gone]
    del graph.node[:]
    graph.node.extend(keep)
    values = {o for n in dead for o in n.output if o} - {output} | ({output} - view.graph_outputs)
    _remove(graph.initializer, constants)
    _remove(graph.value_info, constants | values)
    add_opset(model)
    names = tuple(describe(n) for n in dead)
    value = output if output in view.graph_outputs else replaced
    inner = {o for i in region.inner for o in view.nodes[i].output if o}
    left = frozenset(inner - values - {output})
    return Replacement(node.name, node.output[0], value, names, tuple(sorted(constants)), left)


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
    _remove(model.graph.initializer, constants)
    _remove(model.graph.value_info, gone | constants)


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


def _rename_input(node: NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else []
        for graph in (*graphs, *attribute.graphs):
            for inner in graph.node:
                _rename_input(inner, old, new)
            for result in graph.output:
                if result.name == old:
                    result.name = new


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


def _remove(repeated: list[onnx.TensorProto], names: Collection[str]) -> None:
    for i in range(len(repeated) - 1, -1, -1):
        if repeated[i].name in names:
            del repeated[i]


def _add_value_info(
    graph: onnx.GraphProto, types: ValueTypes, name: str, like: Sequence[str], kind: int
) -> None:
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
