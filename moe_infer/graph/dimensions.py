"""Texts of symbolic dimensions: exporters write sums and products such as ``past + seq``.

A model is untrusted: only names, whole numbers and ``+ - * //`` are read, and nothing is evaluated
that is anything else.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)
_LONGEST = 1000
"""Characters of a text that is read as an expression."""


def names_in(symbol: str) -> list[str]:
    """The symbols that a dimension's text consists of, each once; a plain name gives itself."""
    tree = _parse(symbol)
    if tree is None:
        return [symbol]
    return list(dict.fromkeys(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)))


def evaluate(symbol: str, sizes: Mapping[str, int]) -> int:
    """A dimension's size.

    Args:
        symbol: a name or an expression; a name that looks like one is looked up whole first.
        sizes: of the names.

    Raises:
        KeyError: a name has no size.
        ValueError: the size would be negative, or a division by zero.
    """
    if symbol in sizes:
        return sizes[symbol]
    tree = _parse(symbol)
    if tree is None:
        raise KeyError(symbol)
    size = _value(tree, sizes)
    if size < 0:
        raise ValueError(f"dimension '{symbol}' is {size} with {dict(sizes)}; give other sizes")
    return size


def _parse(symbol: str) -> ast.expr | None:
    if len(symbol) > _LONGEST:
        return None
    try:
        tree = ast.parse(symbol, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        fine = (
            isinstance(node, (ast.Name, ast.Load, *_OPERATORS))
            or (isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS))
            or (isinstance(node, ast.Constant) and type(node.value) is int)
        )
        if not fine:
            return None
    return tree


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant):
        return int(tree.value)  # type: ignore[arg-type]
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    assert isinstance(tree, ast.BinOp)
    left, right = _value(tree.left, sizes), _value(tree.right, sizes)
    if isinstance(tree.op, ast.Add):
        return left + right
    if isinstance(tree.op, ast.Sub):
        return left - right
    if isinstance(tree.op, ast.Mult):
        return left * right
    if not right:
        raise ValueError(f"a dimension divides by zero with {dict(sizes)}; give other sizes")
    return left // right
