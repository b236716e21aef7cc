"""The part of a graph that a layer takes the place of, and whether it can go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from moe_infer.graph.layer_checks import TYPES, ReplaceError
from moe_infer.graph.match import GraphView, describe

_SHAPE_OPS = ("Shape", "Size")
_VIEW_OPS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_SHARED_REMEDY = "to keep a copy for it in the graph, pass copy_shared_weights=True"


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
    if elements <= 1 or tensor.data_type not in (*TYPES, TensorProto.DOUBLE):
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


def _quoted(names: Collection[str]) -> str:
    return " and ".join(f"'{n}'" for n in sorted(names))
