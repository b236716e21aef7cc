"""ONNX Runtime's operator ``com.microsoft.MoE``, which is a whole layer in one node.

Three layouts of it are in circulation; what tells them apart is in the node, not in who wrote it:

* onnxruntime-genai's builder: hidden states of three dimensions and logits of two, gate and up rows
  alternating in the first weight (``swiglu_fusion`` 1), or a third weight (Phi).
* transformers with ``OnnxConfig(ort_fusions="cuda")``: two dimensions, gate, down and up apart.
* ``swiglu_fusion`` 2: gate rows, then up rows.

Its router takes the softmax of the logits and the ``k`` largest. Every attribute is heeded, or the
node is left alone and the reason is said. ``QMoE``, the same with quantised weights, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto

from moe_infer.graph.match import GraphView, Match, NearMiss, Part, describe
from moe_infer.graph.mismatch import Mismatch, Stage

NAME = "fused"
DOMAIN = "com.microsoft"

SPARSE_MIXER_JITTER = 0.01
"""What ONNX Runtime's kernel for ``use_sparse_mixer`` has built in."""

_DEFAULTS: dict[str, Any] = {
    "k": 1,
    "activation_type": "relu",
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 0,
    "swiglu_fusion": 0,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": None,
    "swiglu_limit_after_activation": 0,
}
"""Every attribute of the operator that is known here, and what it is when it is not given."""

_FLOATS = ("activation_alpha", "activation_beta", "swiglu_limit")

_PLAIN = {"relu": "ReLU_FF", "silu": "SiLU_FF", "gelu": "GELU_Tanh_FF"}
"""Sub-layers of one weight. Its gelu is that by tanh, as running it shows."""

_FC1, _FC2, _FC3 = 2, 4, 6


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every fused layer, or why it is left alone, in the order of the graph."""
    readers: dict[str, Callable[[GraphView, NodeProto], Match]] = {"MoE": _moe, "QMoE": _qmoe}
    for node in view.nodes:
        if node.domain == DOMAIN and node.op_type in readers:
            try:
                yield readers[node.op_type](view, node)
            except Mismatch as miss:
                name = describe(node)
                yield NearMiss(NAME, name, miss.stage, name, miss.reason)


def _refuse(reason: str) -> Mismatch:
    return Mismatch(Stage.COMBINED, reason)


def _qmoe(view: GraphView, node: NodeProto) -> Match:
    bits = _attributes(node).get("expert_weight_bits", 4)
    kind = _attributes(node).get("quant_type", "int")
    raise _refuse(
        f"the experts are quantised (QMoE, {bits} bits, '{kind}') and MoELayer's are float32,"
        " float16 or bfloat16; export the model again without quantising the experts"
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


@dataclass(frozen=True)
class _Layer:
    """A MoE node's attributes and the shapes of its weights."""

    view: GraphView
    node: NodeProto
    options: dict[str, Any]
    shape: tuple[int, int, int]
    """Of the second weight: experts, d_model, intermediate size."""

    def name(self, position: int) -> str:
        return self.node.input[position] if position < len(self.node.input) else ""

    def constant(self, position: int, shape: tuple[int, ...], what: str) -> str:
        """Name of a weight, checked."""
        name = self.name(position)
        if name not in self.view.constants:
            kind = "an input of the graph" if name in self.view.graph_inputs else "computed"
            raise _refuse(f"{what} '{name}' is {kind}; it must be a constant")
        found = tuple(self.view.constants[name].dims)
        if found != shape:
            raise _refuse(
                f"{what} '{name}' has shape {found}; needed is {shape} (experts, rows, columns)"
            )
        return name


def _moe(view: GraphView, node: NodeProto) -> Match:
    layer = _read(view, node)
    experts, d_model, hidden_size = layer.shape
    sublayer, parts, options = _sublayer(layer)
    router, k = "softmax_topk", int(layer.options["k"])
    normalize = bool(layer.options["normalize_routing_weights"])
    if layer.options["use_sparse_mixer"]:
        if k != 2 or normalize:
            raise _refuse(
                "use_sparse_mixer is for k 2 without normalize_routing_weights; here k is"
                f" {k} and normalize_routing_weights {int(normalize)}"
            )
        router, options = "sparse_mixer", {**options, "router_jitter": SPARSE_MIXER_JITTER}
    return Match(
        family=NAME,
        hidden_states=node.input[0],
        router_logits=_logits(view, node, experts),
        output=node.output[0],
        expert_count=experts,
        d_model=d_model,
        hidden_size=hidden_size,
        sublayer=sublayer,
        router=router,
        top_k=k,
        normalize=normalize,
        parts=parts,
        anchor=describe(node),
        options=options,
    )


def _read(view: GraphView, node: NodeProto) -> _Layer:
    given = _attributes(node)
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise _refuse(f"what its attribute '{unknown[0]}' does is not known")
    for attribute, value in given.items():
        kind = float if attribute in _FLOATS else type(_DEFAULTS[attribute])
        if type(value) is not kind:
            raise _refuse(f"its attribute '{attribute}' is {value!r}; needed is {kind.__name__}")
    if len(node.input) <= _FC2 or not all(node.input[:2]) or not node.output:
        raise _refuse(f"it has {len(node.input)} inputs; needed are at least {_FC2 + 1}")
    options = {**_DEFAULTS, **given}
    if options["swiglu_limit_after_activation"]:
        raise _refuse(
            "swiglu_limit_after_activation is 1; MoELayer clamps what enters the activation"
        )
    name = node.input[_FC2] if len(node.input) > _FC2 else ""
    tensor = view.constants.get(name)
    if tensor is None or len(tensor.dims) != 3:
        raise _refuse(f"its second weight '{name}' is no constant of three dimensions")
    experts, d_model, hidden_size = tensor.dims
    return _Layer(view, node, options, (experts, d_model, hidden_size))


