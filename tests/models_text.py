"""A MoE block in ONNX text, from which tests make variants by changing lines."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

EXPERTS, D_MODEL, HIDDEN, TOP_K = 4, 6, 8, 2

BLOCK = """
<ir_version: 9, opset_import: ["" : 20]>
moe (float[n, 6] x) => (float[n, 6] y)
<float[6, 4] router, float[4, 8, 6] gate, float[4, 8, 6] up, float[4, 6, 8] down>
{
  k = Constant <value = int64[1] {2}> ()
  last = Constant <value = int64[1] {-1}> ()
  one = Constant <value = int64[1] {1}> ()
  row = Constant <value = int64[2] {-1, 6}> ()
  pairs = Constant <value = int64[3] {-1, 2, 6}> ()
  repeat = Constant <value = int64[3] {1, 2, 1}> ()
  column = Constant <value = int64[2] {-1, 1}> ()
  h = Relu (x)
  logits = MatMul (h, router)
  probabilities = Softmax <axis = -1> (logits)
  top_w, top_i = TopK <axis = -1, largest = 1> (probabilities, k)
  total = ReduceSum <keepdims = 1> (top_w, last)
  weight = Div (top_w, total)
  wide = Unsqueeze (h, one)
  copies = Expand (wide, repeat)
  xs = Reshape (copies, row)
  chosen = Reshape (top_i, last)
  xc = Unsqueeze (xs, last)
  gates = Gather <axis = 0> (gate, chosen)
  ups = Gather <axis = 0> (up, chosen)
  downs = Gather <axis = 0> (down, chosen)
  g3 = MatMul (gates, xc)
  g = Squeeze (g3, last)
  u3 = MatMul (ups, xc)
  u = Squeeze (u3, last)
  sg = Sigmoid (g)
  act = Mul (g, sg)
  hidden = Mul (act, u)
  hc = Unsqueeze (hidden, last)
  o3 = MatMul (downs, hc)
  o = Squeeze (o3, last)
  wc = Reshape (weight, column)
  ow = Mul (o, wc)
  slots = Reshape (ow, pairs)
  moe = ReduceSum <keepdims = 0> (slots, one)
  y = Add (moe, x)
}
"""


def changed(text: str, changes: dict[str, str]) -> str:
    """A model's text with parts replaced by others; each must occur exactly once."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def block(
    changes: dict[str, str] | None = None, half: bool = False, text: str = ""
) -> onnx.ModelProto:
    """The block with random weights, and with parts of its text changed.

    Args:
        changes: text to be replaced by text; each must occur exactly once.
        half: the experts' weights are float16 and cast in the graph.
        text: instead of the block's; values whose shape it states become initializers.
    """
    model = onnx.parser.parse_model(changed(text or BLOCK, changes or {}))
    generator = np.random.default_rng(7)
    for info in model.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, info.name))
    del model.graph.value_info[:]
    if half:
        _store_half(model)
    onnx.checker.check_model(model)
    return model


def _store_half(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in ("gate", "up", "down"):
            stored = f"{tensor.name}_half"
            cast = onnx.helper.make_node("Cast", [stored], [tensor.name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, stored))


def tokens(count: int) -> dict[str, np.ndarray]:
    """Input of the block."""
    generator = np.random.default_rng(count)
    return {"x": generator.standard_normal((count, D_MODEL)).astype(np.float32)}
