"""``moe_infer.rewrite``: finds the MoE blocks of a model and makes MoELayer nodes of them."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from moe_infer.budget import LayerSlots, check_slot_options, split_budget
from moe_infer.byte_size import ByteSize
from moe_infer.graph import lower_nodes
from moe_infer.graph.candidates import candidates, outside
from moe_infer.graph.edits import add_value_info, remove_unread
from moe_infer.graph.experts_file import (
    Source,
    layer_prefix,
    layer_tensors,
    open_constants,
    write_experts,
)
from moe_infer.graph.external import WEIGHT_DTYPES, Constant, all_tensors
from moe_infer.graph.for_tensorrt import suit_tensorrt
from moe_infer.graph.guess_next import add_guesses
from moe_infer.graph.layer_checks import ReplaceError, check_types
from moe_infer.graph.match import GraphView, Match, NearMiss
from moe_infer.graph.outputs import make_folder
from moe_infer.graph.progress import bytes_bar
from moe_infer.graph.region import check_region
from moe_infer.graph.replace import replace_with_moe_layer
from moe_infer.graph.report import LayerReport, RewriteReport
from moe_infer.graph.save import bytes_to_move, save_model
from moe_infer.graph.shapes import ValueTypes, infer_types
from moe_infer.op import LayerConfig
from moe_infer.weights import open_expert_weights, open_weight_file

MODEL_NAME = "model.onnx"
EXPERTS_NAME = "experts.safetensors"

Layer = tuple[Match, dict[str, Source]]


def rewrite(
    model: str | os.PathLike[str] | onnx.ModelProto,
    out_dir: str | os.PathLike[str],
    *,
    max_concurrency: int | None = None,
    gpu_budget: ByteSize | None = None,
    expert_weight_file: str | os.PathLike[str] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
    copy_shared_weights: bool = False,
    fetch_ahead: bool = False,
    progress: bool | None = None,
) -> RewriteReport:
    """Replaces every MoE block of a model by a MoELayer node and writes the experts to a file.

    Requires opset 13 or newer. Writes ``out_dir/model.onnx``, ``out_dir/experts.safetensors`` and,
    if the model has external data left, ``out_dir/model.onnx.data``, each under a temporary name
    first. External data is never loaded whole: memory holds the graph and one tensor of one expert.

    No match is no error: the report says how far the nearest went, and nothing is written. Nor is
    anything written when the exporter left a part of a block out: the model is wrong then. A block
    that cannot be replaced (a weight that is shared, an inner value used elsewhere) is left as it
    is and reported in the same way.

    Args:
        model: path of an ONNX model, or the model itself (not changed).
        out_dir: made if it does not exist.
        max_concurrency: most experts of a layer on the GPU at once. None: all of them, which is
            what the original graph needs and the fastest; give a number when they do not fit.
        gpu_budget: bytes for the experts of all layers on the GPU, or a text such as ``8G``, in the
            place of ``max_concurrency``: split into slots by :func:`moe_infer.budget.split_budget`.
            Can be changed later (:func:`moe_infer.set_gpu_budget`).
        expert_weight_file: an existing file with these experts under the prefixes ``layers.N.``,
            which the nodes shall refer to instead of a new one. Its index is checked.
        base_dir: folder of the external data when ``model`` is no path; the working directory by
            default.
        copy_shared_weights: replace also blocks whose weights other nodes read; the graph then
            keeps these weights beside the expert file.
        fetch_ahead: let each layer guess the experts of the next one, for fetching them ahead;
            only for layers that stream (:func:`moe_infer.set_fetch_ahead`).
        progress: show a progress bar; None: if standard error is a terminal.

    Returns:
        What matched, what nearly did, and what was written.

    Raises:
        FileNotFoundError: there is no such model.
        OSError: ``out_dir`` cannot be made or written. Nothing was written.
        ValueError: the output would overwrite the model or its data; its external data is refused
            (:class:`moe_infer.graph.external.ExternalDataError`); ``max_concurrency`` is no number
            of experts; or ``gpu_budget`` does not hold the experts of one token. Nothing was
            written.
        moe_infer.weights.WeightFileError: ``expert_weight_file`` does not hold these experts.
    """
    check_slot_options(max_concurrency, gpu_budget)
    proto, folder = load_model(model, base_dir)
    target = Path(out_dir)
    types = infer_types(proto)
    view = GraphView(proto, types, folder)
    report = RewriteReport()
    layers = find_layers(view, report, copy_shared_weights)
    if not layers or report.wrong_export:
        return report
    slots: list[int | None] = [max_concurrency] * len(layers)
    if gpu_budget is not None:
        slots = _split(gpu_budget, layers, types)
    _refuse_overwriting(model, folder, target, view)
    make_folder(target)
    experts = Path(expert_weight_file) if expert_weight_file is not None else target / EXPERTS_NAME
    with bytes_bar(progress, "writing experts", sum(_nbytes(layer) for layer in layers)) as advance:
        if expert_weight_file is None:
            digest = write_experts(experts, layers, advance)
        else:
            digest = open_weight_file(experts).digest
    named = experts.name if expert_weight_file is None else _relative(experts, target)
    renamed: dict[str, str] = {}
    left: set[str] = set()
    for i, layer in enumerate(layers):
        config = _config(layer[0], i, named, digest, slots[i])
        if expert_weight_file is not None:
            open_expert_weights(config, layer[0].d_model, base_dir=target)
        report.layers.append(
            _replace(proto, types, i, layer, config, copy_shared_weights, renamed, left)
        )
    remove_unread(proto, left)
    suit_tensorrt(proto, types)
    if fetch_ahead:
        report.guesses = add_guesses(proto, types)
    report.untyped_values = add_value_info(proto, types)
    with bytes_bar(progress, "writing model", bytes_to_move(proto)) as advance:
        report.data_path = save_model(proto, target / MODEL_NAME, folder, advance)
    report.model_path, report.expert_weight_path = target / MODEL_NAME, experts
    return report


def find(model: onnx.ModelProto, base_dir: Path | None = None) -> list[Match | NearMiss]:
    """Every MoE block that a family recognises, and every part of one, in the graph's order."""
    return candidates(GraphView(model, infer_types(model), base_dir or Path.cwd()))


