"""What a family of patterns works on and what it gives back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from moe_infer.graph.external import is_external
from moe_infer.graph.shapes import ValueTypes
from moe_infer.op import SUBLAYERS, ExpertTensor

SMALL_CONSTANT = 4096
"""Most elements of a constant whose values a pattern may look at."""


@dataclass(frozen=True)
class Part:
    """Where the rows of one part of an expert tensor come from.

    Expert ``e``'s part is ``constant[e]``, transposed if ``transpose``, then of it the rows from
    ``start`` by ``step``, as many as the part has.
    """

    constant: str
    """Name of an initializer or of a Constant node's output, with the experts on axis 0; or a name
    in :attr:`Match.stacks`."""
    transpose: bool = False
    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class Match:
    """A MoE block: what MoELayer needs to take its place."""

    family: str
    hidden_states: str
    router_logits: str
    output: str
    expert_count: int
    d_model: int
    hidden_size: int
    sublayer: str
    router: str
    top_k: int
    normalize: bool
    parts: dict[str, Part] = field(hash=False)
    """Keyed by the part's name in :data:`moe_infer.op.SUBLAYERS`; of all biases or of none."""
    anchor: str
    """The node with which the search began, for reports."""
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """For weights that lie apart in the graph: names of the experts' constants, by the name that
    the parts use for all of them."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Attributes of the operator that only some routers and sub-layers have."""
    router_bias: str = ""
    """Name of the constant (expert_count) that is added to the scores for choosing."""

    like: str = ""
    """A value (batch, seq, d_model) whose shape the layer's output (tokens, d_model) takes in the
    graph; empty: that of the hidden states."""
    kept: str = ""
    """A mask (..., expert_count) of 0 and 1, at most one 1 a token, whose sum over the experts
    multiplies the layer's output: tokens beyond an expert's capacity have none."""

    @property
    def expert_bias(self) -> bool:
        """Whether the experts have biases: it shows in the parts."""
        biases = SUBLAYERS[self.sublayer].biases
        return any(part in self.parts for tensor in biases for part in tensor.parts)

    @property
    def tensors(self) -> tuple[ExpertTensor, ...]:
        """The tensors of an expert, as ``LayerConfig.tensors`` has them."""
        sublayer = SUBLAYERS[self.sublayer]
        return sublayer.tensors + (sublayer.biases if self.expert_bias else ())

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the experts' weights in the graph, each once."""
        names = dict.fromkeys(p.constant for p in self.parts.values())
        return tuple(dict.fromkeys(n for s in names for n in self.stacks.get(s, (s,))))


@dataclass(frozen=True)
class NearMiss:
    """Part of a MoE block: how far the pattern went and why it ended."""

    family: str
    anchor: str
    stage: int
    """Larger is nearer to a match; see the family."""
    node: str
    """Where it stopped: the node's name, or its type and first output."""
    reason: str
    wrong_export: bool = False
    """True when the block does not compute what the model does; the reason says why and gives the
    remedy."""

    def __str__(self) -> str:
        return f"{self.anchor}: stopped at {self.node}: {self.reason}"


def describe(node: NodeProto) -> str:
    """A node's name for messages; nodes need not have one."""
    output = node.output[0] if node.output else "nothing"
    return (
        f"'{node.name}' ({node.op_type} -> {output})"
        if node.name
        else f"{node.op_type} -> {output}"
    )


class GraphView:
    """A model's main graph with the look-ups that patterns need. Reads no external data."""

    def __init__(self, model: onnx.ModelProto, types: ValueTypes, base_dir: Path) -> None:
        self.model = model
        self.graph = model.graph
        self.types = types
        self.base_dir = base_dir
        self.nodes: Sequence[NodeProto] = list(model.graph.node)
        self.opset = max(
            (o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0
        )

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of the node that makes a value."""
        return {o: i for i, n in enumerate(self.nodes) for o in n.output if o}

    @cached_property
    def users(self) -> dict[str, list[int]]:
        """Indices of the nodes that read a value, also from inside their subgraphs."""
        users: dict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(values_read(node)):
                users[name].append(i)
        return users

    @cached_property
    def graph_inputs(self) -> set[str]:
        """Names of the graph's inputs, initializers listed among them included."""
        return {i.name for i in self.graph.input}

    @cached_property
    def graph_outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return {o.name for o in self.graph.output}

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers that are no graph inputs, and Constant nodes' values."""
        found = {t.name: t for t in self.graph.initializer if t.name not in self.graph_inputs}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                found[node.output[0]] = node.attribute[0].t
        return found

    def producer(self, name: str) -> NodeProto | None:
        """The node that makes a value; None for inputs and initializers."""
        index = self.position.get(name)
        return None if index is None else self.nodes[index]

    def small(self, name: str) -> NDArray[np.generic] | None:
        """Values of a small constant, None for anything else."""
        tensor = self.constants.get(name)
        if tensor is None:
            return self._attribute_constant(name)
        if is_external(tensor) or np.prod(tensor.dims, dtype=np.int64) > SMALL_CONSTANT:
            return None
        try:
            values: NDArray[np.generic] = numpy_helper.to_array(tensor)
        except (ValueError, TypeError):  # its bytes do not fit its shape, or the type is exotic
            return None
        return values

    def _attribute_constant(self, name: str) -> NDArray[np.generic] | None:
        node = self.producer(name)
        if node is None or node.op_type != "Constant" or not node.attribute:
            return None
        value = onnx.helper.get_attribute_value(node.attribute[0])
        if node.attribute[0].name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if node.attribute[0].name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
        return None

    def ints(self, name: str) -> list[int] | None:
        """A small integer constant as a flat list."""
        values = self.small(name)
        if values is None or values.dtype.kind not in "iu":
            return None
        return [int(v) for v in values.ravel()]


def values_read(node: NodeProto) -> Iterator[str]:
    """Values that a node reads: its inputs, and what its subgraphs read from outside."""
    yield from (i for i in node.input if i)
    for attribute in node.attribute:
        subgraphs = [attribute.g] if attribute.HasField("g") else []
        for graph in (*subgraphs, *attribute.graphs):
            made = {i.name for i in graph.input} | {t.name for t in graph.initializer}
            for inner in graph.node:
                yield from (v for v in values_read(inner) if v not in made)
                made |= set(inner.output)
            yield from (o.name for o in graph.output if o.name not in made)


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute or its default."""
    for a in node.attribute:
        if a.name == name:
            return int(a.i)
    return default


def text_attribute(node: NodeProto, name: str, default: str) -> str:
    """A string attribute or its default."""
    for a in node.attribute:
        if a.name == name:
            return str(a.s.decode(errors="replace"))
    return default
