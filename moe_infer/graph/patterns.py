"""What a MoE layer's output looks like as an expression: combination, router, experts.

The families share these patterns; a family says how a graph becomes an expression.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_infer.graph.expert_patterns import ExpertMatch, match_expert
from moe_infer.graph.expression import Expr, factors_of, terms_of
from moe_infer.graph.interpreter import Interpreter
from moe_infer.graph.mismatch import Mismatch, Stage
from moe_infer.graph.router_patterns import RouterMatch, match_router


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
        expert = match_expert(plain.expert, reader)
        index = _index(plain, expert)
        if index.params != (1,) or index.args[0] is not reader.logits:
            raise Mismatch(Stage.COMBINED, "the expert is not the one with the highest logit")
        router = RouterMatch("base_layer", 1)
    else:
        combination = _combination(output, reader)
        expert = match_expert(combination.expert, reader)
        router = match_router(combination.weights, _index(combination, expert), reader)
    d, e = reader.sizes["d"], reader.sizes["e"]
    assert d is not None and e is not None
    return {
        "expert_count": e,
        "d_model": d,
        "hidden_size": expert.hidden_size,
        "sublayer": expert.sublayer,
        "router": router.name,
        "top_k": router.top_k,
        "normalize": router.normalize,
        "parts": expert.parts,
        "options": expert.options | router.options,
        "router_bias": router.bias,
    }


def _index(combination: _Combination, expert: ExpertMatch) -> Expr:
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