def load_model(
    model: str | os.PathLike[str] | onnx.ModelProto, base_dir: str | os.PathLike[str] | None
) -> tuple[onnx.ModelProto, Path]:
    """A copy of a model, or a model without its external data; and the folder of that data.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is no ONNX model.
    """
    proto, folder = lower_nodes.load_model(model, base_dir)
    return proto, folder or Path.cwd()


def find_layers(view: GraphView, report: RewriteReport, copy_shared: bool) -> list[Layer]:
    """Blocks that can be replaced, each output once; the others go to the report."""
    layers: list[Layer] = []
    taken: set[str] = set()
    misses: list[NearMiss] = []
    regions: list[Collection[int]] = []
    for candidate in candidates(view):
        if isinstance(candidate, NearMiss):
            misses.append(candidate)
            continue
        if candidate.output in taken:
            continue
        try:
            region = check_region(
                view,
                hidden_states=candidate.hidden_states,
                output=candidate.output,
                router_logits=candidate.router_logits,
                copy_shared_weights=copy_shared,
            )
            regions.append(region.ancestors)
            # Before anything is written: the file and its digest do not matter here.
            candidate = _with_router_bias(candidate, view)
            config = _checked_config(candidate)
            names = candidate.hidden_states, candidate.output, candidate.router_logits
            check_types(view, *names, config, candidate.like)
            layers.append((candidate, open_constants(view, candidate)))
        except ReplaceError as error:
            report.near_misses.append(_refused(candidate, error.node, error.reason))
        taken.add(candidate.output)
    report.near_misses += outside(misses, view, regions)
    report.near_misses.sort(key=lambda m: not m.wrong_export)
    report.wrong_export = any(m.wrong_export for m in report.near_misses)
    return layers


def _with_router_bias(match: Match, view: GraphView) -> Match:
    """The match with the values of the bias among the attributes."""
    if not match.router_bias:
        return match
    bias = Constant(view.constants[match.router_bias], view.base_dir)
    values = np.concatenate([bias.entry(i).ravel() for i in range(bias.shape[0])])
    return replace(match, options={**match.options, "router_bias": tuple(map(float, values))})


