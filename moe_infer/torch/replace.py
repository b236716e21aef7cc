"""``replace_moe``: swaps the MoE modules of a model for MoELayers and writes their experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_infer.budget import check_slot_options
from moe_infer.graph.experts_file import layer_prefix
from moe_infer.graph.outputs import make_folder
from moe_infer.graph.progress import bytes_bar
from moe_infer.op import LayerConfig
from moe_infer.torch.adapter import MoEAdapter, find_adapter
from moe_infer.torch.expert_file import Source, check, write
from moe_infer.torch.layer import MoELayer

_CHECKED_TOKENS = 8
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the check, as a share of the module's largest output."""


@dataclass(frozen=True)
class ReplacedLayer:
    """One module that became a MoELayer.

    Attributes:
        name: of the module in the model.
        module: its class.
        config: attributes that the node will have.
        d_model: last dimension of the hidden states.
        nbytes: of its experts in the file.
        difference: largest difference in the check, as a share of the largest output; None if it
            was not checked.
    """

    name: str
    module: str
    config: LayerConfig
    d_model: int
    nbytes: int
    difference: float | None


@dataclass(frozen=True)
class ReplaceReport:
    """Result of :func:`replace_moe`."""

    layers: list[ReplacedLayer]
    expert_weight_path: Path
    digest: str

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} MoE modules replaced:"]
        for layer in self.layers:
            c = layer.config
            lines.append(
                f"{layer.name} ({layer.module}): {c.expert_count} experts"
                f" {c.expert_sublayer_type} {layer.d_model} x {c.hidden_size}, {c.moe_variant}"
                f" top {c.top_k}"
            )
        return "\n".join([*lines, f"experts: {self.expert_weight_path}"])


def replace_moe(
    model: nn.Module,
    weight_file: str | os.PathLike[str],
    *,
    max_concurrency: int | None = None,
    adapters: Sequence[MoEAdapter] = (),
    check_modules: bool = True,
    progress: bool | None = None,
) -> ReplaceReport:
    """Swaps every known MoE module for one that exports to a MoELayer node.

    The experts go to the file one tensor of one expert at a time, and each parameter is freed when
    all that it holds is written: memory never holds two copies of the weights. Afterwards the model
    runs in PyTorch as before, for inference, with the experts read from the mapped file, and
    ``torch.onnx.export(model, ..., dynamo=True)`` makes a MoELayer of each. The graph belongs in
    the weight file's folder; :func:`moe_infer.torch.finish` completes it.

    Args:
        model: changed in place; in evaluation mode.
        weight_file: a ``.safetensors`` file to write.
        max_concurrency: most experts of a layer on the GPU at once; None: all of them.
        adapters: looked at before those of :func:`register_adapter` and those for transformers.
        check_modules: run each module on 8 random tokens before and after, and compare.
        progress: show a progress bar; None: if standard error is a terminal.

    Raises:
        ValueError: the model is training, has no module that an adapter takes, or a module that
            MoELayer cannot stand for, or ``max_concurrency`` is no number of experts; nothing was
            changed then. Or the check failed.
        OSError: the file's folder cannot be made or written; nothing was changed.
        WeightFileError: the file's name does not end in ``.safetensors``.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    check_slot_options(max_concurrency)
    path = Path(weight_file)
    found = _find(model, adapters)
    sources = [_source(name, module, adapter) for name, module, adapter in found]
    for source in sources:
        check(source)
    before = [
        _sample(module, source) if check_modules else None
        for (_, module, _), source in zip(found, sources, strict=True)
    ]
    make_folder(path.parent)
    sizes = [source.nbytes for source in sources]
    with bytes_bar(progress, "writing experts", sum(sizes)) as advance:
        digest = write(path, sources, advance)
    layers = []
    for i, ((name, module, adapter), source) in enumerate(zip(found, sources, strict=True)):
        config = _config(source, i, path.name, digest, max_concurrency)
        layer = MoELayer(config, source.description.d_model, path.parent.resolve())
        replacement = adapter.install(module, layer).eval()
        _put(model, name, replacement)
        gap = _gap(name, replacement, before[i])
        layers.append(
            ReplacedLayer(name, type(module).__name__, config, layer.d_model, sizes[i], gap)
        )
    return ReplaceReport(layers, path, digest)


def _find(
    model: nn.Module, adapters: Sequence[MoEAdapter]
) -> list[tuple[str, nn.Module, MoEAdapter]]:
    """Modules and their adapters, outermost first: what lies inside one is not looked at."""
    found: list[tuple[str, nn.Module, MoEAdapter]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer, _, _ in found)
        adapter = None if inside else find_adapter(module, adapters)
        if adapter is not None:
            found.append((name, module, adapter))
    if not found:
        candidates = sorted(
            {
                type(m).__name__
                for m in model.modules()
                if any(p.dim() == 3 for p in m.parameters(recurse=False)) or hasattr(m, "experts")
            }
        )
        raise ValueError(
            f"{type(model).__name__} has no MoE module that an adapter takes; modules that look"
            f" like one are {', '.join(candidates) or 'none'}; for these write a MoEAdapter"
            " (docs/torch.md)"
        )
    return found


def _source(name: str, module: nn.Module, adapter: MoEAdapter) -> Source:
    try:
        description = adapter.describe(module)
        # The file does not matter yet, but an attribute that is wrong must be told now.
        attributes = {**description.attributes, "expert_weight_file": "experts.safetensors"}
        return Source(name, LayerConfig.from_attributes(attributes), description)
    except ValueError as error:
        raise ValueError(f"module '{name}' ({type(module).__name__}): {error}") from error


def _config(
    source: Source, index: int, file: str, digest: str, concurrency: int | None
) -> LayerConfig:
    count = source.config.expert_count
    return LayerConfig.from_attributes(
        {
            **source.description.attributes,
            "expert_weight_file": file,
            "expert_weight_prefix": layer_prefix(index),
            "expert_weight_digest": digest,
            "max_concurrency": count if concurrency is None else concurrency,
        }
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    if not child:
        raise ValueError("the model itself is the MoE module; wrap it in another module")
    setattr(model.get_submodule(parent), child, module)


# The check


def _sample(module: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
    """Random hidden states (1, tokens, d_model) and what the module makes of them."""
    like = next(iter(source.description.weights.values())).parameters[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _CHECKED_TOKENS, source.description.d_model, generator=generator)
    x = x.to(like.device, like.dtype)
    return x, _run(module, x)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    # A fresh tensor: modules may change their input in place.
    with torch.no_grad():
        output = module(x.clone())
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first.float()


def _gap(name: str, module: nn.Module, before: tuple[Tensor, Tensor] | None) -> float | None:
    """Largest difference, relative to the largest output.

    Raises:
        ValueError: it is too large.
    """
    if before is None:
        return None
    x, expected = before
    gaps = (_run(module, x) - expected).abs().reshape(_CHECKED_TOKENS, -1).amax(-1)
    scale = float(expected.abs().max()) or 1.0
    # In 16 bits two scores are often equal, and an equal score may go to another expert.
    gap = float(gaps.max() if x.dtype == torch.float32 else gaps.median()) / scale
    if not gap <= _TOLERANCES.get(x.dtype, 0.0):
        raise ValueError(
            f"module '{name}' does not compute what it did: on random tokens the largest difference"
            f" is {gap:.3g} of the largest output; the adapter does not describe it rightly. The"
            " model has lost its experts; load it again"
        )
    return gap
