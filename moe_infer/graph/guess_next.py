"""Lets every MoE layer guess which experts the next one will need (docs/fetching-ahead.md).

For two MoELayer nodes that follow each other, the nodes that make the second one's router_logits
from its hidden states are copied and put before the first, to read the first one's hidden states;
what they give becomes the first one's input 2. It is what the second one's router gives for these.
No output of the graph changes, weights are shared, and the graph stays sorted. A layer for which
this cannot be done is left as it is, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import onnx
from onnx import NodeProto

from moe_infer.graph.edits import remove_what_made
from moe_infer.graph.layer_checks import check_next_logits, may_equal
from moe_infer.graph.lower_builder import Names
from moe_infer.graph.lower_nodes import is_layer, layer_config, layer_name
from moe_infer.graph.match import GraphView, describe, values_read
from moe_infer.graph.shapes import Dim, ValueTypes, element_type_name
from moe_infer.op import LayerConfig

MOST_NODES = 32
"""Of a router. The largest that exporters write have a dozen."""

_SAME_ROWS = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""What gives hidden states another type or shape; Expand where it repeats nothing."""


@dataclass(frozen=True)
class Guess:
    """What came of one layer and the next.

    Attributes:
        layer: which guesses.
        following: whose experts it guesses.
        nodes: how many were added for it.
        reason: why it does not guess; empty if it does.
    """

    layer: str
    following: str
    nodes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class GuessReport:
    """What came of all layers. False when none guesses.

    Attributes:
        guesses: for each layer but the last.
        resident: whether all experts of all layers stay on the GPU, so that none is fetched.
    """

    guesses: list[Guess] = field(default_factory=list)
    resident: bool = False

    def __bool__(self) -> bool:
        return any(not guess.reason for guess in self.guesses)

    def __str__(self) -> str:
        if self.resident:
            return (
                "fetching ahead: nothing to fetch, all experts stay on the GPU; it is for layers"
                " with fewer slots than experts (max_concurrency, gpu_budget)"
            )
        count = sum(not guess.reason for guess in self.guesses)
        lines = [
            f"fetching ahead: {count} of {len(self.guesses)} layers that another one follows guess"
            " its experts"
        ]
        lines += [f"  {guess.layer}: {guess.reason}" for guess in self.guesses if guess.reason]
        return "\n".join(lines)


class _NoGuessError(ValueError):
    """This layer cannot guess; the message says why."""


@dataclass(frozen=True)
class _Router:
    """What makes the next layer's logits, as positions of nodes in their order."""

    copied: list[int]
    shared: list[int]
    """Fed by constants alone."""
    renamed: dict[str, str]
    """The next layer's hidden states, as the router reads them, and what takes their place."""


