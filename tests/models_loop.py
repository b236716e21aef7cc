"""A loop over experts as it is traced, in ONNX text: each expert with constants of its own."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

EXPERTS, D_MODEL, HIDDEN = 4, 6, 8

_HEAD = """
<ir_version: 9, opset_import: ["" : 18]>
moe (float[n, {d}] x) => (float[n, {d}] y)
<float[{d}, {e}] router{weights}>
{{
  k = Constant <value = int64[1] {{{k}}}> ()
  last = Constant <value = int64[1] {{-1}}> ()
  zero = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  two = Constant <value = int64[1] {{2}}> ()
  depth = Constant <value = int64[1] {{{e}}}> ()
  hot = Constant <value = int64[2] {{0, 1}}> ()
  h = Relu (x)
  logits = MatMul (h, router)
  probabilities = Softmax <axis = -1> (logits)
  top_w, top_i = TopK <axis = -1> (probabilities, k)
  weights = Unsqueeze (top_w, last)
  by_token = OneHot <axis = -1> (top_i, depth, hot)
  mask = Transpose <perm = [2, 1, 0]> (by_token)
  dims = Shape (h)
  sum_0 = ConstantOfShape (dims)
"""

_EXPERT = """
  number_{i} = Constant <value = int64 {{{i}}}> ()
  mine_{i} = Gather <axis = 0> (mask, number_{i})
  found_{i} = NonZero (mine_{i})
  rows_{i} = Transpose <perm = [1, 0]> (found_{i})
  choice_{i} = Slice (rows_{i}, zero, one, one)
  token_{i} = Slice (rows_{i}, one, two, one)
  pair_{i} = Concat <axis = -1> (token_{i}, choice_{i})
  own_{i} = GatherND (h, token_{i})
{body}
  share_{i} = GatherND (weights, pair_{i})
  given_{i} = Mul (out_{i}, share_{i})
  sum_{j} = ScatterND <reduction = "add"> (sum_{i}, token_{i}, given_{i})
"""

_GATED = """
  g_{i} = MatMul (own_{i}, gate_{i})
  u_{i} = MatMul (own_{i}, up_{i})
  s_{i} = Sigmoid (g_{i})
  a_{i} = Mul (g_{i}, s_{i})
  m_{i} = Mul (a_{i}, u_{i})
  out_{i} = MatMul (m_{i}, down_{i})"""

_PLAIN = """
  u_{i} = Gemm <transB = 1> (own_{i}, up_{i}, up_bias_{i})
  m_{i} = Relu (u_{i})
  out_{i} = Gemm <transB = 1> (m_{i}, down_{i}, down_bias_{i})"""


def loop(
    top_k: int = 2,
    plain: bool = False,
    experts: int = EXPERTS,
    d_model: int = D_MODEL,
    hidden: int = HIDDEN,
    values: bool = True,
) -> onnx.ModelProto:
    """The model, with random weights.

    Args:
        top_k: experts a token.
        plain: relu experts with biases, and weights (out, in), instead of silu-gated ones with
            weights (in, out).
        experts: how many.
        d_model: size of the hidden states.
        hidden: intermediate size.
        values: False leaves the weights out; they are in ``value_info`` then.
    """
    shapes: dict[str, tuple[int, ...]]
    if plain:
        shapes = {
            "up": (hidden, d_model),
            "up_bias": (hidden,),
            "down": (d_model, hidden),
            "down_bias": (d_model,),
        }
    else:
        shapes = {"gate": (d_model, hidden), "up": (d_model, hidden), "down": (hidden, d_model)}
    weights = "".join(
        f", float[{', '.join(map(str, shape))}] {name}_{i}"
        for i in range(experts)
        for name, shape in shapes.items()
    )
    text = _HEAD.format(d=d_model, e=experts, k=top_k, weights=weights)
    for i in range(experts):
        body = (_PLAIN if plain else _GATED).format(i=i)
        text += _EXPERT.format(i=i, j=i + 1, body=body)
    text += f"  y = Add (sum_{experts}, x)\n}}\n"
    model = onnx.parser.parse_model(text)
    if values:
        _fill(model)
        onnx.checker.check_model(model)
    return model


def _fill(model: onnx.ModelProto) -> None:
    generator = np.random.default_rng(5)
    for info in model.graph.value_info:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            array = generator.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, info.name))
    del model.graph.value_info[:]
