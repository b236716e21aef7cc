"""Inserting MoELayer while a PyTorch model is exported.

The way of a model: ``replace`` finds its MoE modules through ``adapter`` (what a module must tell)
and ``transformers_adapters`` (which modules of transformers are known), ``expert_file`` writes
their experts one by one, ``layer`` takes their place (``eager`` is what it computes in PyTorch),
``export`` calls torch's exporter, and ``finish`` gives the graph what ONNX Runtime's TensorRT
provider needs. ``pretrained`` does all of it with a folder that holds a transformers model, whose
key/value cache ``decoder`` makes inputs and outputs.
"""

from __future__ import annotations

from moe_infer.torch.adapter import (
    MoEAdapter,
    MoEDescription,
    RoutedExperts,
    Weight,
    register_adapter,
    separate,
    stacked,
)
from moe_infer.torch.export import export
from moe_infer.torch.export_errors import explain_export_error
from moe_infer.torch.finish import finish
from moe_infer.torch.layer import MoELayer
from moe_infer.torch.pretrained import ExportError, ExportReport, export_pretrained
from moe_infer.torch.replace import ReplacedLayer, ReplaceReport, replace_moe

__all__ = [
    "ExportError",
    "ExportReport",
    "MoEAdapter",
    "MoEDescription",
    "MoELayer",
    "ReplaceReport",
    "ReplacedLayer",
    "RoutedExperts",
    "Weight",
    "explain_export_error",
    "export",
    "export_pretrained",
    "finish",
    "register_adapter",
    "replace_moe",
    "separate",
    "stacked",
]
