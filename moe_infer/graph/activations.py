"""Which activation an expression computes, found by its values.

Comparing values and not form takes every way of writing one. 1e-5 tells tanh's from erf's gelu
(4.7e-4 apart) and leaves room for constants rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from moe_infer.graph.expression import Expr

Function = Callable[[float, float], float | None]
"""Of gate and up; None where it is not defined."""


def evaluate(e: Expr, variables: Mapping[Expr, float]) -> float | None:
    """Value of an expression of some variables; None if it depends on anything else."""
    if e in variables:
        return variables[e]
    if e.op == "const":
        return e.value
    if not e.args or (e.op != "clip" and e.op not in _FUNCTIONS):
        return None
    values = [evaluate(a, variables) for a in e.args]
    found = [v for v in values if v is not None]
    if len(found) != len(values):
        return None
    if e.op == "clip":
        low, high = (float(p) for p in e.params)
        return min(max(found[0], low), high)
    try:
        return _FUNCTIONS[e.op](found)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {
    "mul": math.prod,
    "add": math.fsum,
    "recip": lambda v: 1 / v[0],
    "sqrt": lambda v: math.sqrt(v[0]),
    "rsqrt": lambda v: 1 / math.sqrt(v[0]),
    "sigmoid": lambda v: _sigmoid(v[0]),
    "tanh": lambda v: math.tanh(v[0]),
    "exp": lambda v: math.exp(v[0]) if v[0] < 700 else math.inf,
    "erf": lambda v: math.erf(v[0]),
    "relu": lambda v: max(v[0], 0.0),
    "gelu": lambda v: _gelu(v[0]),
    "gelu_tanh": lambda v: _gelu_tanh(v[0]),
}

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": lambda x: max(x, 0.0),
    "identity": lambda x: x,
}

_SAMPLES = (-1e4, -30.0, -6.0, -3.1, -1.7, -0.75, -0.2, 0.0, 0.3, 0.9, 1.6, 2.8, 5.5, 30.0, 1e4)
"""The far ones show a limit."""

_UPS = (-1e4, -2.5, 0.0, 0.7, 1.0, 1e4)


def activation_name(function: Callable[[float], float | None]) -> str | None:
    """Which activation a function of one number is."""
    values = [function(x) for x in _SAMPLES]
    for name, activation in ACTIVATIONS.items():
        if all(_near(v, activation(x)) for v, x in zip(values, _SAMPLES, strict=True)):
            return name
    return None


def gated_name(function: Function) -> str | None:
    """The activation of activation(gate) * up, if the function is such a product."""
    for name, activation in ACTIVATIONS.items():
        if all(_near(function(g, u), activation(g) * u) for g in _SAMPLES for u in _UPS):
            return name
    return None


class ClampedSwiGLU(NamedTuple):
    """Parameters of g * sigmoid(alpha * g) * (u + beta) with both clamped by the limit; 0: not."""

    alpha: float
    beta: float
    limit: float


_FAR = 1e6
"""Beyond every limit that clamps anything."""


def clamped_swiglu(function: Function) -> ClampedSwiGLU | None:
    """Parameters with which a function of gate and up is gpt-oss's activation."""
    at = 0.125  # inside every limit that leaves something of the function
    zero, small, far = function(at, 0.0), function(at, at), function(at, _FAR)
    if zero is None or small is None or far is None or small == zero:
        return None
    slope = (small - zero) / at  # g * sigmoid(alpha * g)
    beta, share = zero / slope, slope / at
    if not 0 < share < 1:
        return None
    alpha = math.log(share / (1 - share)) / at
    limit = far / slope - beta
    found = ClampedSwiGLU(
        *(float(np.float32(v)) for v in (alpha, beta, 0.0 if limit > _FAR / 2 else limit))
    )
    if found.limit < 0 or not all(map(math.isfinite, found)):
        return None
    ends = (found.limit * 0.99, found.limit * 1.01, found.limit + 9.0) if found.limit else (40.0,)
    samples = (*_SAMPLES, *ends, *(-e for e in ends))
    same = all(_near(function(g, u), _clamped(found, g, u)) for g in samples for u in samples)
    return found if same else None


def _clamped(p: ClampedSwiGLU, g: float, u: float) -> float:
    if p.limit:
        g, u = min(g, p.limit), min(max(u, -p.limit), p.limit)
    return g * _sigmoid(p.alpha * g) * (u + p.beta)


def _near(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= 1e-5 * max(1.0, abs(wanted))
