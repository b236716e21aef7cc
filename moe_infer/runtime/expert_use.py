"""Which experts a run used.

The same on every provider: what the layers are routed by (router_logits, or hidden_states where a
layer has its own centroids) leaves the graph as additional outputs, and the reference chooses from
them. The reference computes in float64, so where two scores differ by less than a float32 rounding
its choice can be another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from moe_infer import reference
from moe_infer.graph.lower_nodes import LayerNode

TAP = "moe_infer/expert_use"
"""First part of the names of the additional outputs."""


@dataclass(frozen=True)
class ExpertUse:
    """How many tokens chose each expert of one layer.

    Attributes:
        layer: the node's name.
        tokens: (expert_count) int64.
    """

    layer: str
    tokens: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def used(self) -> int:
        """Number of experts that at least one token chose."""
        return int(np.count_nonzero(self.tokens))


class UseTotals:
    """What a session counted of one layer over its runs.

    Attributes:
        runs: that were counted.
        tokens: in these runs.
        uses: (expert_count) int64, runs in which at least one token chose the expert.
    """

    def __init__(self, layer: LayerNode) -> None:
        self._top_k = layer.config.top_k
        self._lock = threading.Lock()  # a session may be run by several threads
        self.runs = 0
        self.tokens = 0
        self.uses = np.zeros(layer.config.expert_count, np.int64)

    def add(self, use: ExpertUse) -> None:
        """Adds one run."""
        with self._lock:
            self.runs += 1
            self.tokens += int(use.tokens.sum()) // self._top_k
            self.uses += use.tokens > 0


def count_expert_use(
    model: Any | str | os.PathLike[str], feeds: Mapping[str, np.ndarray[Any, Any]]
) -> list[ExpertUse]:
    """Runs a model and counts the tokens of each expert.

    Args:
        model: a :class:`moe_infer.InferenceSession` made with ``expert_use=True``, or the path of a
            model, which is then run once on the CPU.
        feeds: inputs by name.

    Raises:
        ValueError: the session was made without ``expert_use=True``.
    """
    from moe_infer.runtime.session import InferenceSession

    session: Any = model
    if not isinstance(model, InferenceSession):
        session = InferenceSession(model, providers=["CPUExecutionProvider"], expert_use=True)
    session.run(None, feeds)
    found: list[ExpertUse] = session.expert_use
    return found


def add_taps(model: onnx.ModelProto, layers: Sequence[LayerNode]) -> list[str]:
    """Adds the values that the layers are routed by as float32 outputs; returns their names."""
    names = []
    for i, layer in enumerate(layers):
        name = f"{TAP}/{i}"
        source = layer.router_logits or layer.hidden_states
        last = layer.config.expert_count if layer.router_logits else layer.d_model
        shape = None if layer.shape is None else [*layer.shape[:-1], last]
        # float32, because numpy has no bfloat16.
        model.graph.node.append(
            helper.make_node("Cast", [source], [name], name, to=TensorProto.FLOAT)
        )
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        names.append(name)
    return names


def count(layer: LayerNode, tapped: np.ndarray[Any, Any]) -> ExpertUse:
    """Counts from the value of a layer's additional output."""
    experts = choices(layer, tapped)
    tokens = np.bincount(experts.reshape(-1), minlength=layer.config.expert_count)
    return ExpertUse(layer.name, tokens.astype(np.int64))


def choices(layer: LayerNode, tapped: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Experts of each token, (tokens, top_k), from the value of a layer's additional output."""
    logits = tapped if layer.router_logits else None
    hidden = tapped
    if logits is not None:
        # Only its shape is looked at.
        hidden = np.broadcast_to(np.float32(0), (*tapped.shape[:-1], max(layer.d_model, 1)))
    experts, _ = reference.route(hidden, layer.config, logits)
    return experts.reshape(-1, layer.config.top_k)
