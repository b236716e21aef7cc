"""What a MoE layer's output looks like as an expression: combination, router, experts.

The families share these patterns; a family says how a graph becomes an expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from moe_infer.graph.expression import Expr, activation_name, factors_of, terms_of
from moe_infer.graph.interpreter import Interpreter
from moe_infer.graph.match import Part
from moe_infer.op import RMS_NORM_EPSILON


class Stage(IntEnum):
    """How far a pattern went."""

    ROUTER = 0
    ROUTED = 1
    WEIGHTS = 2
    UP = 3
    DOWN = 4
    COMBINED = 5


class Mismatch(Exception):  # noqa: N818 - a signal inside this package, not an error
    """An expression is not the pattern's; the text says where it differs."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage, self.reason = stage, reason


class _Expert(NamedTuple):
    sublayer: str
    hidden_size: int
    parts: dict[str, Part]
    chosen: Expr | None
    """The chosen expert; None in the dense form."""


class _Combination(NamedTuple):
    weights: list[Expr]
    """Factors of the weight of an expert's output."""
    expert: Expr
    chosen: Expr | None
    """The chosen experts when a mask names them."""


def match_layer(output: Expr, reader: Interpreter) -> dict[str, Any]:
    """Fields of :class:`moe_infer.graph.match.Match` that an expression decides.

    Args:
        output: of the layer.
        reader: which made it.

    Raises:
        Mismatch: the expression is no MoE layer.
    """
    plain = _base_layer(output, reader)
    if plain is not None:
        combination, router, normalize = plain, "base_layer", False
        expert = _expert(combination.expert, reader)
        index = _index(combination, expert)
    else:
        combination = _combination(output, reader)
        expert = _expert(combination.expert, reader)
        index = _index(combination, expert)
        router, normalize = _router(combination.weights, index, reader)
    k = int(index.params[0])
    if index.args[0] is not reader.logits:
        raise Mismatch(Stage.COMBINED, "the experts are not chosen by the router's logits alone")
    d, e = reader.sizes["d"], reader.sizes["e"]
    assert d is not None and e is not None
    return {
        "expert_count": e,
        "d_model": d,
        "hidden_size": expert.hidden_size,
        "sublayer": expert.sublayer,
        "router": router,
        "top_k": k,
        "normalize": normalize,
        "parts": expert.parts,
    }


def _index(combination: _Combination, expert: _Expert) -> Expr:
    index = combination.chosen or expert.chosen
    if index is None:
        raise Mismatch(Stage.DOWN, "all experts are computed, but none is chosen")
    if expert.chosen is not None and expert.chosen is not index:
        raise Mismatch(Stage.DOWN, "the experts' weights and their outputs are chosen differently")
    return index


# Combination


def _base_layer(output: Expr, reader: Interpreter) -> _Combination | None:
    """Is it s * expert + (1 - s) * x with s = sigmoid(the highest score)?"""
    algebra = reader.algebra
    gates = {
        f
        for term in terms_of(output)
        for f in factors_of(term)
        if f.op == "sigmoid" and f.args[0].op == "at" and f.args[0].args[0] is reader.logits
    }
    for gate in gates:
        inverse = algebra.add((algebra.const(1), algebra.negative(gate)))
        rest = list(terms_of(output))
        carried = algebra.mul((reader.x, inverse))
        split = (reader.x, algebra.negative(algebra.mul((reader.x, gate))))
        if carried in rest:
            rest.remove(carried)
        elif all(t in rest for t in split):
            for t in split:
                rest.remove(t)
        else:
            continue
        if len(rest) == 1 and gate in factors_of(rest[0]):
            factors = list(factors_of(rest[0]))
            factors.remove(gate)
            inner = _combination(algebra.mul(factors), reader)
            if not inner.weights:
                index = gate.args[0].args[1]
                return _Combination([], inner.expert, inner.chosen or index)
    return None


