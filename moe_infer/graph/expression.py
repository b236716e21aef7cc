"""Expressions in which layout does not exist: named axes ("atoms") instead of positions.

A MoE block is written in many ways that compute the same: reshapes, transposes, products in another
order, a division before or after a sum. :class:`Algebra` builds expressions in one normal form, so
that a pattern is compared once, and equal expressions are the same object.

Normal form: products and sums are flat, without neutral elements, and ordered; a division is a
product with a reciprocal; a sum over an atom has inside it only factors that depend on that atom;
routing weights stand outside linear maps; an index found by top-k does not depend on monotone
functions (softmax, sigmoid) of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Params = tuple[str | int | float, ...]


@dataclass(frozen=True, eq=False)
class Expr:
    """One expression; made by :class:`Algebra` only, compared by identity."""

    op: str
    args: tuple[Expr, ...]
    params: Params
    atoms: frozenset[str]
    """Axes along which it varies."""
    serial: int
    routed: bool
    """True when it is computed from the router's scores and not from the hidden states."""

    def __str__(self) -> str:
        inner = ", ".join([*map(str, self.params), *map(str, self.args)])
        return f"{self.op}({inner})" if inner else self.op

    @property
    def value(self) -> float:
        """Of a ``const``."""
        return float(self.params[0])


class Algebra:
    """Makes expressions in normal form."""

    def __init__(self) -> None:
        self._table: dict[tuple[str, tuple[int, ...], Params], Expr] = {}

    def make(
        self,
        op: str,
        args: Iterable[Expr] = (),
        params: Params = (),
        atoms: Iterable[str] | None = None,
    ) -> Expr:
        """The expression as it stands; ``atoms`` default to those of the arguments."""
        args = tuple(args)
        key = (op, tuple(a.serial for a in args), params)
        if key not in self._table:
            found = (
                frozenset().union(*(a.atoms for a in args)) if atoms is None else frozenset(atoms)
            )
            routed = op == "router_logits" or (bool(args) and all(a.routed for a in args))
            self._table[key] = Expr(op, args, params, found, len(self._table), routed)
        return self._table[key]

    def const(self, value: float) -> Expr:
        """A number."""
        return self.make("const", (), (float(value),))

    def mul(self, factors: Iterable[Expr]) -> Expr:
        """Product; a factor and its reciprocal cancel."""
        number, flat = 1.0, []
        for factor in factors:
            for part in factors_of(factor):
                if part.op == "const":
                    number *= part.value
                else:
                    flat.append(part)
        for part in [p for p in flat if p.op == "recip"]:
            if part.args[0] in flat:
                flat.remove(part)
                flat.remove(part.args[0])
        if number != 1.0 or not flat:
            flat.append(self.const(number))
        flat.sort(key=lambda e: e.serial)
        return flat[0] if len(flat) == 1 else self.make("mul", flat)

    def add(self, terms: Iterable[Expr]) -> Expr:
        """Sum."""
        number, flat = 0.0, []
        for term in terms:
            for part in term.args if term.op == "add" else (term,):
                if part.op == "const":
                    number += part.value
                else:
                    flat.append(part)
        if number != 0.0 or not flat:
            flat.append(self.const(number))
        flat.sort(key=lambda e: e.serial)
        return flat[0] if len(flat) == 1 else self.make("add", flat)

    def negative(self, e: Expr) -> Expr:
        """-e."""
        return self.mul((self.const(-1), e))

    def recip(self, e: Expr) -> Expr:
        """1 / e."""
        if e.op == "const" and e.value != 0:
            return self.const(1 / e.value)
        if e.op == "mul":
            return self.mul(self.recip(a) for a in e.args)
        if e.op == "recip":
            return e.args[0]
        return self.make("rsqrt", e.args) if e.op == "sqrt" else self.make("recip", (e,))

    def power(self, e: Expr, exponent: float) -> Expr | None:
        """Power e ** exponent for the exponents that patterns use."""
        if exponent in (2, 3):
            return self.mul([e] * int(exponent))
        forms: dict[float, Callable[[], Expr]] = {
            1: lambda: e,
            0.5: lambda: self.make("sqrt", (e,)),
            -0.5: lambda: self.make("rsqrt", (e,)),
            -1: lambda: self.recip(e),
        }
        return forms[exponent]() if exponent in forms else None

    def sum(self, atom: str, size: int | None, e: Expr) -> Expr:
        """Sum along an atom; None as size: not known."""
        inner: list[Expr] = []
        outer: list[Expr] = []
        for factor in factors_of(e):
            (outer if _constant_along(factor, atom) else inner).append(factor)
        if inner:
            body = self.mul(inner)
            return self.mul((*outer, self.make("sum", (body,), (atom,), body.atoms - {atom})))
        if size is None:
            return self.make("sum", (e,), (atom,))
        return self.mul((*outer, self.const(size)))

    def softmax(self, atom: str, e: Expr) -> Expr:
        """Softmax along an atom."""
        return self.make("softmax", (e,), (atom,))

    def top_index(self, scores: Expr, k: int) -> Expr:
        """Experts with the ``k`` largest scores, best first."""
        while scores.op in ("softmax", "sigmoid"):
            scores = scores.args[0]
        atoms = scores.atoms - {"e"} | ({"k"} if k > 1 else set())
        return self.make("top_index", (scores,), (k,), atoms)

    def at(self, source: Expr, index: Expr) -> Expr:
        """Value of ``source`` at the chosen expert."""
        return self.make("at", (source, index), (), source.atoms - {"e"} | index.atoms)

    def one_hot(self, index: Expr) -> Expr:
        """1 where the expert is the chosen one, else 0."""
        return self.make("one_hot", (index,), (), index.atoms | {"e"})

    def gathered(self, weight: Expr, index: Expr) -> Expr:
        """A stacked weight at the chosen expert."""
        return self.make("gathered", (weight, index), (), weight.atoms - {"e"} | index.atoms)

    def linear(self, weight: Expr, column_axis: int, contracted: str, out: str, x: Expr) -> Expr:
        """``x`` through the weight (``weight`` or ``gathered``), contracting atom ``contracted``.

        ``column_axis`` is the axis of the stored weight that is contracted: 2 for (E, out, in).
        """
        outer = [f for f in factors_of(x) if f.routed and _constant_along(f, contracted)]
        inner = self.mul(f for f in factors_of(x) if f not in outer)
        stored = frozenset(a for a in weight.atoms if "#" not in a)
        atoms = (inner.atoms - {contracted}) | stored | {out}
        return self.mul((*outer, self.make("linear", (weight, inner), (column_axis, out), atoms)))


