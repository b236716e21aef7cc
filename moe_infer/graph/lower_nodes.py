"""The MoELayer nodes of a model, each checked against its attributes, inputs and weight file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx
import onnx.inliner
from onnx import TensorProto

from moe_infer.graph.external import model_dir
from moe_infer.graph.layer_checks import check_next_logits
from moe_infer.graph.shapes import Dim, ValueTypes, element_type_name, infer_types
from moe_infer.op import DOMAIN, DTYPES, OP_TYPE, LayerConfig, output_shape
from moe_infer.weights import ExpertWeights, open_expert_weights

ModelLike = onnx.ModelProto | bytes | str | os.PathLike[str]

_FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_EXPECTED = "expected the .onnx file of an exporter, and all of it"
_E = TypeVar("_E", bound=Exception)


@dataclass(frozen=True)
class LayerNode:
    """One MoELayer node whose attributes, inputs and weight file fit each other.

    Attributes:
        index: position in ``model.graph.node``.
        name: the node's name, or its output's where it has none.
        config: its attributes.
        weights: its experts; only the index of the file has been read.
        d_model: last dimension of hidden_states; 0 where nothing tells it (``Identity`` only).
        dtype: type of hidden_states and of the output.
        logits_dtype: type of router_logits; None where there are none or the graph does not say.
        shape: of hidden_states: numbers, symbols or None; None: not even the rank is known.
    """

    index: int
    name: str
    node: onnx.NodeProto
    config: LayerConfig
    weights: ExpertWeights
    d_model: int
    dtype: str
    logits_dtype: str | None
    shape: tuple[Dim, ...] | None

    @property
    def hidden_states(self) -> str:
        """Name of input 0."""
        return str(self.node.input[0])

    @property
    def router_logits(self) -> str | None:
        """Name of input 1, None where the layer scores by its centroids."""
        return str(self.node.input[1]) if _has_input(self.node, 1) else None

    @property
    def next_router_logits(self) -> str | None:
        """Name of input 2, None where the experts of the next layer are not guessed."""
        return str(self.node.input[2]) if _has_input(self.node, 2) else None


def load_model(
    model: ModelLike, base_dir: str | os.PathLike[str] | None = None
) -> tuple[onnx.ModelProto, Path | None]:
    """The model without its external data, and the folder in which these and the experts lie.

    Args:
        model: a path, the bytes of a model, or a model (which is copied).
        base_dir: the folder; the model's own if it is given by its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ONNX model.
    """
    folder = None if base_dir is None else Path(base_dir).resolve()
    if isinstance(model, onnx.ModelProto):
        loaded = onnx.ModelProto()
        loaded.CopyFrom(model)
        return loaded, folder
    if isinstance(model, bytes):
        return _parse(model, "the given bytes"), folder
    path = Path(model)
    if path.is_dir():
        models = ", ".join(sorted(p.name for p in path.glob("*.onnx"))[:4])
        there = f"give a model in it: {models}" if models else "there is no .onnx file in it"
        raise FileNotFoundError(f"model file '{path}' is a folder; {there}")
    if not path.is_file():
        raise FileNotFoundError(f"model file '{path}' not found (working directory {os.getcwd()})")
    return _parse(path.read_bytes(), f"'{path}'"), folder or model_dir(path)


def read_layers(model: onnx.ModelProto, base_dir: Path | None) -> list[LayerNode]:
    """All MoELayer nodes, in the graph's order, each checked.

    Args:
        model: its functions must hold no MoELayer (see :func:`inline_functions`).
        base_dir: where relative weight paths are looked for first.

    Raises:
        ValueError, WeightFileError, FileNotFoundError: a layer is not right; the message begins
            with the node's name.
    """
    if not any(is_layer(node) for node in all_nodes(model.graph)):
        return []
    types = infer_types(model)
    layers = []
    for index, node in enumerate(model.graph.node):
        if is_layer(node):
            name = layer_name(node)
            try:
                layers.append(_read(index, name, node, types, base_dir))
            except (ValueError, FileNotFoundError) as error:
                raise _named(error, name) from error
        for attribute in node.attribute:
            for subgraph in (
                *attribute.graphs,
                *([attribute.g] if attribute.HasField("g") else []),
            ):
                if any(is_layer(inner) for inner in all_nodes(subgraph)):
                    raise ValueError(
                        f"node '{node.name}' ({node.op_type}) holds a MoELayer in a subgraph;"
                        " MoELayer must be in the main graph"
                    )
    _check_guesses(layers, types)
    return layers


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions inlined if one of them holds a MoELayer."""
    held = any(is_layer(node) for function in model.functions for node in function.node)
    return onnx.inliner.inline_local_functions(model) if held else model