def _combination(output: Expr, reader: Interpreter) -> _Combination:
    """A weighted sum over the chosen experts, or over all with a mask."""
    weights: list[Expr] = []
    core: list[Expr] = []
    for factor in factors_of(output):
        (core if "d" in factor.atoms else weights).append(factor)
    if len(core) != 1:
        raise Mismatch(Stage.ROUTED, "it is no weighted sum of experts")
    body = core[0]
    if body.op == "sum" and body.params[0] in ("k", "e"):
        inner = [f for f in factors_of(body.args[0]) if "d" in f.atoms]
        scalars = [f for f in factors_of(body.args[0]) if "d" not in f.atoms]
        if len(inner) != 1:
            raise Mismatch(Stage.DOWN, "the sum over experts is not of one output and its weight")
        if body.params[0] == "k":
            return _Combination(weights + scalars, inner[0], None)
        mask = [f for f in scalars if "e" in f.atoms]
        weights += [f for f in scalars if "e" not in f.atoms]
        if len(mask) != 1:
            raise Mismatch(Stage.DOWN, "the sum over all experts has no mask of the chosen ones")
        more, index = _mask(mask[0])
        return _Combination(weights + more, inner[0], index)
    if "k" in body.atoms or "e" in body.atoms:
        raise Mismatch(Stage.DOWN, "the experts' outputs are not summed")
    return _Combination(weights, body, None)


def _mask(mask: Expr) -> tuple[list[Expr], Expr]:
    """Weights and chosen experts of one_hot(i), or of the sum over k of one_hot(i) * weight."""
    inner = mask.args[0] if mask.op == "sum" and mask.params[0] == "k" else mask
    hot = [f for f in factors_of(inner) if f.op == "one_hot"]
    rest = [f for f in factors_of(inner) if f.op != "one_hot"]
    if len(hot) != 1 or any("e" in f.atoms for f in rest):
        raise Mismatch(Stage.DOWN, "the experts' outputs are weighted by no mask of chosen experts")
    return rest, hot[0].args[0]


# Routers


def _router(weights: Sequence[Expr], index: Expr, reader: Interpreter) -> tuple[str, bool]:
    """Router's name, and whether weights are divided by their sum."""
    algebra, logits, k = reader.algebra, reader.logits, int(index.params[0])
    if not weights:
        if k != 1:
            raise Mismatch(
                Stage.COMBINED,
                f"the outputs of {k} experts are added without weights; no router does",
            )
        return "default", False
    weight = algebra.mul(weights)
    after = algebra.at(algebra.softmax("e", logits), index)
    if weight is after:
        return "softmax_topk", False
    if weight is algebra.mul((after, algebra.recip(algebra.sum("k", k, after)))):
        return "softmax_topk", True
    if weight is algebra.softmax("k", algebra.at(logits, index)):
        return "topk_softmax", False
    raise Mismatch(
        Stage.COMBINED,
        f"the routing weight is {_short(weight)}; known are the softmax of all scores (divided by"
        " the chosen ones' sum or not) and the softmax of the chosen scores",
    )


# Experts


def _expert(output: Expr, reader: Interpreter) -> _Expert:
    terms = list(terms_of(output))
    linears = [t for t in terms if t.op == "linear"]
    if len(linears) != 1:
        raise Mismatch(Stage.ROUTED, "it is not the output of one projection of an expert")
    down = linears[0]
    rest = [t for t in terms if t is not down]
    if any(t.op == "gathered" for t in rest):
        raise Mismatch(Stage.DOWN, "the experts have biases; no sub-layer has")
    gate, up, activation = _gated(down.args[1], reader)
    source = _same_input(gate, up)
    index = _indices((down, gate, up))
    if rest == [reader.x]:
        return _t5(down, gate, up, activation, source, index, reader)
    if rest:
        raise Mismatch(
            Stage.DOWN, f"to the expert's output is added {_short(reader.algebra.add(rest))}"
        )
    if activation != "silu":
        raise Mismatch(
            Stage.DOWN,
            f"the activation is {activation}; gated experts without a residual take silu",
        )
    if source is not reader.x:
        raise Mismatch(Stage.DOWN, f"the experts read {_short(source)} and not the router's input")
    parts = {"gate_weight": _part(gate), "up_weight": _part(up), "down_weight": _part(down)}
    return _Expert("Gated_SiLU", _width(down, reader), parts, index)


def _gated(hidden: Expr, reader: Interpreter) -> tuple[Expr, Expr, str]:
    """Gate and up projections of activation(gate) * up, and the activation's name."""
    factors = list(factors_of(hidden))
    projections = list(dict.fromkeys(p for f in factors for p in _projections(f)))
    if len(projections) != 2:
        raise Mismatch(
            Stage.UP,
            f"the experts' hidden layer is made of {len(projections)} projections; known is"
            " activation(gate) * up",
        )
    for gate, up in (projections, projections[::-1]):
        if up not in factors:
            continue
        left = list(factors)
        left.remove(up)
        name = activation_name(reader.algebra.mul(left), gate)
        if name is not None and name != "identity":
            return gate, up, name
    raise Mismatch(Stage.UP, "the activation between the projections is not known")


