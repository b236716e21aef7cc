"""Types and shapes of the values of a graph, from its value_info and ONNX's shape inference."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, ValueInfoProto

from moe_infer.graph.external import is_external

_STRIPPED_FROM = 1024
"""Bytes from which a constant is left out of the model that shapes are inferred on."""

Dim = int | str | None


@dataclass
class ValueTypes:
    """Element type and shape for each value that has them."""

    infos: dict[str, ValueInfoProto] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """Dimensions (a number, a symbol, or None), or None when the rank is not known."""
        info = self.infos.get(name)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return None
        return tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in info.type.tensor_type.shape.dim
        )

    def element_type(self, name: str) -> int:
        """``TensorProto.DataType``; 0 when it is not known."""
        info = self.infos.get(name)
        return info.type.tensor_type.elem_type if info is not None else 0

    def complete(self, name: str) -> bool:
        """True when type and rank are known, or the value is no tensor."""
        info = self.infos.get(name)
        if info is None:
            return False
        if not info.type.HasField("tensor_type"):
            return info.type.WhichOneof("value") is not None
        return bool(info.type.tensor_type.elem_type) and info.type.tensor_type.HasField("shape")


def infer_types(model: onnx.ModelProto) -> ValueTypes:
    """Types and shapes of all values that ONNX can infer or that the model states.

    What the model states wins, unless it states no shape: exporters know symbols that inference
    cannot derive. A graph on which inference fails keeps what it states.
    """
    types = ValueTypes()
    for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        types.infos[info.name] = info
    for tensor in model.graph.initializer:
        types.infos.setdefault(
            tensor.name,
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)),
        )
    try:
        inferred = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True)
    except Exception:  # onnx raises several unrelated types; what is stated still serves
        return types
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        if not types.complete(info.name):
            types.infos[info.name] = info
    return types


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large constants emptied, so that inference copies no weights."""
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.name = model.graph.name
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    graph.node.extend(model.graph.node)
    named = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_external(tensor) and tensor.ByteSize() < _STRIPPED_FROM:
            graph.initializer.append(tensor)
        elif tensor.name not in named:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return skeleton


def element_type_name(element_type: int) -> str:
    """``FLOAT`` and the like, for messages."""
    return str(TensorProto.DataType.Name(element_type)) if element_type else "unknown"