def _parse(data: bytes, what: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's implementations raise different types
        raise ValueError(f"{what} is no ONNX model: {error}; {_EXPECTED}") from error
    if not model.HasField("graph"):
        raise ValueError(f"{what} is no ONNX model: it has no graph; {_EXPECTED}")
    return model


def _read(
    index: int, name: str, node: onnx.NodeProto, types: ValueTypes, base_dir: Path | None
) -> LayerNode:
    config = layer_config(node)
    if not 1 <= len(node.input) <= 3 or not node.input[0] or len(node.output) != 1:
        raise ValueError(
            "MoELayer: expected the inputs hidden_states and, optional, router_logits and"
            f" next_router_logits and one output, got {len(node.input)} inputs and"
            f" {len(node.output)} outputs"
        )
    has_logits = _has_input(node, 1)
    if _has_input(node, 2) and not has_logits:
        raise ValueError(
            f"MoELayer: input 2 (next_router_logits) '{node.input[2]}' needs input 1"
            " (router_logits); give both or neither"
        )
    shape = types.shape(node.input[0]) or types.shape(node.output[0])
    if shape is not None:
        output_shape(shape)
    stated = shape[-1] if shape is not None and isinstance(shape[-1], int) else None
    weights = open_expert_weights(config, stated, base_dir)
    d_model = stated or weights.d_model
    if d_model:
        config.check_inputs(d_model, has_logits)
    logits_type = types.element_type(node.input[1]) if has_logits else 0
    dtype = _dtype(node, types)
    if logits_type and _FLOATS.get(logits_type) not in (dtype, "float32"):
        raise ValueError(
            f"MoELayer: router_logits '{node.input[1]}' is {element_type_name(logits_type)};"
            f" expected {dtype}, as hidden_states is, or float32"
        )
    _check_logits_shape(node, config, types)
    return LayerNode(
        index, name, node, config, weights, d_model, dtype, _FLOATS.get(logits_type), shape
    )


def _dtype(node: onnx.NodeProto, types: ValueTypes) -> str:
    element = types.element_type(node.input[0]) or types.element_type(node.output[0])
    if element not in _FLOATS:
        found = element_type_name(element)
        remedy = "" if element else "; add a value_info for the node's input or output"
        raise ValueError(
            f"MoELayer: hidden_states '{node.input[0]}' has type {found}; expected one of"
            f" {', '.join(DTYPES)}{remedy}"
        )
    return _FLOATS[element]


def _check_logits_shape(node: onnx.NodeProto, config: LayerConfig, types: ValueTypes) -> None:
    shape = types.shape(node.input[1]) if _has_input(node, 1) else None
    if shape and isinstance(shape[-1], int) and shape[-1] != config.expert_count:
        raise ValueError(
            f"MoELayer: router_logits '{node.input[1]}' has {shape[-1]} as its last dimension;"
            f" expected expert_count = {config.expert_count}"
        )


def _check_guesses(layers: list[LayerNode], types: ValueTypes) -> None:
    for i, layer in enumerate(layers):
        guess = layer.next_router_logits
        if guess is not None:
            following = layers[i + 1].config.expert_count if i + 1 < len(layers) else None
            try:
                check_next_logits(types, layer.hidden_states, guess, following)
            except ValueError as error:
                raise _named(error, layer.name) from error


def _has_input(node: onnx.NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def _named(error: _E, name: str) -> _E:
    """The same exception with the node's name in front."""
    return type(error)(f"layer '{name}': {error}")


def is_layer(node: onnx.NodeProto) -> bool:
    """Whether a node is a MoELayer."""
    return bool(node.op_type == OP_TYPE and node.domain == DOMAIN)


def layer_config(node: onnx.NodeProto) -> LayerConfig:
    """A MoELayer's attributes.

    Raises:
        ValueError: they are not right.
    """
    return LayerConfig.from_attributes(
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    )


def layer_name(node: onnx.NodeProto) -> str:
    """A MoELayer's name, or its output's where it has none."""
    return str(node.name or (node.output[0] if node.output else OP_TYPE))


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, those of branches and loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)
            for subgraph in attribute.graphs:
                yield from all_nodes(subgraph)
