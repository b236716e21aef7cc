"""Finds where a MoE block may begin, reads on from there, and compares with what a layer is.

The search begins at each TopK and ArgMax. From it the router's logits and the layer's input are
found backwards, then the graph is read forwards (see :mod:`moe_infer.graph.interpreter`), and the
last value that is a MoE layer's output, as an expression, ends the block. The families that begin
so differ in what their readers know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, TensorProto

from moe_infer.graph.expression import Expr
from moe_infer.graph.interpreter import Interpreter, Opaque
from moe_infer.graph.match import GraphView, Match, NearMiss, describe
from moe_infer.graph.mismatch import Mismatch, Stage
from moe_infer.graph.patterns import match_layer

OLDEST_OPSET = 13
"""Before it Softmax, Split and reductions had other meanings or took axes in other ways."""

_SCORES = ("Softmax", "Sigmoid", "Cast", "Identity")
_CHOICE = ("Add", "Sub", "Mul", "Div", "Where", "Reshape", "TopK", "ReduceSum", "ScatterElements")
_MOST_STEPS = 24
_LAYOUT = ("Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze")
_SHAPE_OPS = ("Shape", "Size")
_MOST_CANDIDATES = 8
_MOST_CAUSES = 500


@dataclass
class _Attempt:
    """The best of several ways to read a block."""

    match: Match | None = None
    rank: tuple[int, int] = (-1, 0)
    """Stage that was reached, and the stage to which the pattern agreed with it: a value that is
    nearly a layer's output tells more than a node that could not be read."""
    node: str = ""
    reason: str = ""

    wrong_export: bool = False
    recognised: bool = False
    read: int = 0
    """Values that could be read."""

    def improve(self, rank: tuple[int, int], node: str, reason: str) -> None:
        if rank >= self.rank:
            self.rank, self.node, self.reason = rank, node, reason


def search(
    view: GraphView, family: str, reader: type[Interpreter], *, basic: bool = False
) -> Iterator[Match | NearMiss]:
    """Reads from every TopK and ArgMax on, and compares what was read with a MoE layer.

    Args:
        view: the graph.
        family: name for the report.
        reader: what the family knows beyond :class:`Interpreter`.
        basic: tell also how far it went where nothing of the family was found.
    """
    for node in view.nodes:
        complete = bool(node.input) and bool(node.output)
        if complete and node.op_type in ("TopK", "ArgMax") and node.domain in ("", "ai.onnx"):
            found = _at(view, node, family, reader, basic)
            if found is not None:
                yield found


def _at(
    view: GraphView, anchor: NodeProto, family: str, reader: type[Interpreter], basic: bool
) -> Match | NearMiss | None:
    if view.opset < OLDEST_OPSET:
        reason = f"opset {view.opset}; convert the model to {OLDEST_OPSET} or newer"
        return NearMiss(family, describe(anchor), Stage.ROUTER, describe(anchor), reason)
    best = _Attempt()
    reason = "the tensor from which the scores are computed could not be found"
    best.improve((-1, 0), describe(anchor), reason)
    recognised = basic
    for logits in _logits(view, anchor):
        for hidden in _hidden_states(view, logits):
            attempt = _attempt(view, anchor, hidden, logits, family, reader)
            if attempt.match is not None:
                return attempt.match
            recognised |= attempt.recognised
            if attempt.rank > best.rank:
                best = attempt
    if not recognised:
        return None
    return NearMiss(
        family, describe(anchor), best.rank[0], best.node, best.reason, best.wrong_export
    )


def _logits(view: GraphView, anchor: NodeProto) -> list[str]:
    """Candidates for the scores before softmax, sigmoid and changes of type, the nearest first.

    The nearest is what these operators read alone. Behind it there may be more: a bias for
    choosing, masks of groups, or the choice of another expert before this one.
    """
    found: list[str] = []
    name = str(anchor.input[0])
    direct = True
    for _ in range(_MOST_STEPS):
        node = view.producer(name)
        plain = node is not None and node.op_type in _SCORES and not _rounds(view, node)
        if direct and not plain:
            found.append(name)
            direct = False
        if node is None or not (plain or node.op_type in _CHOICE):
            break
        data = [i for i in node.input if i and i not in view.constants]
        if not data or (not direct and not plain and node.op_type in _SCORES):
            break
        # A mask's condition comes first, what it masks after it.
        name = str(data[-1] if node.op_type == "Where" else data[0])
        if not direct and node.op_type in ("Softmax", "Sigmoid"):
            found.append(_without_casts(view, name))
    if not direct:
        found.append(name)
    return list(dict.fromkeys(found))


