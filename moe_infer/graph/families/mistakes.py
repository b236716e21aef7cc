"""MoE blocks that are wrong before any exporter sees them: recognised only to be explained.

Both are NLLB-MoE. Transformers 4 multiplies the hidden states by a boolean mask (Einsum), which
ONNX does not have, so no runtime loads the graph. Transformers 5 gives its experts the mask of the
chosen ones where their numbers are expected: the one-hot mask is encoded as one-hot once more, its
zeros and ones are taken for experts 0 and 1, and no other expert is ever computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from moe_infer.graph.match import GraphView, Match, NearMiss, describe
from moe_infer.graph.mismatch import Stage

NAME = "mistakes"

_MASKED = ("Cast", "Identity", "Mul", "Reshape", "Unsqueeze", "Squeeze")
_MOST_STEPS = 16
_INSERT = (
    "put MoELayer in before the export with moe_infer.torch.replace_moe and an adapter for the"
    " model's MoE module"
)


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every mistake, in the order of the graph."""
    for node in view.nodes:
        reason = ""
        if node.op_type == "OneHot" and _is_mask(view, node):
            reason = (
                "the mask of the chosen experts is used as if it were their numbers, so only"
                f" experts 0 and 1 are ever computed (NLLB-MoE of transformers 5); {_INSERT}"
            )
        elif node.op_type == "Einsum" and _reads_booleans(view, node):
            reason = (
                "an Einsum reads a boolean mask, which ONNX does not allow: no runtime loads this"
                f" graph (NLLB-MoE of transformers 4); {_INSERT}"
            )
        if reason:
            yield NearMiss(NAME, describe(node), Stage.ROUTED, describe(node), reason, True)


def _is_mask(view: GraphView, node: NodeProto) -> bool:
    """Whether the numbers of a OneHot are themselves the result of one."""
    names = [str(node.input[0])]
    for _ in range(_MOST_STEPS):
        if not names:
            return False
        made = view.producer(names.pop())
        if made is not None and made.op_type == "OneHot":
            depth = view.ints(node.input[1])
            return depth is not None and depth == view.ints(made.input[1])
        if made is not None and made.op_type in _MASKED:
            names += [i for i in made.input if i and i not in view.constants]
    return False


def _reads_booleans(view: GraphView, node: NodeProto) -> bool:
    return any(view.types.element_type(i) == TensorProto.BOOL for i in node.input)
