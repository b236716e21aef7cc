"""Two MoE layers in ONNX text, whose routers tests change; and the second router as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import moe_infer
from layer_models import write_layer
from models_text import changed
from moe_infer.graph.shapes import infer_types
from moe_infer.op import OP_TYPE

D_MODEL, EXPERTS = 6, (4, 8)
CPU = ["CPUExecutionProvider"]

TEXT = """
<ir_version: 9, opset_import: ["" : 20, "trt.plugins" : 1]>
two (float[n, 6] x) => (float[n, 6] y)
<float[6, 4] router_0, float[6, 8] router_1, float[8] bias_1, float[6] norm_1>
{
  h0 = Relu (x)
  logits_0 = MatMul (h0, router_0)
  m0 = trt.plugins.MoELayer (h0, logits_0)
  h1 = Tanh (m0)
  product = MatMul (h1, router_1)
  logits_1 = Add (product, bias_1)
  m1 = trt.plugins.MoELayer (h1, logits_1)
  y = Add (m1, x)
}
"""
ROUTER = "  product = MatMul (h1, router_1)\n  logits_1 = Add (product, bias_1)\n"


def two_layers(
    folder: Path, changes: dict[str, str] | None = None, **attributes: Any
) -> onnx.ModelProto:
    """The layers with parts of their text changed; experts and other weights are random.

    Args:
        folder: for the experts.
        changes: text to be replaced by text; each must occur exactly once.
        attributes: of both layers.
    """
    model = onnx.parser.parse_model(changed(TEXT, changes or {}))
    generator = np.random.default_rng(3)
    values = [v for v in model.graph.value_info if v.name not in ("m0", "m1")]
    for info in values:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        weight = generator.standard_normal(shape).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(weight, info.name))
        model.graph.value_info.remove(info)
    for i, node in enumerate(layers(model)):
        node.name = f"moe_{i}"
        made = write_layer(
            folder / f"experts_{i}",
            "Gated_SiLU",
            "softmax_topk",
            EXPERTS[i],
            D_MODEL,
            8,
            centroids=len(node.input) < 2,
            **{"max_concurrency": 3, **attributes},
        )
        made["expert_weight_file"] = Path(made["expert_weight_file"]).name
        node.attribute.extend(helper.make_attribute(*entry) for entry in made.items())
    known = {v.name for v in model.graph.value_info}
    for name in {"m0", "m1"} - known:
        model.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", D_MODEL])
        )
    onnx.checker.check_model(model)
    return model


def layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The MoELayer nodes."""
    return [n for n in model.graph.node if n.op_type == OP_TYPE]


def run(model: onnx.ModelProto, folder: Path, feeds: dict[str, Any], *names: str) -> list[Any]:
    """Values of a model with MoELayer nodes, lowered, by ONNX Runtime on the CPU."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    infos = infer_types(model).infos
    known = {o.name for o in model.graph.output}
    tapped.graph.output.extend(infos[n] for n in dict.fromkeys(names) if n not in known)
    session = moe_infer.InferenceSession(tapped.SerializeToString(), providers=CPU, base_dir=folder)
    values: list[Any] = session.run(list(names), feeds)
    return values


def router_alone(model: onnx.ModelProto, reads: str, logits: str, values: Any) -> Any:
    """What the nodes between two values of a graph give, cut out by ONNX's own tool."""
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    del typed.graph.value_info[:]
    typed.graph.value_info.extend(infer_types(model).infos.values())
    cut = onnx.utils.Extractor(typed).extract_model([reads], [logits])
    session = ort.InferenceSession(cut.SerializeToString(), providers=CPU)
    return session.run([logits], {reads: values})[0]
