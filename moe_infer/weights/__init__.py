"""Expert weight files: npz and safetensors, checked before use, written in a stream.

The way of a file: ``paths`` finds it, ``formats`` opens it as ``npz_file`` or
``safetensors_file`` (both check their index with ``index``), ``experts`` checks it against a
layer, ``content`` the weights themselves if asked to; ``writer`` makes one. docs/weight-files.md
is the format's page.
"""

from __future__ import annotations

from moe_infer.weights.content import check_content
from moe_infer.weights.errors import WeightFileError
from moe_infer.weights.experts import ExpertWeights, open_expert_weights
from moe_infer.weights.file import WeightFile
from moe_infer.weights.formats import open_weight_file
from moe_infer.weights.index import TensorInfo
from moe_infer.weights.paths import resolve_weight_path
from moe_infer.weights.writer import SafetensorsWriter, write_npz

__all__ = [
    "ExpertWeights",
    "SafetensorsWriter",
    "TensorInfo",
    "WeightFile",
    "WeightFileError",
    "check_content",
    "open_expert_weights",
    "open_weight_file",
    "resolve_weight_path",
    "write_npz",
]
