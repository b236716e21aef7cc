"""What a router looks like as expressions: which experts a token takes, and with which weights.

Each router that the operator has is written here as the expressions that a graph with it gives,
and compared with those that were read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moe_infer.graph.expression import Expr, factors_of, is_index, terms_of
from moe_infer.graph.interpreter import Interpreter
from moe_infer.graph.mismatch import Mismatch, Stage, short

_INVISIBLE = 1e-15
"""Added to a sum of softmax's shares it changes nothing in float32."""

_SIGMOID_EPSILON = 1e-20
"""Added to the sum by which the weights of ``sigmoid_topk`` are divided."""

_GROUP_BEST = 2
"""A group is as good as so many of its experts together."""


@dataclass(frozen=True)
class RouterMatch:
    """A router that is known."""

    name: str
    top_k: int
    normalize: bool = False
    options: dict[str, float] = field(default_factory=dict)
    """Attributes of the operator."""
    bias: str = ""
    """Constant that is added to the scores for choosing."""


def match_router(weights: Sequence[Expr], index: Expr, reader: Interpreter) -> RouterMatch:
    """The router that gives these weights (factors) and chosen experts.

    Raises:
        Mismatch: none that is known.
    """
    if not is_index(index):
        raise Mismatch(Stage.COMBINED, f"the experts are chosen by {short(index)}")
    scale = math.prod(w.value for w in weights if w.op == "const")
    weight, epsilon = _without_epsilon(
        reader.algebra.mul(w for w in weights if w.op != "const"), reader
    )
    options = {} if scale == 1 else {"routed_scaling_factor": scale}
    if index.op == "stack":
        return _sparse_mixer(weight, index, options, reader)
    k = int(index.params[0])
    if index.args[0] is reader.logits:
        if weight.op == "const":
            return _unweighted(k, scale)
        for name, normalize, form in _softmax_forms(index, k, reader):
            if weight is form and epsilon <= _INVISIBLE:
                return RouterMatch(name, k, normalize, options)
    found = _sigmoid_topk(weight, epsilon, index, options, reader)
    if found is not None:
        return found
    if index.args[0] is not reader.logits:
        raise Mismatch(
            Stage.COMBINED,
            "the experts are not chosen by the router's logits alone, but by"
            f" {short(index.args[0])}",
        )
    raise Mismatch(
        Stage.COMBINED,
        f"the routing weight is {short(weight)}; known are the softmax of all scores and their"
        " sigmoid (divided by the chosen ones' sum or not), and the softmax of the chosen scores",
    )


def _unweighted(k: int, scale: float) -> RouterMatch:
    if k != 1:
        reason = f"the outputs of {k} experts are added without weights; no router does"
        raise Mismatch(Stage.COMBINED, reason)
    if scale != 1:
        reason = f"one expert's output is multiplied by {scale:g}; no router does"
        raise Mismatch(Stage.COMBINED, reason)
    return RouterMatch("default", 1)


def _softmax_forms(index: Expr, k: int, reader: Interpreter) -> Iterator[tuple[str, bool, Expr]]:
    algebra, logits = reader.algebra, reader.logits
    share = algebra.at(algebra.softmax("e", logits), index)
    yield "softmax_topk", False, share
    yield "softmax_topk", True, algebra.mul((share, algebra.recip(algebra.sum("k", k, share))))
    yield "topk_softmax", False, algebra.softmax("k", algebra.at(logits, index))


def _without_epsilon(weight: Expr, reader: Interpreter) -> tuple[Expr, float]:
    """The weight without a small number in the sum that divides it, and the number."""
    factors = list(factors_of(weight))
    for i, factor in enumerate(factors):
        if factor.op != "recip" or factor.args[0].op != "add":
            continue
        terms = terms_of(factor.args[0])
        numbers = [t for t in terms if t.op == "const"]
        rest = [t for t in terms if t.op != "const"]
        if len(numbers) == 1 and len(rest) == 1 and 0 < numbers[0].value < 1e-6:
            factors[i] = reader.algebra.recip(rest[0])
            return reader.algebra.mul(factors), numbers[0].value
    return weight, 0.0


# DeepSeek-V3


def _sigmoid_topk(
    weight: Expr, epsilon: float, index: Expr, options: dict[str, float], reader: Interpreter
) -> RouterMatch | None:
    """Sigmoid scores, chosen with a bias and in groups; None if the weights are not sigmoid's."""
    algebra, k = reader.algebra, int(index.params[0])
    scores = algebra.make("sigmoid", (reader.logits,))
    chosen = algebra.at(scores, index)
    normalized = algebra.mul((chosen, algebra.recip(algebra.sum("k", k, chosen))))
    if weight is not chosen and weight is not normalized:
        return None
    # Exporters drop the 1e-20: it shows only where all chosen scores are nearly 0.
    if epsilon and not math.isclose(epsilon, _SIGMOID_EPSILON, rel_tol=1e-3):
        raise Mismatch(
            Stage.COMBINED,
            f"to the sum that divides the weights is added {epsilon:.3g}, and not"
            f" {_SIGMOID_EPSILON:g}",
        )
    ranking = index.args[0]
    groups: dict[str, float] = {}
    if ranking.op == "where":
        ranking, groups = _groups(ranking, reader)
    return RouterMatch(
        "sigmoid_topk",
        k,
        weight is normalized and weight is not chosen,
        options | groups,
        _bias(ranking, scores, reader),
    )


