"""Reads the nodes that follow from a layer's input and its router's logits, in their order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from onnx import NodeProto

from moe_infer.graph.expression import Algebra, Expr
from moe_infer.graph.match import GraphView, attribute, describe
from moe_infer.graph.reading.value import Axis, Opaque, Value
from moe_infer.graph.shape_values import ShapeValues

_NOT_READ = ("Shape", "Size")
"""They are evaluated where a shape is needed."""
_DEMANDED = (
    "Cast",
    "Transpose",
    "Identity",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Flatten",
    "Expand",
    "Tile",
    "Range",
    "Constant",
)


class Reader:
    """Reads a graph from two named values on: hidden states and router logits."""

    DEMANDED: tuple[str, ...] = _DEMANDED
    """Operators read also when only constants or shapes feed them."""
    MOST_NODES = 4000
    """Nodes read from one starting point; a MoE block on stacked weights has a few dozen."""

    def __init__(self, view: GraphView, hidden_states: str, logits: str) -> None:
        """Starts at two tensors of rank 2 or 3; logits of rank 2 may go with hidden states of 3.

        Raises:
            Opaque: their shapes are not known well enough.
        """
        self.view, self.algebra = view, Algebra()
        self.env: dict[str, Value] = {}
        self.opaque: dict[int, str] = {}
        self.top_nodes: dict[Expr, NodeProto] = {}
        self.stacks: dict[str, tuple[str, ...]] = {}
        """Names given to weights that lie apart in the graph, one constant for each expert."""
        self.shapes = ShapeValues(view, self.dims)
        shape, scores = view.types.shape(hidden_states), view.types.shape(logits)
        if (
            shape is None
            or scores is None
            or (len(shape), len(scores)) not in ((2, 2), (3, 2), (3, 3))
        ):
            raise Opaque(f"'{hidden_states}' and '{logits}' have no common rank of 2 or 3")
        d, e = shape[-1], scores[-1]
        if not isinstance(d, int) or not isinstance(e, int) or e < 2 or d < 2:
            raise Opaque(f"the last dimensions of '{hidden_states}' and '{logits}' are not known")
        self.tokens: Axis = ("t",) if len(shape) == 2 else ("b", "s")
        self.sizes: dict[str, int | None] = {"d": d, "e": e, "k": None}
        for atom, size in zip(self.tokens, shape, strict=False):
            self.sizes[atom] = size if isinstance(size, int) else None
        flat = len(scores) == 2
        apart = tuple((a,) for a in self.tokens)
        leading: tuple[Axis, ...] = (self.tokens,) if flat else apart
        self.x = self.algebra.make("hidden_states", (), (), (*self.tokens, "d"))
        self.logits = self.algebra.make("router_logits", (), (), (*self.tokens, "e"))
        self.env[hidden_states] = Value((*apart, ("d",)), self.x)
        self.env[logits] = Value((*leading, ("e",)), self.logits)
        self.output_axes = (*leading, ("d",))
        self.apart_axes = (*apart, ("d",))
        """The same with each axis of the tokens for itself, as the input may lie."""

    def expect(self, anchor: NodeProto) -> None:
        """Tells how many experts a TopK chooses, before nodes that stand in front of it are read.

        Tokens may be repeated before the experts are chosen, and with one group of experts the best
        two of it are looked for, which chooses nothing.
        """
        dims = self.view.types.shape(anchor.input[0])
        if anchor.op_type != "TopK" or len(anchor.input) < 2 or not dims:
            return
        count, axis = self._ints(anchor.input[1]), attribute(anchor, "axis", -1)
        largest = attribute(anchor, "largest", 1) and -len(dims) <= axis < len(dims)
        if count and count[0] > 1 and largest and dims[axis] == self.sizes["e"]:
            self.sizes["k"] = count[0]

    def run(self) -> None:
        """Reads every node that follows from the two values, in the graph's order."""
        heap = sorted({i for name in self.env for i in self.view.users.get(name, ())})
        seen = set(heap)
        for _ in range(self.MOST_NODES):
            if not heap:
                return
            index = heapq.heappop(heap)
            for output in self._read(index):
                for user in self.view.users.get(output, ()):
                    if user not in seen:
                        seen.add(user)
                        heapq.heappush(heap, user)

    def value(self, name: str) -> Value | None:
        """What a tensor is, if it can be read: from the start, a constant, or a token index."""
        if name in self.env:
            return self.env[name]
        constant = self._constant(name)
        if constant is not None:
            self.env[name] = constant
            return constant
        index = self.view.position.get(name)
        if index is None or self.view.nodes[index].op_type not in self.DEMANDED:
            return None
        if index not in self.opaque:
            self._read(index)
        return self.env.get(name)

    def _read(self, index: int) -> list[str]:
        node = self.view.nodes[index]
        reader: Callable[[NodeProto], list[Value]] | None = None
        if node.domain in ("", "ai.onnx"):
            reader = getattr(self, f"_read_{node.op_type.lower()}", None)
        outputs = [o for o in node.output if o]
        if reader is None and node.op_type in _NOT_READ:
            return []
        if all(o in self.env for o in outputs):
            return outputs
        try:
            if reader is None:
                raise Opaque(f"{node.op_type} is no part of a MoE block that is known")
            values = reader(node)
            for value in values:
                if len(set(value.atoms)) != len(value.atoms):
                    raise Opaque("the same axis appears twice in the result")
        except Opaque as reason:
            self.opaque[index] = str(reason)
            return []
        except (IndexError, KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            # Too few inputs, an axis that there is not: nothing has checked the model before.
            self.opaque[index] = f"the node is malformed ({type(error).__name__}: {error})"
            return []
        self.env.update(zip(node.output, values, strict=False))
        return outputs

    def _input(self, node: NodeProto, position: int) -> Value:
        name = node.input[position] if position < len(node.input) else ""
        value = self.value(name) if name else None
        if value is None:
            if name in self.view.graph_inputs:
                raise Opaque(f"its input '{name}' is an input of the graph, not a constant")
            raise Opaque(f"its input '{name}' does not come from the layer's input or a constant")
        return value

    def _constant(self, name: str) -> Value | None:
        """What a constant is, if it can be one of a MoE block; see :mod:`.constants`."""
        return None

    def dims(self, name: str) -> tuple[int | str | None, ...] | None:
        """Dimensions of a tensor, from the graph's types or, where these end, from its axes."""
        stated = self.view.types.shape(name)
        value = self.env.get(name)
        if value is None:
            return stated
        sizes = tuple(map(self._size, value.axes))
        if stated is None or len(stated) != len(sizes):
            return sizes
        return tuple(n if n is not None else s for s, n in zip(stated, sizes, strict=True))

    def _size(self, axis: Axis) -> int | None:
        total = 1
        for atom in axis:
            size = self.sizes.get(atom)
            if size is None:
                return None
            total *= size
        return total

    def _ints(self, name: str) -> list[int] | None:
        """Values of a small integer tensor, constant or computed from known dimensions."""
        found = self.shapes.ints(name)
        if found is None or any(v is None for v in found):
            return None
        return [v for v in found if v is not None]

    @property
    def recognised(self) -> bool:
        """Whether what makes the family was there; otherwise it has nothing to say."""
        return True

    def unfinished(self, expr: Expr) -> bool:
        """Whether a value is known to be a step on the way to a layer's output."""
        return False

    def wrong_export(self) -> tuple[str, str] | None:
        """Whether the exporter left a part of the layer out: the node that shows it, and how."""
        return None

    def outside(self, expr: Expr) -> tuple[Expr, dict[str, Any]]:
        """A layer's output without what stays outside the layer, and what that is.

        Returns:
            the rest, and fields of :class:`moe_infer.graph.match.Match`.
        """
        return expr, {}

    def describe_opaque(self, index: int) -> tuple[str, str]:
        """A node that was not read: its description and the reason."""
        return describe(self.view.nodes[index]), self.opaque[index]
