"""``moe_infer.verify``: runs a model and its rewrite on the same inputs and compares them.

Both get additional outputs: each MoELayer's, and in the original the value that it replaced, whose
name the rewriter left in the node's metadata. A difference is thus seen in the layer where it
begins and not only in the logits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime as ort

from moe_infer.compare.difference import Array, Tolerance, compare
from moe_infer.compare.feeds import make_feeds, ort_value
from moe_infer.compare.report import LayerDifference, VerifyReport
from moe_infer.compare.taps import add_outputs, without_numpy_type
from moe_infer.graph.lower_nodes import inline_functions, load_model
from moe_infer.graph.progress import status
from moe_infer.graph.replace import GIVES, REPLACES
from moe_infer.op import DOMAIN, OP_TYPE
from moe_infer.runtime.providers import Providers
from moe_infer.runtime.session import InferenceSession

TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4),
    "float16": Tolerance(2e-3, 2e-3),
    "bfloat16": Tolerance(1.6e-2, 1.6e-2),
}
"""By the least exact type of a MoELayer in the graph."""


def verify(
    original: str | os.PathLike[str],
    rewritten: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Array] | None = None,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    providers: Providers | None = None,
    original_providers: Providers | None = None,
    progress: bool | None = None,
) -> VerifyReport:
    """Runs both models, one after the other, and compares outputs and MoE layers.

    Args:
        original: path of the model as it was exported.
        rewritten: path of what :func:`moe_infer.rewrite` made of it (or a lowered model, which has
            no layers to compare).
        inputs: arrays by name, for all inputs or some of them; the others are random: token ids
            that exist, masks of ones, positions after the past, floats of unit variance.
        dims: sizes of symbolic dimensions by name. By default a batch of 2, 5 tokens, a past of 3.
        shapes: whole shapes of random inputs by name.
        seed: of the random inputs.
        atol: largest absolute difference; by default 1e-4 for float32 layers, 2e-3 for float16,
            1.6e-2 for bfloat16.
        rtol: allowed in addition, as a share of the original's value; same defaults.
        providers: that run the rewritten model, as for :class:`moe_infer.InferenceSession`.
        original_providers: that run the original; by default CUDA if there is a GPU, else the CPU.
        progress: show what is being done; None: if standard error is a terminal.

    Raises:
        FileNotFoundError: a model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        ValueError: the models have not the same inputs and outputs, or an argument is not right.
    """
    first, first_folder = load_model(original)
    second, second_folder = load_model(rewritten)
    # Outputs can be added to the main graph alone.
    second = inline_functions(second)
    _check_interface(first, second)
    feeds = make_feeds(first, given=inputs, dims=dims, shapes=shapes, seed=seed)
    outputs = [o.name for o in first.graph.output]
    layers = _layers(second)
    tolerance = _tolerance(second, atol, rtol)
    with status(progress) as step:
        step("running the original")
        expected, ran = _run(
            first, first_folder, [r for _, _, r in layers], feeds, original_providers, plain=True
        )
        step("running the rewritten model")
        found, ran_rewritten = _run(
            second, second_folder, [o for _, o, _ in layers], feeds, providers, plain=False
        )
        step("comparing")
        return VerifyReport(
            outputs=[compare(name, expected[name], found[name], tolerance) for name in outputs],
            layers=[_layer(*layer, expected, found, tolerance) for layer in layers],
            tolerance=tolerance,
            inputs={n: (str(a.dtype), a.shape) for n, a in feeds.items()},
            providers=(ran, ran_rewritten),
        )


def _layers(model: onnx.ModelProto) -> list[tuple[str, str, str]]:
    """Name of each MoELayer, what it gives, and the value that this replaced."""
    found = []
    for node in model.graph.node:
        if node.op_type == OP_TYPE and node.domain == DOMAIN:
            told = {p.key: p.value for p in node.metadata_props}
            given, replaced = told.get(GIVES, node.output[0]), told.get(REPLACES, "")
            found.append((str(node.name or node.output[0]), str(given), str(replaced)))
    return found


def _layer(
    node: str,
    output: str,
    replaced: str,
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    tolerance: Tolerance,
) -> LayerDifference:
    if replaced not in expected:
        reason = (
            f"the original has no value '{replaced}'"
            if replaced
            else "the node does not tell which value it replaced"
        )
        return LayerDifference(node, replaced, None, reason)
    a, b = expected[replaced], found[output]
    if a.shape != b.shape and a.size == b.size:
        b = b.reshape(a.shape)
    return LayerDifference(node, replaced, compare(replaced, a, b, tolerance))


def _run(
    model: onnx.ModelProto,
    folder: Path | None,
    inner: Sequence[str],
    feeds: Mapping[str, Array],
    providers: Providers | None,
    *,
    plain: bool,
) -> tuple[dict[str, Array], str]:
    """Outputs and inner values by name, and the provider."""
    outputs = [o.name for o in model.graph.output]
    taps = add_outputs(model, [*without_numpy_type(model), *(v for v in inner if v not in outputs)])
    # ONNX Runtime gives no bfloat16 to numpy: of such an output its cast is taken.
    names = {**{o: o for o in outputs}, **taps}
    session = InferenceSession(
        model.SerializeToString(),
        providers=_default_providers() if plain and providers is None else providers,
        base_dir=folder,
    )
    values = session.run_with_ort_values(
        list(names.values()), {name: ort_value(array) for name, array in feeds.items()}
    )
    arrays = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    return arrays, session.moe_provider or session.get_providers()[0]


def _default_providers() -> list[str]:
    from moe_infer.runtime import plugin

    cuda = "CUDAExecutionProvider"
    if cuda in ort.get_available_providers() and plugin.gpu_count():
        return [cuda, "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def _check_interface(first: onnx.ModelProto, second: onnx.ModelProto) -> None:
    for what, of_first, of_second in (
        ("inputs", _input_names(first), _input_names(second)),
        ("outputs", {o.name for o in first.graph.output}, {o.name for o in second.graph.output}),
    ):
        if of_first != of_second:
            raise ValueError(
                f"the two models have not the same {what}: only in the original"
                f" {sorted(of_first - of_second) or 'none'}, only in the rewritten one"
                f" {sorted(of_second - of_first) or 'none'}; is one the other's rewrite?"
            )


def _input_names(model: onnx.ModelProto) -> set[str]:
    return {i.name for i in model.graph.input} - {t.name for t in model.graph.initializer}


def _tolerance(model: onnx.ModelProto, atol: float | None, rtol: float | None) -> Tolerance:
    """The given one, or that of the least exact MoELayer."""
    kinds = {i.name: i.type.tensor_type.elem_type for i in model.graph.value_info}
    outputs = {output for _, output, _ in _layers(model)}
    elements = {kinds.get(output, 0) for output in outputs}
    name = "float32"
    if onnx.TensorProto.BFLOAT16 in elements:
        name = "bfloat16"
    elif onnx.TensorProto.FLOAT16 in elements:
        name = "float16"
    default = TOLERANCES[name]
    for label, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{label} must be a finite number of at least 0, got {value}")
    return Tolerance(default.atol if atol is None else atol, default.rtol if rtol is None else rtol)