def _bias(ranking: Expr, scores: Expr, reader: Interpreter) -> str:
    """Name of the constant by which the ranking is more than the scores; "" if it is the scores."""
    if ranking is reader.logits or ranking is scores:
        return ""
    terms = list(terms_of(ranking))
    vectors = [t for t in terms if t.op == "vector"]
    if len(vectors) == 1 and len(terms) == 2 and scores in terms:
        return str(vectors[0].params[0])
    raise Mismatch(
        Stage.COMBINED,
        f"the experts are chosen by {short(ranking)}; known is the sigmoid of the logits plus a"
        " constant for each expert",
    )


def _groups(ranking: Expr, reader: Interpreter) -> tuple[Expr, dict[str, float]]:
    """The scores that are masked by group, and how many groups there are and are chosen."""
    algebra = reader.algebra
    condition, inside, outside = ranking.args
    if outside.op != "const" or outside.value != -math.inf:
        score = f"{outside.value:g}" if outside.op == "const" else short(outside)
        raise Mismatch(
            Stage.COMBINED,
            f"experts outside the chosen groups get the score {score}; it must be minus"
            " infinity, lest they be chosen when the scores inside are lower. DeepSeek-V3 of"
            " transformers 4 does so; export with transformers 5",
        )
    selections = [e for e in _inner(condition) if e.op == "top_index" and e.params[1:] == ("g",)]
    count, size = reader.sizes.get("g"), reader.sizes.get("i")
    if len(selections) != 1 or count is None or size is None:
        raise Mismatch(Stage.COMBINED, f"experts are masked by {short(condition)}")
    kept = int(selections[0].params[0])
    best = algebra.at(inside, algebra.top_index(inside, _GROUP_BEST, "i"))
    quality = algebra.sum("ki", _GROUP_BEST, best)
    mask = algebra.one_hot(algebra.top_index(quality, kept, "g"))
    if kept > 1:
        mask = algebra.sum("kg", kept, mask)
    if condition not in (mask, algebra.make("nonzero", (mask,))):
        raise Mismatch(
            Stage.COMBINED,
            f"groups are chosen by {short(selections[0].args[0])}; known is the sum of the"
            f" {_GROUP_BEST} best scores of each",
        )
    return inside, {"n_group": count, "topk_group": kept}


def _inner(e: Expr) -> set[Expr]:
    found: set[Expr] = set()
    stack = [e]
    while stack:
        e = stack.pop()
        if e not in found:
            found.add(e)
            stack += e.args
    return found


# Phi-3.5-MoE


def _sparse_mixer(
    weight: Expr, index: Expr, options: dict[str, float], reader: Interpreter
) -> RouterMatch:
    algebra, logits = reader.algebra, reader.logits
    thresholds = {e.args[1].value for e in _inner(weight) if _is_threshold(e)}
    if weight.op != "stack" or len(weight.args) != 2 or len(thresholds) != 1:
        raise Mismatch(
            Stage.COMBINED,
            f"the experts are chosen one after the other, but the weights are {short(weight)};"
            " known is Phi's sparse mixer, of two experts",
        )
    (threshold,) = thresholds
    first = algebra.top_index(logits, 1)
    left = algebra.where(algebra.one_hot(first), algebra.const(-math.inf), logits)
    second = algebra.top_index(left, 1)
    shares = []
    for scores, chosen in ((logits, first), (left, second)):
        best = algebra.at(scores, chosen)
        larger = algebra.largest((algebra.make("abs", (logits,)), best))
        distance = algebra.mul(
            (algebra.add((best, algebra.negative(logits))), algebra.recip(larger))
        )
        far = algebra.make("greater", (distance, algebra.const(threshold)))
        masked = algebra.where(far, algebra.const(-math.inf), scores)
        shares.append(algebra.at(algebra.softmax("e", masked), chosen))
    if index is not algebra.stack((first, second)) or weight is not algebra.stack(shares):
        raise Mismatch(
            Stage.COMBINED,
            f"the routing weights are {short(weight)}, which differs from Phi's sparse mixer",
        )
    return RouterMatch("sparse_mixer", 2, False, options | {"router_jitter": threshold / 2})


def _is_threshold(e: Expr) -> bool:
    return e.op == "greater" and e.args[1].op == "const"
