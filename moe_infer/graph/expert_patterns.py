"""What an expert looks like as an expression: its sub-layer, and where its weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_infer.graph.activations import (
    Function,
    activation_name,
    clamped_swiglu,
    evaluate,
    gated_name,
)
from moe_infer.graph.expression import Expr, factors_of, terms_of
from moe_infer.graph.interpreter import Interpreter
from moe_infer.graph.match import Part
from moe_infer.graph.mismatch import Mismatch, Stage, short
from moe_infer.op import RMS_NORM_EPSILON

_GATED = {
    "silu": "Gated_SiLU",
    "gelu": "Gated_GELU",
    "gelu_tanh": "Gated_GELU_Tanh",
    "relu": "Gated_ReLU",
}
_PLAIN = {"silu": "SiLU_FF", "gelu": "GELU_FF", "gelu_tanh": "GELU_Tanh_FF", "relu": "ReLU_FF"}


@dataclass(frozen=True)
class ExpertMatch:
    """An expert that is known."""

    sublayer: str
    hidden_size: int
    parts: dict[str, Part]
    chosen: Expr | None
    """The chosen expert; None in the dense form."""
    options: dict[str, float] = field(default_factory=dict)
    """Attributes of the operator."""


class _Projection(NamedTuple):
    """A linear map with its bias, or the half of the rows of one."""

    linear: Expr
    bias: Expr | None
    start: int
    step: int
    leaves: tuple[Expr, ...]
    """Expressions whose sum it is."""


def match_expert(output: Expr, reader: Interpreter) -> ExpertMatch:
    """The sub-layer that an expression computes.

    Raises:
        Mismatch: none that is known.
    """
    terms = list(terms_of(output))
    linears = [t for t in terms if t.op == "linear"]
    if len(linears) != 1:
        raise Mismatch(Stage.ROUTED, "it is not the output of one projection of an expert")
    biases = [t for t in terms if _is_bias(t)]
    if len(biases) > 1:
        raise Mismatch(Stage.DOWN, "the last projection has more than one bias")
    down = _Projection(linears[0], biases[0] if biases else None, 0, 1, ())
    rest = [t for t in terms if t not in (down.linear, down.bias)]
    hidden = down.linear.args[1]
    first = _projections(hidden)
    index = _indices((down, *first))
    if rest == [reader.x]:
        return _t5(down, first, hidden, index, reader)
    if rest:
        raise Mismatch(Stage.DOWN, f"to the expert's output is added {short(rest)}")
    sublayer, parts, options = _sublayer(hidden, first)
    source = _source(first)
    if source is not reader.x:
        raise Mismatch(Stage.DOWN, f"the experts read {short(source)} and not the router's input")
    if len({p.bias is not None for p in (*first, down)}) != 1:
        raise Mismatch(Stage.DOWN, "only some of the experts' projections have biases")
    return ExpertMatch(sublayer, _width(down, reader), parts | _parts("down", down), index, options)


# Projections


def _is_bias(e: Expr) -> bool:
    weight = e.args[0] if e.op == "gathered" else e
    return weight.op == "weight" and len([a for a in weight.atoms if "#" in a]) == 1


def _projections(hidden: Expr) -> list[_Projection]:
    """Projections of which the hidden layer is made, in the order in which they were read."""
    found: dict[Expr, _Projection] = {}

    def visit(e: Expr) -> None:
        projection = _projection(e)
        if projection is not None:
            found.setdefault(projection.leaves[0], projection)
            return
        for argument in e.args:
            visit(argument)

    visit(hidden)
    return sorted(found.values(), key=lambda p: p.leaves[0].serial)


def _projection(e: Expr) -> _Projection | None:
    if e.op == "half":
        whole = _projection(e.args[0])
        start, step = (int(p) for p in e.params[:2])
        return None if whole is None else whole._replace(start=start, step=step, leaves=(e,))
    if e.op == "linear":
        return _Projection(e, None, 0, 1, (e,))
    if e.op == "add":
        linears = [t for t in e.args if t.op == "linear"]
        biases = [t for t in e.args if _is_bias(t)]
        # What else is added is the activation's.
        if len(linears) == len(biases) == 1:
            return _Projection(linears[0], biases[0], 0, 1, (linears[0], biases[0]))
    return None


def _source(projections: Sequence[_Projection]) -> Expr:
    """What all projections read."""
    if len({p.linear.args[1] for p in projections}) != 1:
        raise Mismatch(Stage.UP, "gate and up projections read different values")
    return projections[0].linear.args[1]


def _indices(projections: Sequence[_Projection]) -> Expr | None:
    found = set()
    for projection in projections:
        for e in (projection.linear.args[0], projection.bias):
            if e is not None:
                found.add(e.args[1] if e.op == "gathered" else None)
    if len(found) != 1:
        raise Mismatch(Stage.DOWN, "the projections' weights are chosen by different indices")
    return found.pop()


def _weight(e: Expr) -> Expr:
    return e.args[0] if e.op == "gathered" else e


def _parts(name: str, projection: _Projection) -> dict[str, Part]:
    """Parts of a projection by the names of :data:`moe_infer.op.SUBLAYERS`."""
    linear, start, step = projection.linear, projection.start, projection.step
    constant = str(_weight(linear.args[0]).params[0])
    parts = {f"{name}_weight": Part(constant, linear.params[0] == 1, start, step)}
    if projection.bias is not None:
        constant = str(_weight(projection.bias).params[0])
        parts[f"{name}_bias"] = Part(constant, False, start, step)
    return parts


def _width(down: _Projection, reader: Interpreter) -> int:
    """Intermediate size, which is what the down projection contracts."""
    weight = _weight(down.linear.args[0])
    size = reader.sizes[f"{weight.params[0]}#{down.linear.params[0]}"]
    assert size is not None
    return size


# Sub-layers


def _sublayer(
    hidden: Expr, first: Sequence[_Projection]
) -> tuple[str, dict[str, Part], dict[str, float]]:
    if len(first) == 1:
        name = activation_name(lambda x: _value(hidden, {first[0]: x}))
        if name not in _PLAIN:
            raise Mismatch(
                Stage.UP,
                f"the experts' hidden layer is {name or 'an unknown function'} of one projection;"
                f" known are {', '.join(_PLAIN)}",
            )
        return _PLAIN[name], _parts("up", first[0]), {}
    if len(first) != 2:
        raise Mismatch(
            Stage.UP,
            f"the experts' hidden layer is made of {len(first)} projections; known is"
            " activation(gate) * up",
        )
    for gate, up in (first, first[::-1]):
        parts = _parts("gate", gate) | _parts("up", up)
        function = _gated_function(hidden, gate, up)
        name = gated_name(function)
        if name in _GATED:
            return _GATED[name], parts, {}
        clamped = clamped_swiglu(function)
        if clamped is not None:
            options = {
                "activation_alpha": clamped.alpha,
                "activation_beta": clamped.beta,
                "swiglu_limit": clamped.limit,
            }
            return "Clamped_SwiGLU", parts, options
    raise Mismatch(
        Stage.UP,
        "the activation between the projections is not known; known are activation(gate) * up with"
        f" {', '.join(_GATED)}, and g * sigmoid(alpha * g) * (u + beta) with g and u clamped",
    )


def _gated_function(hidden: Expr, gate: _Projection, up: _Projection) -> Function:
    return lambda g, u: _value(hidden, {gate: g, up: u})


def _value(hidden: Expr, values: Mapping[_Projection, float]) -> float | None:
    """Value of the hidden layer for values of its projections; None if the bias goes another way.

    A projection's value is given to its leaves in two ways: it must count as a sum.
    """
    whole: dict[Expr, float] = {}
    split: dict[Expr, float] = {}
    for projection, value in values.items():
        product, *bias = projection.leaves
        whole[product], split[product] = value, value
        for leaf in bias:
            whole[leaf], split[leaf], split[product] = 0.0, 0.75, value - 0.75
    first, second = evaluate(hidden, whole), evaluate(hidden, split)
    if first is None or second is None or abs(first - second) > 1e-9 * max(1.0, abs(first)):
        return None
    return first


def _t5(
    down: _Projection,
    first: Sequence[_Projection],
    hidden: Expr,
    index: Expr | None,
    reader: Interpreter,
) -> ExpertMatch:
    """Experts of the form x + down(gelu_tanh(gate(n)) * up(n)) with n the RMS norm of x."""
    sublayer, parts, _ = _sublayer(hidden, first)
    if sublayer != _GATED["gelu_tanh"]:
        names = {sublayer: name for name, sublayer in (*_GATED.items(), *_PLAIN.items())}
        gate = "" if sublayer in _GATED.values() else " without a gate"
        raise Mismatch(
            Stage.DOWN,
            f"to the expert's output is added x, and the activation is"
            f" {names.get(sublayer, sublayer)}{gate}; T5_FF's is gelu by tanh with a gate",
        )
    if "gate_bias" in parts or down.bias is not None:
        raise Mismatch(Stage.DOWN, "the experts have biases; T5_FF has none")
    source = _source(first)
    algebra, d = reader.algebra, reader.sizes["d"]
    assert d is not None
    factors = list(factors_of(source))
    norms = [f for f in factors if f.op in ("gathered", "weight")]
    scale = [f for f in factors if f.op == "rsqrt"]
    if len(factors) != 3 or len(norms) != 1 or len(scale) != 1 or reader.x not in factors:
        raise Mismatch(
            Stage.DOWN,
            f"the experts read {short(source)}; T5_FF reads weight * x / sqrt(mean(x^2) + eps)",
        )
    square = algebra.sum("d", d, algebra.mul((reader.x, reader.x)))
    mean = algebra.mul((algebra.const(1 / d), square))
    terms = terms_of(scale[0].args[0])
    epsilon = sum(t.value for t in terms if t.op == "const")
    if [t for t in terms if t.op != "const"] != [mean]:
        raise Mismatch(
            Stage.DOWN, f"the experts' norm divides by the root of {short(scale[0].args[0])}"
        )
    if abs(epsilon - RMS_NORM_EPSILON) > 1e-3 * RMS_NORM_EPSILON:
        raise Mismatch(
            Stage.DOWN, f"the norm's epsilon is {epsilon:.3g}; T5_FF's is {RMS_NORM_EPSILON:g}"
        )
    weight = _weight(norms[0])
    if norms[0].op == "gathered" and norms[0].args[1] is not index:
        raise Mismatch(Stage.DOWN, "the norm's weights are chosen by another index")
    if not _is_bias(norms[0]):
        raise Mismatch(Stage.DOWN, "the norm's weight is no vector for each expert")
    parts = {
        "layer_norm_weight": Part(str(weight.params[0])),
        "wi_0_weight": parts["gate_weight"],
        "wi_1_weight": parts["up_weight"],
        "wo_weight": _parts("wo", down)["wo_weight"],
    }
    return ExpertMatch("T5_FF", _width(down, reader), parts, index)
