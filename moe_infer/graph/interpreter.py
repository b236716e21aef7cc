"""Reads a part of a graph as expressions without layout.

Every axis of a value is a tuple of atoms: ``("t", "k")`` is the flattened axis of (token, chosen
expert) pairs, ``()`` an axis of size 1. A reshape keeps the order of all atoms and only regroups
them, so that Reshape, Unsqueeze, Squeeze, Expand and Transpose leave the expression as it is, and
whatever mixes axes in another way is refused with its reason.

Atoms: the tokens (``t``, or ``b`` and ``s``), ``k`` chosen experts, ``e`` experts, which are ``g``
groups of ``i`` where the graph groups them, ``d`` hidden states, ``h{size}`` intermediate,
``{weight}#{axis}`` of a stored weight.

The parts, each on top of the one before it: :mod:`.reading.reader`, :mod:`.reading.layout`,
:mod:`.reading.constants`, :mod:`.reading.arithmetic`, :mod:`.reading.products`,
:mod:`.reading.choice`.
"""

from __future__ import annotations

from moe_infer.graph.reading.choice import ChoiceReader
from moe_infer.graph.reading.value import FLOATS, Axis, Opaque, Value

__all__ = ["FLOATS", "Axis", "Interpreter", "Opaque", "Value"]


class Interpreter(ChoiceReader):
    """Reads a graph from two named values on: hidden states and router logits."""
