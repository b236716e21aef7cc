"""Experts whose weights are stacked in one tensor for each projection, (experts, rows, columns).

Two forms, and what lies between them:

* gathered: the weights of the chosen experts are gathered for every (token, expert) pair,
  multiplied (MatMul or Einsum), weighted and summed over the pair's ``k``. This is what batched_mm
  of transformers and most hand-written inference code become.
* dense: every expert is computed on every token and weighted by a one-hot mask or a scatter.

The search begins at each TopK and ArgMax. From it the router's logits and the layer's input are
found backwards, then the graph is read forwards (see :mod:`moe_infer.graph.interpreter`), and the
last value that is a MoE layer's output, as an expression, ends the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import NodeProto

from moe_infer.graph.expression import Expr
from moe_infer.graph.interpreter import Interpreter, Opaque
from moe_infer.graph.match import GraphView, Match, NearMiss, attribute, describe
from moe_infer.graph.patterns import Mismatch, Stage, match_layer

NAME = "stacked"

_LAYOUT = ("Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze")
_MOST_CANDIDATES = 8


@dataclass
class _Attempt:
    match: Match | None = None
    stage: int = -1
    node: str = ""
    reason: str = ""

    def improve(self, stage: int, node: str, reason: str) -> None:
        if stage > self.stage:
            self.stage, self.node, self.reason = stage, node, reason


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every block, or how far it went, in the order of the graph."""
    for node in view.nodes:
        if node.op_type in ("TopK", "ArgMax") and node.domain in ("", "ai.onnx"):
            yield _at(view, node)


def _at(view: GraphView, anchor: NodeProto) -> Match | NearMiss:
    logits = _logits(view, anchor)
    best = _Attempt()
    best.improve(
        Stage.ROUTER,
        describe(anchor),
        "the tensor from which the scores are computed could not be found",
    )
    for hidden in _hidden_states(view, logits):
        attempt = _attempt(view, anchor, hidden, logits)
        if attempt.match is not None:
            return attempt.match
        best.improve(attempt.stage, attempt.node, attempt.reason)
    return NearMiss(NAME, describe(anchor), best.stage, best.node, best.reason)


def _logits(view: GraphView, anchor: NodeProto) -> str:
    """The scores before softmax, sigmoid and changes of type."""
    name = str(anchor.input[0])
    while True:
        node = view.producer(name)
        if node is None or node.op_type not in ("Softmax", "Sigmoid", "Cast", "Identity"):
            return name
        if node.op_type == "Softmax" and attribute(node, "axis", -1) not in (-1, 1, 2):
            return name
        name = str(node.input[0])


def _hidden_states(view: GraphView, logits: str) -> Iterator[str]:
    """Candidates for the layer's input: what the router reads, the most upstream first.

    The most upstream is tried first because its other forms (casts, repeated reshapes) can be read
    from it, but it cannot be read from them.
    """
    shape = view.types.shape(logits)
    found: list[str] = []
    name = logits
    while len(found) < _MOST_CANDIDATES:
        node = view.producer(name)
        if node is None:
            break
        data = [i for i in node.input if i and i not in view.constants]
        if node.op_type in ("MatMul", "Gemm", "Add", "Mul", "Div", *_LAYOUT) and data:
            name = data[0]
        else:
            break
        here = view.types.shape(name)
        if (
            shape is not None
            and here is not None
            and len(here) == len(shape)
            and here[-1] != shape[-1]
        ):
            found.append(name)
    first_weighted = _layout_only(view, found)
    yield from reversed(found[:first_weighted])
    yield from found[first_weighted:]


def _layout_only(view: GraphView, chain: list[str]) -> int:
    """How many of the chain's tensors are the first one in another layout or type."""
    for i, name in enumerate(chain[:-1]):
        node = view.producer(name)
        if node is None or node.op_type not in _LAYOUT:
            return i + 1
    return len(chain)


def _attempt(view: GraphView, anchor: NodeProto, hidden: str, logits: str) -> _Attempt:
    attempt = _Attempt()
    try:
        reader = Interpreter(view, hidden, logits)
    except Opaque as reason:
        attempt.improve(Stage.ROUTER, describe(anchor), str(reason))
        return attempt
    reader.run()
    anchor_index = view.position[anchor.output[-1]]
    if anchor_index in reader.opaque:
        attempt.improve(Stage.ROUTER, *reader.describe_opaque(anchor_index))
        return attempt
    for name, value in sorted(reader.env.items(), key=lambda i: view.position.get(i[0], -1)):
        if value.axes != reader.output_axes or name not in view.position:
            continue
        try:
            layer = match_layer(value.expr, reader)
        except Mismatch as miss:
            attempt.improve(miss.stage, describe(view.nodes[view.position[name]]), miss.reason)
            continue
        attempt.match = Match(
            family=NAME,
            hidden_states=hidden,
            router_logits=logits,
            output=name,
            anchor=describe(anchor),
            **layer,
        )
    if attempt.match is None:
        _explain(view, reader, attempt)
    return attempt


def _explain(view: GraphView, reader: Interpreter, attempt: _Attempt) -> None:
    """Names the furthest node at which reading stopped."""
    for index in reader.opaque:
        stages = [_stage(reader, name) for name in view.nodes[index].input if name in reader.env]
        attempt.improve(max(stages, default=Stage.ROUTER), *reader.describe_opaque(index))
    if attempt.stage < Stage.WEIGHTS:
        attempt.reason += "; no stacked constant expert weights are selected by the chosen experts"


def _stage(reader: Interpreter, name: str) -> int:
    """How near to a whole layer a value is."""
    kinds = _operators(reader.env[name].expr)
    if "linear2" in kinds:
        return Stage.DOWN
    if "linear" in kinds:
        return Stage.UP
    if "gathered" in kinds or "weight" in kinds:
        return Stage.WEIGHTS
    return Stage.ROUTED if kinds & {"top_index", "at", "one_hot"} else Stage.ROUTER


def _operators(expr: Expr) -> set[str]:
    """Operators of an expression; ``linear2`` for a linear map of a linear map."""
    found: dict[Expr, set[str]] = {}

    def visit(e: Expr) -> set[str]:
        if e not in found:
            inner = set().union(*(visit(a) for a in e.args)) if e.args else set()
            if e.op == "linear" and "linear" in inner:
                inner.add("linear2")
            found[e] = inner | {e.op}
        return found[e]

    return visit(expr)