def _sublayer(layer: _Layer) -> tuple[str, dict[str, Part], dict[str, float]]:
    kind, fusion = str(layer.options["activation_type"]), int(layer.options["swiglu_fusion"])
    third = bool(layer.name(_FC3))
    options: dict[str, float] = {}
    if kind == "swiglu":
        sublayer, options = _swiglu(layer)
    elif kind == "geglu":
        sublayer = "Gated_GELU_Tanh"
    else:
        _check_no_parameters(layer, kind)
        if fusion:
            raise _refuse(f"swiglu_fusion is {fusion}, but activation_type is '{kind}'")
        if third and kind != "silu":
            raise _refuse(
                f"it has a third weight with activation_type '{kind}'; ONNX Runtime says what that"
                " computes for silu and swiglu only"
            )
        sublayer = "Gated_SiLU" if third else _PLAIN.get(kind, "")
        if not sublayer:
            raise _refuse(
                f"no sub-layer of MoELayer computes activation_type '{kind}'; known are swiglu,"
                f" geglu, {', '.join(_PLAIN)}, and silu with a third weight"
            )
    if kind in ("swiglu", "geglu"):
        if third == bool(fusion) or fusion not in (0, 1, 2) or (kind == "geglu" and not fusion):
            raise _refuse(
                f"activation_type is '{kind}' and swiglu_fusion {fusion},"
                f" {'with' if third else 'without'} a third weight; gate and up are either in the"
                " first weight (swiglu_fusion 1 or 2) or in the first and third (0)"
            )
        return sublayer, _gated(layer, fusion), options
    return sublayer, _gated(layer, 0) if third else _plain(layer), options


def _swiglu(layer: _Layer) -> tuple[str, dict[str, float]]:
    alpha, beta, limit = (layer.options[n] for n in _FLOATS)
    if limit is None and (alpha, beta) == (1.0, 0.0):
        return "Gated_SiLU", {}
    if limit is not None and limit <= 0:
        raise _refuse(f"swiglu_limit is {limit:g}, which lets nothing through the activation")
    options = {"activation_alpha": alpha, "activation_beta": beta, "swiglu_limit": limit or 0.0}
    return "Clamped_SwiGLU", options


def _check_no_parameters(layer: _Layer, kind: str) -> None:
    for name in _FLOATS:
        if layer.options[name] != _DEFAULTS[name]:
            raise _refuse(
                f"{name} is {layer.options[name]:g}, but activation_type '{kind}' has no such"
                " parameter"
            )


def _gated(layer: _Layer, fusion: int) -> dict[str, Part]:
    hidden_size = layer.shape[2]
    parts = _products(layer, gated=True, fused=bool(fusion))
    if fusion:
        start, step = (1, 2) if fusion == 1 else (hidden_size, 1)
        for kind in ("weight", "bias"):
            if f"gate_{kind}" in parts:
                constant = parts[f"gate_{kind}"].constant
                parts[f"gate_{kind}"] = Part(constant, False, 0, step)
                parts[f"up_{kind}"] = Part(constant, False, start, step)
    return parts


def _plain(layer: _Layer) -> dict[str, Part]:
    parts = _products(layer, gated=False, fused=False)
    return {name.replace("gate_", "up_"): part for name, part in parts.items()}


def _products(layer: _Layer, gated: bool, fused: bool) -> dict[str, Part]:
    """The weights and biases of the node's products; the first is called gate."""
    experts, d_model, hidden_size = layer.shape
    rows = hidden_size * 2 if fused else hidden_size
    products = [("gate", _FC1, rows, d_model), ("down", _FC2, d_model, hidden_size)]
    if gated and not fused:
        products.append(("up", _FC3, hidden_size, d_model))
    biased = {bool(layer.name(position + 1)) for _, position, _, _ in products}
    if len(biased) != 1:
        raise _refuse("only some of its weights have biases; all must, or none")
    parts: dict[str, Part] = {}
    for name, position, height, width in products:
        weight = layer.constant(position, (experts, height, width), "weight")
        parts[f"{name}_weight"] = Part(weight)
        if layer.name(position + 1):
            bias = layer.constant(position + 1, (experts, height), "bias")
            parts[f"{name}_bias"] = Part(bias)
    return parts


def _logits(view: GraphView, node: NodeProto, experts: int) -> str:
    """The logits in as many dimensions as the hidden states have."""
    x, logits = str(node.input[0]), str(node.input[1])
    wanted, found = view.types.shape(x), view.types.shape(logits)
    if wanted is None or found is None or len(wanted) == len(found):
        return logits
    producer = view.producer(logits)
    if producer is not None and producer.op_type == "Reshape" and producer.input:
        source = str(producer.input[0])
        shape = view.types.shape(source)
        if shape is not None and len(shape) == len(wanted) and shape[-1] == experts:
            return source
    raise _refuse(
        f"its hidden states have {len(wanted)} dimensions and its logits {len(found)}, and no"
        " Reshape between them and the router"
    )
