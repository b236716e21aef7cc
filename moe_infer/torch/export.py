"""torch.onnx.export of a model with MoELayer modules, and the finish."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_infer.torch.finish import finish


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Exports a model that went through :func:`moe_infer.torch.replace_moe`.

    Args:
        model: in evaluation mode.
        args: example inputs.
        path: of the graph, in the weight file's folder; other weights go to ``path.data``.
        kwargs: example inputs by name.
        options: of ``torch.onnx.export``, such as ``dynamic_shapes``, ``input_names``.

    Returns:
        Values without type and shape, as :func:`moe_infer.torch.finish`.

    Raises:
        RuntimeError: PyTorch is older than 2.8, or torch.onnx.export returned nothing.
        torch.onnx.errors.OnnxExporterError: PyTorch could not export the model.
    """
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(f"PyTorch 2.8 or newer is needed, this is {torch.__version__}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    program = torch.onnx.export(
        model.eval(),
        args,
        kwargs=dict(kwargs or {}),
        **{"verbose": False, **options, "dynamo": True},
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.save(os.fspath(target), external_data=True)
    return finish(target)
