"""Whether the tensors around a layer have the types and shapes that the operator takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx import TensorProto

from moe_infer.graph.match import GraphView
from moe_infer.graph.shapes import Dim, ValueTypes, element_type_name
from moe_infer.op import LayerConfig

TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
"""Of a layer's input and output."""


class ReplaceError(ValueError):
    """The part of the graph cannot be replaced; nothing was changed."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node, self.reason = node, reason


def check_types(
    view: GraphView,
    hidden_states: str,
    output: str,
    router_logits: str | None,
    config: LayerConfig,
    like: str = "",
) -> None:
    """Checks that the tensors have the types and shapes that the operator takes.

    Args:
        view: the graph.
        hidden_states: see :func:`replace_with_moe_layer`, as the others.
        output: of the layer.
        router_logits: or None.
        config: of the node.
        like: whose shape the output has.

    Raises:
        ReplaceError: names the tensor, what it is and what is needed.
        ValueError: the configuration does not fit the inputs.
    """
    types = view.types
    shape, result = types.shape(hidden_states), types.shape(output)
    if shape is None or len(shape) not in (2, 3) or not isinstance(shape[-1], int):
        raise ReplaceError(
            f"'{hidden_states}'",
            f"its shape is {_shape(shape)}; needed is (batch, seq, d_model) or (tokens, d_model)"
            " with a fixed d_model",
        )
    if types.element_type(hidden_states) not in TYPES:
        kind = element_type_name(types.element_type(hidden_states))
        raise ReplaceError(f"'{hidden_states}'", f"its type is {kind}; needed is {_type_names()}")
    due = types.shape(like) if like else shape
    if result is not None and (due is None or not may_equal(due, result)):
        raise ReplaceError(
            f"'{output}'", f"its shape is {_shape(result)}, that of the input {_shape(due)}"
        )
    config.check_inputs(shape[-1], router_logits is not None)
    if router_logits is None:
        return
    scores = types.shape(router_logits)
    if scores is None or not may_equal((*shape[:-1], config.expert_count), scores):
        wanted = _shape((*shape[:-1], config.expert_count))
        raise ReplaceError(
            f"'{router_logits}'", f"its shape is {_shape(scores)}; needed is {wanted}"
        )
    given = types.element_type(router_logits)
    if given not in (TensorProto.FLOAT, types.element_type(hidden_states)):
        raise ReplaceError(
            f"'{router_logits}'",
            f"its type is {element_type_name(given)}; needed is float32 or the input's",
        )


def check_next_logits(
    types: ValueTypes, hidden_states: str, guess: str, experts: int | None
) -> None:
    """Checks input 2, ``next_router_logits``, as far as types and shapes are known.

    Args:
        types: of the graph's values.
        hidden_states: input 0.
        guess: input 2.
        experts: of the MoELayer that comes next; None: there is none.

    Raises:
        ValueError: names the tensor, what it is and what is needed.
    """
    what = f"MoELayer: next_router_logits '{guess}'"
    kind, given = types.element_type(hidden_states), types.element_type(guess)
    if kind and given not in (0, kind, TensorProto.FLOAT):
        raise ValueError(
            f"{what} is {element_type_name(given)}; expected {element_type_name(kind)}, as"
            " hidden_states is, or FLOAT"
        )
    shape, scores = types.shape(hidden_states), types.shape(guess)
    if scores is None:
        return
    if not scores:
        raise ValueError(f"{what} is a scalar; expected (tokens..., experts of the next MoELayer)")
    if experts is not None and not may_equal(scores[-1:], (experts,)):
        raise ValueError(
            f"{what} has {scores[-1]} as its last dimension; expected {experts}, the expert_count"
            " of the next MoELayer"
        )
    if shape is not None and not _may_be_as_many(shape[:-1], scores[:-1]):
        raise ValueError(
            f"{what} has shape {_shape(scores)}; expected a row for each token of hidden_states"
            f" {_shape(shape)}"
        )


def _may_be_as_many(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether there can be as many tokens in the one as in the other."""
    known = [[d for d in dims if isinstance(d, int)] for dims in (a, b)]
    if len(known[0]) == len(a) and len(known[1]) == len(b):
        return math.prod(known[0]) == math.prod(known[1])
    return len(a) != len(b) or may_equal(a, b)


def may_equal(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes can be the same."""
    return len(a) == len(b) and all(
        not (isinstance(x, int) and isinstance(y, int)) or x == y for x, y in zip(a, b, strict=True)
    )


def _shape(shape: Sequence[Dim] | None) -> str:
    return "not known" if shape is None else "(" + ", ".join(str(d or "?") for d in shape) + ")"


def _type_names() -> str:
    return "float32, float16 or bfloat16"
