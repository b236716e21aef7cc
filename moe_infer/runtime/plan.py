"""Which provider of ONNX Runtime runs which nodes of a model, as the session itself tells."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort

from moe_infer.graph.lower_nodes import load_model
from moe_infer.op import OP_TYPE
from moe_infer.runtime.providers import Providers
from moe_infer.runtime.session import InferenceSession

_RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class ProviderPart:
    """What one provider runs.

    Attributes:
        provider: its name.
        parts: pieces of the graph; one engine each on TensorRT, single nodes elsewhere.
        operators: number of nodes by operator; another domain than ONNX's stands before its name.
        nodes: their names, in the session's order.
    """

    provider: str
    parts: int
    operators: Counter[str] = field(default_factory=Counter)
    nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """Where a model's nodes go.

    Attributes:
        parts: one for each provider that runs something, in the session's order.
        layers: for each MoELayer the providers of its node, or of what it was lowered to.
        lowered: whether the layers were replaced by standard operators.
        graph_nodes: nodes of the model's main graph; constant folding and fusion make the session's
            fewer, lowering more.
    """

    parts: list[ProviderPart]
    layers: dict[str, list[str]]
    lowered: bool
    graph_nodes: int

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "lowered": self.lowered,
            "graph_nodes": self.graph_nodes,
            "layers": self.layers,
            "providers": [
                {
                    "provider": part.provider,
                    "parts": part.parts,
                    "operators": dict(part.operators.most_common()),
                    "nodes": part.nodes,
                }
                for part in self.parts
            ],
        }


def plan(
    model: str | os.PathLike[str],
    providers: Providers | None = None,
    **options: Any,
) -> Plan:
    """Makes a session and asks it which provider got which nodes.

    On TensorRT the engines of static shapes are built on the way.

    Args:
        model: path of a model.
        providers: as for :class:`moe_infer.InferenceSession`.
        options: further arguments of it, such as ``dims``.

    Raises:
        ValueError: this ONNX Runtime does not tell.
    """
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        raise ValueError(
            f"ONNX Runtime {ort.__version__} does not tell which provider runs a node; 1.32 does"
        )
    session_options = ort.SessionOptions()
    # Errors alone: taking an entry back that the session set is worth a warning to ONNX Runtime.
    session_options.log_severity_level = 3
    session_options.add_session_config_entry(_RECORD, "1")
    session = InferenceSession(model, session_options, providers=providers, **options)
    found: dict[str, ProviderPart] = {}
    of_layer: dict[str, dict[str, None]] = {layer.name: {} for layer in session.moe_layers}
    for subgraph in session.get_provider_graph_assignment_info():
        name = str(subgraph.ep_name)
        part = found.get(name) or ProviderPart(name, 0)
        for node in subgraph.get_nodes():
            domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
            part.operators[f"{domain}{node.op_type}"] += 1
            part.nodes.append(str(node.name))
            layer = _layer_of(str(node.name), of_layer)
            if layer is not None and (session.lowered or node.op_type == OP_TYPE):
                of_layer[layer][name] = None
        found[name] = ProviderPart(name, part.parts + 1, part.operators, part.nodes)
    graph_nodes = len(load_model(model)[0].graph.node)
    layers = {layer: list(names) for layer, names in of_layer.items()}
    order = session.get_providers()
    parts = sorted(found.values(), key=lambda p: order.index(p.provider))
    return Plan(parts, layers, session.lowered, graph_nodes)


def _layer_of(node: str, layers: dict[str, dict[str, None]]) -> str | None:
    """A lowered layer's nodes are named NAME/..., and without names NAME is the output's."""
    if node in layers:
        return node
    name, slash, _ = node.partition("/")
    if slash and name in layers:
        return name
    return next((layer for layer in layers if node.startswith(f"{layer}/")), None)