def _without_casts(view: GraphView, name: str) -> str:
    for _ in range(_MOST_STEPS):
        node = view.producer(name)
        if node is None or node.op_type not in ("Cast", "Identity") or not node.input:
            break
        if _rounds(view, node):
            break
        name = str(node.input[0])
    return name


def _hidden_states(view: GraphView, logits: str) -> Iterator[str]:
    """Candidates for the layer's input: what the router reads, the most upstream first.

    The most upstream is tried first because its other forms (casts, repeated reshapes) can be read
    from it, but it cannot be read from them.
    """
    shape = view.types.shape(logits)
    found: list[str] = []
    apart: list[str] = []
    name = logits
    while len(found) + len(apart) < _MOST_CANDIDATES:
        node = view.producer(name)
        if node is None:
            break
        data = [i for i in node.input if i and i not in view.constants]
        if node.op_type in ("MatMul", "Gemm", "Add", "Mul", "Div", *_LAYOUT) and data:
            name = data[0]
        else:
            break
        here = view.types.shape(name)
        if shape is None or here is None or here[-1:] == shape[-1:]:
            continue
        if len(here) == len(shape):
            found.append(name)
        elif len(here) == 3 and len(shape) == 2:
            # Router and experts may each have flattened it.
            apart.append(name)
    first_weighted = _layout_only(view, found)
    yield from reversed(found[:first_weighted])
    yield from found[first_weighted:]
    yield from apart


def _layout_only(view: GraphView, chain: list[str]) -> int:
    """How many of the chain's tensors are the first one in another layout or type."""
    for i, name in enumerate(chain[:-1]):
        node = view.producer(name)
        if node is None or node.op_type not in _LAYOUT or _rounds(view, node):
            return i + 1
    return len(chain)


def _rounds(view: GraphView, node: NodeProto) -> bool:
    """True for a Cast to a type with fewer bits: what follows it reads rounded values."""
    if not node.input or not node.output:
        return False
    wide = (TensorProto.FLOAT, TensorProto.DOUBLE)
    before, after = (view.types.element_type(n) for n in (node.input[0], node.output[0]))
    return node.op_type == "Cast" and before in wide and after not in (before, TensorProto.DOUBLE)


def _attempt(
    view: GraphView,
    anchor: NodeProto,
    hidden: str,
    logits: str,
    family: str,
    reader_type: type[Interpreter],
) -> _Attempt:
    attempt = _Attempt()
    try:
        reader = reader_type(view, hidden, logits)
    except Opaque as reason:
        attempt.improve((Stage.ROUTER, 0), describe(anchor), str(reason))
        return attempt
    reader.expect(anchor)
    reader.run()
    attempt.recognised, attempt.read = reader.recognised, len(reader.env)
    anchor_index = view.position[anchor.output[-1]]
    if anchor_index in reader.opaque:
        attempt.improve((Stage.ROUTER, 0), *reader.describe_opaque(anchor_index))
        return attempt
    fields: dict[str, Any] = {}
    outputs: list[str] = []
    for name, value in sorted(reader.env.items(), key=lambda i: view.position.get(i[0], -1)):
        if value.axes not in (reader.output_axes, reader.apart_axes) or name not in view.position:
            continue
        if reader.unfinished(value.expr):
            continue
        try:
            expr, more = reader.outside(value.expr)
            found = {**match_layer(expr, reader), **more}
        except Mismatch as miss:
            node = describe(view.nodes[view.position[name]])
            attempt.improve((_stage(value.expr), miss.stage), node, miss.reason)
            continue
        # The last expression counts, in all its types; in the layout of the logits if it has it.
        same = bool(outputs) and value.expr is reader.env[outputs[-1]].expr
        outputs = [*outputs, name] if same else [name]
        fields = found
    wrong = None if outputs else reader.wrong_export()
    if wrong is not None:
        attempt.improve((Stage.COMBINED, Stage.COMBINED), *wrong)
        attempt.wrong_export = True
        return attempt
    if not outputs:
        _explain(view, reader, attempt)
        return attempt
    if any(reader.env[o].axes == reader.output_axes for o in outputs):
        outputs = [o for o in outputs if reader.env[o].axes == reader.output_axes]
    else:
        fields["like"] = hidden
    hidden, output = _ends(view, reader, hidden, logits, outputs)
    fields.update(hidden_states=hidden, router_logits=logits, output=output)
    used = {part.constant for part in fields["parts"].values()}
    stacks = {name: names for name, names in reader.stacks.items() if name in used}
    attempt.match = Match(family=family, anchor=describe(anchor), stacks=stacks, **fields)
    return attempt