def add_guesses(model: onnx.ModelProto, types: ValueTypes) -> GuessReport:
    """Gives every layer input 2, where a layer follows that streams its experts.

    Args:
        model: with MoELayer nodes; changed in place. Nodes that only constants feed may move.
        types: of its values (:func:`moe_infer.graph.shapes.infer_types`); gets those of the new
            ones.

    Raises:
        ValueError: a MoELayer's attributes are not right.
    """
    view = GraphView(model, types, Path())  # external data is not read
    layers = [(i, node) for i, node in enumerate(view.nodes) if is_layer(node)]
    configs = [layer_config(node) for _, node in layers]
    if layers and not any(map(_streams, configs)):
        return GuessReport(resident=True)
    names = Names(model)
    guesses = []
    added: dict[int, list[NodeProto]] = {}
    moved: set[int] = set()
    for ((place, layer), (_, following)), both in zip(
        pairwise(layers), pairwise(configs), strict=True
    ):
        pair = layer_name(layer), layer_name(following)
        try:
            router = _find_router(view, layer, following, *both)
        except ValueError as error:
            guesses.append(Guess(*pair, reason=str(error)))
            continue
        copies, guess = _copy(view, router, following, pair[0], names)
        early = [i for i in router.shared if i > place and i not in moved]
        moved.update(early)
        added[place] = [*(view.nodes[i] for i in early), *copies]
        layer.input.append(guess)
        guesses.append(Guess(*pair, nodes=len(copies)))
    kept = [i for i in range(len(view.nodes)) if i not in moved]
    nodes = [node for i in kept for node in (*added.get(i, ()), view.nodes[i])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return GuessReport(guesses)


def remove_guesses(model: onnx.ModelProto) -> int:
    """Takes input 2 from every layer, and what only it needed from the graph.

    Returns:
        The number of layers that had one.
    """
    guesses = []
    for node in model.graph.node:
        if is_layer(node) and len(node.input) > 2:
            guesses += node.input[2:]
            del node.input[2:]
    remove_what_made(model, guesses)
    return len(guesses)


def _streams(config: LayerConfig) -> bool:
    return bool(config.tensors) and not config.resident


def _find_router(
    view: GraphView,
    layer: NodeProto,
    following: NodeProto,
    own: LayerConfig,
    config: LayerConfig,
) -> _Router:
    """The nodes that make the next layer's logits from its hidden states.

    Args:
        view: the graph.
        layer: that guesses.
        following: the next one.
        own: attributes of the one that guesses: one whose experts all stay does not fetch.
        config: those of the next one.

    Raises:
        ValueError: says what is in the way.
    """
    name = layer_name(following)
    for who, attributes in ((name, config), (layer_name(layer), own)):
        if not _streams(attributes):
            raise _NoGuessError(f"all experts of {who} stay on the GPU")
    if len(layer.input) > 2:
        raise _NoGuessError("it has an input 2 already")
    if any(len(node.input) < 2 or not node.input[1] for node in (layer, following)):
        raise _NoGuessError(f"it or {name} has no router_logits")
    logits = str(following.input[1])
    check_next_logits(view.types, layer.input[0], logits, config.expert_count)
    forms = _forms(view, following.input[0])
    made = _made_of(view, forms, logits)
    if logits not in made:
        raise _NoGuessError(f"the router_logits of {name} are not made from its hidden states")
    constants = {tensor.name for tensor in view.graph.initializer}
    copied: set[int] = set()
    shared: set[int] = set()
    renamed: dict[str, str] = {}
    pending = [logits]
    while pending:
        value = pending.pop()
        if value in forms:
            renamed[value] = _counterpart(view, value, layer)
        elif value in made:
            index = view.position[value]
            if index not in copied:
                copied.add(index)
                pending += values_read(_ordinary(view.nodes[index], name))
        else:
            shared |= _constant(view, value, constants, name)
        if len(copied) > MOST_NODES:
            raise _NoGuessError(f"the router of {name} has more than {MOST_NODES} nodes")
    return _Router(sorted(copied), sorted(shared), renamed)


def _forms(view: GraphView, hidden_states: str) -> list[str]:
    """A layer's hidden states and what they are a reshape or a cast of, the nearest first."""
    forms = [hidden_states]
    while (node := view.producer(forms[-1])) is not None:
        if node.domain or node.op_type not in _SAME_ROWS:
            break
        before, after = (view.types.shape(v) for v in (node.input[0], forms[-1]))
        # Rows stay rows if their width stays.
        if not before or not after or before[-1] != after[-1] or not isinstance(after[-1], int):
            break
        if node.op_type == "Expand" and not may_equal(before, after):
            break
        forms.append(str(node.input[0]))
    return forms


def _made_of(view: GraphView, forms: Sequence[str], logits: str) -> set[str]:
    """All that is computed from these values up to the logits."""
    made: set[str] = set()
    first, last = view.position.get(forms[-1], 0), view.position.get(logits, -1)
    for node in view.nodes[first : last + 1]:
        if any(value in made or value in forms for value in values_read(node)):
            made.update(node.output)
    return made


def _ordinary(node: NodeProto, name: str) -> NodeProto:
    if is_layer(node) or any(a.HasField("g") or a.graphs for a in node.attribute):
        raise _NoGuessError(f"the router of {name} has {describe(node)}, which is not copied")
    return node


def _counterpart(view: GraphView, value: str, layer: NodeProto) -> str:
    """The form of this layer's hidden states that takes the place of one of the next layer's."""
    types = view.types
    wanted, kind = types.shape(value), types.element_type(value)
    for form in _forms(view, layer.input[0]):
        shape = types.shape(form)
        if wanted and shape and may_equal(shape, wanted) and types.element_type(form) == kind:
            return form
    found = types.shape(layer.input[0])
    raise _NoGuessError(
        f"the next router reads hidden states {_text(types, value, wanted)}, this layer's are"
        f" {_text(types, layer.input[0], found)}"
    )


def _text(types: ValueTypes, value: str, shape: Sequence[Dim] | None) -> str:
    dims = "of unknown shape" if shape is None else f"({', '.join(str(d or '?') for d in shape)})"
    return f"{element_type_name(types.element_type(value))} {dims}"


def _constant(view: GraphView, value: str, constants: set[str], name: str) -> set[int]:
    """Positions of the nodes that make a value from constants alone."""
    found: set[int] = set()
    pending = [value]
    while pending:
        read = pending.pop()
        if read in constants:
            continue
        index = view.position.get(read)
        if index is None or is_layer(view.nodes[index]):
            raise _NoGuessError(
                f"the router of {name} reads '{value}', which is made of other values than its"
                " hidden states"
            )
        if index not in found:
            found.add(index)
            pending += values_read(view.nodes[index])
    return found


def _copy(
    view: GraphView, router: _Router, following: NodeProto, layer: str, names: Names
) -> tuple[list[NodeProto], str]:
    """Copies of the router's nodes, and the value that takes the place of the logits."""
    renamed = dict(router.renamed)
    sizes: dict[str, Dim] = {}
    for theirs, ours in router.renamed.items():
        dims = (view.types.shape(v) or () for v in (theirs, ours))
        sizes |= {a: b for a, b in zip(*dims, strict=True) if isinstance(a, str)}
    prefix = f"{layer}.guess"
    copies = []
    for index in router.copied:
        node = NodeProto()
        node.CopyFrom(view.nodes[index])
        for field_name in ("doc_string", "metadata_props"):  # they speak of the other place
            node.ClearField(field_name)
        node.name = names.new(f"{prefix}/{node.name or node.op_type}")
        for i, value in enumerate(node.input):  # there are no subgraphs
            node.input[i] = renamed.get(value, value)
        for i, value in enumerate(node.output):
            if value:
                node.output[i] = names.new(f"{prefix}/{value}")
                renamed[value] = node.output[i]
                _state(view.types, value, node.output[i], sizes)
        copies.append(node)
    return copies, renamed[following.input[1]]


def _state(types: ValueTypes, like: str, name: str, sizes: dict[str, Dim]) -> None:
    """Gives a copy its value's type, with the dimensions of the hidden states that it reads."""
    if like not in types.infos:
        return
    info = onnx.ValueInfoProto()
    info.CopyFrom(types.infos[like])
    info.name = name
    for dim in info.type.tensor_type.shape.dim:
        if dim.dim_param in sizes:
            size = sizes[dim.dim_param]
            dim.Clear()
            if isinstance(size, int):
                dim.dim_value = size
            elif size is not None:
                dim.dim_param = size
    types.infos[name] = info