def _projections(e: Expr) -> list[Expr]:
    if e.op == "linear" or (e.op == "half" and e.args[0].op == "linear"):
        return [e]
    return [p for a in e.args for p in _projections(a)]


def _linear(projection: Expr) -> Expr:
    return projection.args[0] if projection.op == "half" else projection


def _same_input(gate: Expr, up: Expr) -> Expr:
    if _linear(gate).args[1] is not _linear(up).args[1]:
        raise Mismatch(Stage.UP, "gate and up projections read different values")
    return _linear(gate).args[1]


def _indices(projections: Sequence[Expr]) -> Expr | None:
    found = set()
    for projection in projections:
        weight = _linear(projection).args[0]
        found.add(weight.args[1] if weight.op == "gathered" else None)
    if len(found) != 1:
        raise Mismatch(Stage.DOWN, "the projections' weights are chosen by different indices")
    return found.pop()


def _part(projection: Expr) -> Part:
    linear = _linear(projection)
    weight = linear.args[0].args[0] if linear.args[0].op == "gathered" else linear.args[0]
    start, step = (int(p) for p in projection.params[:2]) if projection.op == "half" else (0, 1)
    return Part(str(weight.params[0]), linear.params[0] == 1, start, step)


def _width(down: Expr, reader: Interpreter) -> int:
    """Intermediate size, which is what the down projection contracts."""
    weight = down.args[0].args[0] if down.args[0].op == "gathered" else down.args[0]
    size = reader.sizes[f"{weight.params[0]}#{down.params[0]}"]
    assert size is not None
    return size


def _t5(
    down: Expr,
    gate: Expr,
    up: Expr,
    activation: str,
    source: Expr,
    index: Expr | None,
    reader: Interpreter,
) -> _Expert:
    """Experts of the form x + down(gelu_tanh(gate(n)) * up(n)) with n the RMS norm of x."""
    if activation != "gelu_tanh":
        raise Mismatch(Stage.DOWN, f"the activation is {activation}; T5_FF's is gelu by tanh")
    algebra, d = reader.algebra, reader.sizes["d"]
    assert d is not None
    factors = list(factors_of(source))
    norms = [f for f in factors if f.op in ("gathered", "weight")]
    scale = [f for f in factors if f.op == "rsqrt"]
    if len(factors) != 3 or len(norms) != 1 or len(scale) != 1 or reader.x not in factors:
        raise Mismatch(
            Stage.DOWN,
            f"the experts read {_short(source)}; T5_FF reads weight * x / sqrt(mean(x^2) + eps)",
        )
    square = algebra.sum("d", d, algebra.mul((reader.x, reader.x)))
    mean = algebra.mul((algebra.const(1 / d), square))
    terms = terms_of(scale[0].args[0])
    epsilon = sum(t.value for t in terms if t.op == "const")
    if [t for t in terms if t.op != "const"] != [mean]:
        raise Mismatch(
            Stage.DOWN, f"the experts' norm divides by the root of {_short(scale[0].args[0])}"
        )
    if abs(epsilon - RMS_NORM_EPSILON) > 1e-3 * RMS_NORM_EPSILON:
        raise Mismatch(
            Stage.DOWN, f"the norm's epsilon is {epsilon:.3g}; T5_FF's is {RMS_NORM_EPSILON:g}"
        )
    weight = norms[0].args[0] if norms[0].op == "gathered" else norms[0]
    if norms[0].op == "gathered" and norms[0].args[1] is not index:
        raise Mismatch(Stage.DOWN, "the norm's weights are chosen by another index")
    if len([a for a in weight.atoms if "#" in a]) != 1:
        raise Mismatch(Stage.DOWN, "the norm's weight is no vector for each expert")
    parts = {
        "layer_norm_weight": Part(str(weight.params[0])),
        "wi_0_weight": _part(gate),
        "wi_1_weight": _part(up),
        "wo_weight": _part(down),
    }
    return _Expert("T5_FF", _width(down, reader), parts, index)


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) <= 160 else text[:157] + "..."