def _ends(
    view: GraphView, reader: Interpreter, hidden: str, logits: str, outputs: list[str]
) -> tuple[str, str]:
    """Input and output of one layout and type, if the graph has such; else the first of both."""
    kind = view.types.element_type
    output = next((o for o in outputs if kind(o) == kind(hidden)), outputs[0])
    if reader.env[hidden].axes == reader.output_axes and kind(output) == kind(hidden):
        return hidden, output
    found = _read_by_experts(view, reader, output, logits)
    if len(found) > 1 and reader.env[hidden].axes == reader.output_axes:
        return hidden, output  # from which all of them are made
    same = [name for name in found if kind(name) == kind(output)]
    return (same or found or [hidden])[0], output


def _read_by_experts(view: GraphView, reader: Interpreter, output: str, logits: str) -> list[str]:
    """The forms of the layer's input, in the layout of its output, that the output depends on."""
    found: list[str] = []
    seen = {output, logits}
    stack = [output]
    while stack:
        name = stack.pop()
        value = reader.env.get(name)
        if value is not None and value.expr is reader.x and value.axes == reader.output_axes:
            found.append(name)
            continue
        node = view.producer(name)
        if node is None or value is None:
            continue
        for i in node.input:
            if i in reader.env and i not in seen:
                seen.add(i)
                stack.append(i)
    return sorted(found, key=lambda name: view.position.get(name, -1))


def _explain(view: GraphView, reader: Interpreter, attempt: _Attempt) -> None:
    """Names the furthest node at which reading stopped."""
    for index in reader.opaque:
        if not _tells(view, reader, index):
            continue
        read = [reader.env[i].expr for i in view.nodes[index].input if i in reader.env]
        stage = max(map(_stage, read), default=Stage.ROUTER)
        if (stage, 0) > attempt.rank:
            attempt.improve((stage, 0), *reader.describe_opaque(_cause(view, reader, index)))
    if attempt.rank[0] < Stage.WEIGHTS:
        attempt.reason += "; no stacked constant expert weights are selected by the chosen experts"


def _cause(view: GraphView, reader: Interpreter, index: int) -> int:
    """The first node that could not be read, of those because of which another could not."""
    causes, seen, stack = [index], {index}, [index]
    while stack and len(seen) < _MOST_CAUSES:
        for name in view.nodes[stack.pop()].input:
            producer = view.position.get(name)
            if name in reader.env or producer is None or producer in seen:
                continue
            seen.add(producer)
            stack.append(producer)
            if producer in reader.opaque and _tells(view, reader, producer):
                causes.append(producer)
    return min(causes)


def _tells(view: GraphView, reader: Interpreter, index: int) -> bool:
    """Whether it matters that a node could not be read: it has a reason, and none of a shape's."""
    return view.nodes[index].op_type not in _SHAPE_OPS and bool(reader.opaque[index])


def _stage(expr: Expr) -> int:
    """How near to a whole layer an expression is."""
    kinds = _operators(expr)
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
