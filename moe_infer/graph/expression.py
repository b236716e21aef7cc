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

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Params = tuple[str | int | float, ...]

_CONSTANT = ("const", "vector")


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
    """True when it is computed from the router's scores and constants, not from hidden states."""

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
            depends = [a for a in args if a.op not in _CONSTANT]
            routed = op == "router_logits" or (bool(depends) and all(a.routed for a in depends))
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
            left = _without(body.atoms, atom) if atom in ("e", "g", "i") else body.atoms - {atom}
            return self.mul((*outer, self.make("sum", (body,), (atom,), left)))
        if size is None:
            return self.make("sum", (e,), (atom,))
        return self.mul((*outer, self.const(size)))

    def softmax(self, atom: str, e: Expr) -> Expr:
        """Softmax along an atom."""
        return self.make("softmax", (e,), (atom,))

    def clip(self, e: Expr, low: float, high: float) -> Expr:
        """``e`` between two numbers, which may be infinite."""
        if e.op == "clip":
            inner_low, inner_high = (float(p) for p in e.params)
            if max(low, inner_low) <= min(high, inner_high):
                return self.clip(e.args[0], max(low, inner_low), min(high, inner_high))
        unbounded = low == float("-inf") and high == float("inf")
        return e if unbounded else self.make("clip", (e,), (low, high))

    def largest(self, values: Iterable[Expr]) -> Expr:
        """The largest of several values."""
        return self.make("max", sorted(set(values), key=lambda e: e.serial))

    def where(self, condition: Expr, a: Expr, b: Expr) -> Expr:
        """``a`` where the condition holds, else ``b``."""
        if condition.op == "not":
            return self.where(condition.args[0], b, a)
        if condition.op == "const":
            return a if condition.value else b
        a, b = (self.const(float("-inf")) if _lowest(e) else e for e in (a, b))
        return self.make("where", (condition, a, b))

    def top_index(self, scores: Expr, k: int, axis: str = "e") -> Expr:
        """Where the ``k`` largest are along an axis: of experts, or ``g`` of groups, ``i`` in one.

        Best first, along the atom :func:`chosen_atom`.
        """
        while scores.op in ("softmax", "sigmoid"):
            scores = scores.args[0]
        atoms = _without(scores.atoms, axis) | ({chosen_atom(axis)} if k > 1 else set())
        return self.make("top_index", (scores,), (k,) if axis == "e" else (k, axis), atoms)

    def at(self, source: Expr, index: Expr) -> Expr:
        """Value of ``source`` at the chosen expert (or group, or place in a group)."""
        atoms = _without(source.atoms, index_axis(index)) | index.atoms
        return self.make("at", (source, index), (), atoms)

    def one_hot(self, index: Expr) -> Expr:
        """1 where the expert (or group, or place in a group) is the chosen one, else 0."""
        return self.make("one_hot", (index,), (), index.atoms | {index_axis(index)})

    def stack(self, choices: Iterable[Expr]) -> Expr:
        """Values, or indices, of several choices that were made one after the other."""
        choices = tuple(choices)
        atoms = frozenset({"k"}).union(*(c.atoms for c in choices))
        return self.make("stack", choices, (), atoms)

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


def is_index(e: Expr) -> bool:
    """True for the chosen experts of each token."""
    if e.op == "stack":
        return all(is_index(a) for a in e.args)
    return e.op == "top_index" and index_axis(e) == "e"


def index_axis(index: Expr) -> str:
    """The axis of which an index tells places: ``e``, ``g`` or ``i``."""
    return str(index.params[1]) if len(index.params) > 1 else "e"


def chosen_atom(axis: str) -> str:
    """The axis of the several largest along ``axis``."""
    return "k" if axis == "e" else f"k{axis}"


def _without(atoms: frozenset[str], axis: str) -> frozenset[str]:
    """Atoms when one place of an axis is taken; ``e`` is ``g`` and ``i`` together."""
    if axis == "e":
        return atoms - {"e", "g", "i"}
    other = "i" if axis == "g" else "g"
    return atoms - {"e", axis} | ({other} if "e" in atoms else set())


def _lowest(e: Expr) -> bool:
    """Minus infinity, or float32's smallest number, which authors write for it."""
    return e.op == "const" and e.value <= -3.4e38


def _constant_along(e: Expr, atom: str) -> bool:
    # A stored weight's own axes ("name#1") take another name where they meet an activation's, so
    # an expression that still has some may vary along any atom.
    if (atom == "e" and e.atoms & {"g", "i"}) or (atom in ("g", "i") and "e" in e.atoms):
        return False
    return atom not in e.atoms and not any("#" in a for a in e.atoms)
