"""Graphs for ONNX Runtime: MoE layers whose router logits are inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from moe_bench.cases import Case
from moe_infer.op import DOMAIN
from moe_infer.weights import open_weight_file

ELEMENTS = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}
MICROSOFT = "com.microsoft"


def names(layer: int) -> tuple[str, str, str]:
    """Names of a layer's hidden states, router logits and output."""
    return f"x_{layer}", f"logits_{layer}", f"y_{layer}"


def moe_layer_model(
    case: Case, dtype: str, path: Path, layers: int, tokens: int | None, casts: bool = False
) -> onnx.ModelProto:
    """A graph of MoELayer nodes, each with inputs and an output of its own (see ``names``).

    Not one after the other: without what stands between the layers of a model, the numbers would
    vanish or overflow. A provider with one stream runs them in turn all the same.

    Args:
        case: each of the layers.
        dtype: its type.
        path: the weight file, which all layers share.
        layers: their number.
        tokens: None: any number.
        casts: the graph's inputs and outputs are float32, with Cast nodes around the layers.
    """

    def node(inputs: list[str], output: str) -> onnx.NodeProto:
        attributes = case.attributes(path)
        return helper.make_node(
            "MoELayer", inputs, [output], f"moe_{output}", domain=DOMAIN, **attributes
        )

    return _graph(case, dtype, layers, tokens, node, DOMAIN, [], casts)


def microsoft_moe_model(
    case: Case, dtype: str, path: Path, layers: int, tokens: int | None, activation: str
) -> onnx.ModelProto:
    """The same of ``com.microsoft.MoE``, with the weights as external data in ``path``.

    Args:
        case: the layer; the operator has no norm and no residual.
        dtype: its type.
        path: the weight file; the model must be saved beside it.
        layers: see ``moe_layer_model``.
        tokens: see ``moe_layer_model``.
        activation: "swiglu" or "geglu"; gate and up rows alternate in the file.
    """
    stored = open_weight_file(path).tensors
    initializers = []
    for name in ("gate_up", "down"):
        info = stored[name]
        tensor = TensorProto(
            name=name,
            data_type=ELEMENTS[dtype],
            dims=info.shape,
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": path.name, "offset": info.offset, "length": info.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    attributes: dict[str, Any] = {
        "k": case.top_k,
        "normalize_routing_weights": 1,  # with one expert a token: its weight is 1
        "activation_type": activation,
        "swiglu_fusion": 1,
    }
    if activation == "swiglu":
        attributes |= {"activation_alpha": 1.0, "activation_beta": 0.0}

    def node(inputs: list[str], output: str) -> onnx.NodeProto:
        given = [*inputs, "gate_up", "", "down"]
        return helper.make_node(
            "MoE", given, [output], f"moe_{output}", domain=MICROSOFT, **attributes
        )

    return _graph(case, dtype, layers, tokens, node, MICROSOFT, initializers, False)


def _graph(
    case: Case,
    dtype: str,
    layers: int,
    tokens: int | None,
    make_node: Callable[[list[str], str], onnx.NodeProto],
    domain: str,
    initializers: list[TensorProto],
    casts: bool,
) -> onnx.ModelProto:
    element = ELEMENTS[dtype]
    outside = TensorProto.FLOAT if casts else element
    dimension: Any = "tokens" if tokens is None else tokens
    nodes, infos, inputs, outputs = [], [], [], []

    def value(name: str, width: int, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [dimension, width])

    def cast_in(name: str, width: int) -> str:
        infos.append(value(f"{name}_cast", width, element))
        nodes.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=element))
        return f"{name}_cast"

    for i in range(layers):
        x, logits, y = names(i)
        inputs += [value(x, case.d_model, outside), value(logits, case.experts, outside)]
        outputs.append(value(y, case.d_model, outside))
        if casts:
            given = [cast_in(x, case.d_model), cast_in(logits, case.experts)]
            infos.append(value(f"{y}_cast", case.d_model, element))
            nodes.append(make_node(given, f"{y}_cast"))
            nodes.append(helper.make_node("Cast", [f"{y}_cast"], [y], to=outside))
        else:
            nodes.append(make_node([x, logits], y))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, initializers, value_info=infos)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return model