def _checked_config(match: Match) -> LayerConfig:
    """The configuration, of a graph that may hold what the operator does not take."""
    try:
        return _config(match, 0, EXPERTS_NAME, "", None)
    except ValueError as error:
        raise ReplaceError(f"'{match.output}'", str(error)) from error


def _split(budget: ByteSize, layers: list[Layer], types: ValueTypes) -> list[int | None]:
    """Slots of each layer."""
    needs = []
    for i, (match, _) in enumerate(layers):
        config = _config(match, i, EXPERTS_NAME, "", None)
        dtype = WEIGHT_DTYPES[types.element_type(match.hidden_states)]
        needs.append(LayerSlots.needs(_node_name(i), config, match.d_model, dtype))
    return [layer.slots for layer in split_budget(budget, needs).layers]


def _node_name(index: int) -> str:
    return f"MoELayer.{index}"


def _refused(match: Match, node: str, reason: str) -> NearMiss:
    return NearMiss(match.family, match.anchor, 100, node, reason)


def _config(
    match: Match, index: int, file: str, digest: str, concurrency: int | None
) -> LayerConfig:
    return LayerConfig.from_attributes(
        {
            "expert_count": match.expert_count,
            "hidden_size": match.hidden_size,
            "expert_sublayer_type": match.sublayer,
            "expert_weight_file": file,
            "expert_weight_prefix": layer_prefix(index),
            "expert_weight_digest": digest,
            "max_concurrency": match.expert_count if concurrency is None else concurrency,
            "top_k": match.top_k,
            "moe_variant": match.router,
            "normalize_routing_weights": int(match.normalize),
            "expert_bias": int(match.expert_bias),
            **match.options,
        }
    )


def _replace(
    proto: onnx.ModelProto,
    types: ValueTypes,
    index: int,
    layer: Layer,
    config: LayerConfig,
    copy_shared: bool,
    renamed: dict[str, str],
    left: set[str],
) -> LayerReport:
    match, constants = layer
    done = replace_with_moe_layer(
        proto,
        # A layer may read the output of the one before, which has another name by now.
        hidden_states=renamed.get(match.hidden_states, match.hidden_states),
        output=match.output,
        router_logits=match.router_logits,
        config=config,
        name=_node_name(index),
        types=types,
        copy_shared_weights=copy_shared,
        kept=match.kept,
        like=renamed.get(match.like, match.like),
    )
    renamed[match.output] = done.value
    left |= done.left
    return LayerReport(
        index=index,
        family=match.family,
        node_name=done.node_name,
        output=done.output,
        config=config,
        d_model=match.d_model,
        tensors=layer_tensors(match, config.expert_weight_prefix, constants),
        constants=match.constants,
        nbytes=_nbytes(layer),
        removed_nodes=done.removed_nodes,
    )


def _nbytes(layer: Layer) -> int:
    match, constants = layer
    tensors = layer_tensors(match, "", constants)
    width = {"float32": 4, "float16": 2, "bfloat16": 2}
    total = 0
    for dtype, shape in tensors.values():
        size = width[dtype]
        for n in shape:
            size *= n
        total += size
    return total


def _refuse_overwriting(model: object, folder: Path, target: Path, view: GraphView) -> None:
    tensors = list(all_tensors(view.graph))
    locations = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    sources = {folder.resolve() / location for location in locations}
    if isinstance(model, str | os.PathLike):
        sources.add(Path(model).resolve())
    for name in (MODEL_NAME, MODEL_NAME + ".data", EXPERTS_NAME):
        if (target / name).resolve() in {s.resolve() for s in sources}:
            raise ValueError(
                f"writing {target / name} would overwrite the model that is read; give"
                " another out_dir"
            )


def _relative(path: Path, folder: Path) -> str:
    """Relative to the model's folder if it lies inside, else absolute."""
    full, base = path.resolve(), folder.resolve()
    return full.relative_to(base).as_posix() if full.is_relative_to(base) else str(full)