def factors_of(e: Expr) -> tuple[Expr, ...]:
    """Factors of a product, or the expression itself."""
    return e.args if e.op == "mul" else (e,)


def terms_of(e: Expr) -> tuple[Expr, ...]:
    """Terms of a sum, or the expression itself."""
    return e.args if e.op == "add" else (e,)


def _constant_along(e: Expr, atom: str) -> bool:
    # A stored weight's own axes ("name#1") take another name where they meet an activation's, so
    # an expression that still has some may vary along any atom.
    return atom not in e.atoms and not any("#" in a for a in e.atoms)


def evaluate(e: Expr, variable: Expr, x: float) -> float | None:
    """Value of an expression of one variable at ``x``; None if it depends on anything else."""
    if e is variable:
        return x
    if e.op == "const":
        return e.value
    if e.op not in _FUNCTIONS or not e.args:
        return None
    values = [evaluate(a, variable, x) for a in e.args]
    if any(v is None for v in values):
        return None
    try:
        return _FUNCTIONS[e.op]([v for v in values if v is not None])
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


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
    "sigmoid": lambda v: 1 / (1 + math.exp(-v[0])),
    "tanh": lambda v: math.tanh(v[0]),
    "exp": lambda v: math.exp(v[0]),
    "erf": lambda v: math.erf(v[0]),
    "relu": lambda v: max(v[0], 0.0),
    "gelu": lambda v: _gelu(v[0]),
    "gelu_tanh": lambda v: _gelu_tanh(v[0]),
}

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": lambda x: max(x, 0.0),
    "identity": lambda x: x,
}

_SAMPLES = (-6.0, -3.1, -1.7, -0.75, -0.2, 0.0, 0.3, 0.9, 1.6, 2.8, 5.5)


def activation_name(e: Expr, variable: Expr) -> str | None:
    """Which activation an expression of one variable computes, found by its values.

    Comparing values and not form takes every way of writing one; 1e-5 tells tanh's from erf's gelu
    (4.7e-4 apart) and leaves room for constants rounded to float32.
    """
    values = [evaluate(e, variable, x) for x in _SAMPLES]
    if any(v is None for v in values):
        return None
    for name, function in ACTIVATIONS.items():
        wanted = [function(x) for x in _SAMPLES]
        if all(v is not None and abs(v - w) <= 1e-5 for v, w in zip(values, wanted, strict=True)):
            return name
    return None
