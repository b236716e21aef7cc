"""Mixture-of-Experts models as one ONNX graph in stock ONNX Runtime.

The import makes TensorRT and its plugin findable for ONNX Runtime, where they are installed. What
is listed in ``__all__`` is the public interface; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_infer.errors import PluginError
from moe_infer.runtime import plugin as _plugin

_plugin.require_onnxruntime()
_plugin.preload()

if TYPE_CHECKING:
    from moe_infer.compare.verify import verify
    from moe_infer.graph.lower import lower
    from moe_infer.graph.rewrite import rewrite
    from moe_infer.inspect import inspect_model
    from moe_infer.op import LayerConfig
    from moe_infer.runtime.expert_use import count_expert_use
    from moe_infer.runtime.plugin import status as plugin_status
    from moe_infer.runtime.session import InferenceSession
    from moe_infer.runtime.stats import expert_stats
    from moe_infer.runtime.tensorrt_api import create_plugin
    from moe_infer.set_budget import set_gpu_budget
    from moe_infer.set_guesses import set_fetch_ahead
    from moe_infer.weights import WeightFileError

    __version__: str

_MODULES = {
    "InferenceSession": "moe_infer.runtime.session",
    "LayerConfig": "moe_infer.op",
    "WeightFileError": "moe_infer.weights",
    "count_expert_use": "moe_infer.runtime.expert_use",
    "create_plugin": "moe_infer.runtime.tensorrt_api",
    "expert_stats": "moe_infer.runtime.stats",
    "inspect_model": "moe_infer.inspect",
    "lower": "moe_infer.graph.lower",
    "rewrite": "moe_infer.graph.rewrite",
    "set_fetch_ahead": "moe_infer.set_guesses",
    "set_gpu_budget": "moe_infer.set_budget",
    "verify": "moe_infer.compare.verify",
}

__all__ = [
    "InferenceSession",
    "LayerConfig",
    "PluginError",
    "WeightFileError",
    "__version__",
    "count_expert_use",
    "create_plugin",
    "expert_stats",
    "inspect_model",
    "lower",
    "plugin_status",
    "rewrite",
    "set_fetch_ahead",
    "set_gpu_budget",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name == "plugin_status":
        value = _plugin.status
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'moe_infer' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata
    from pathlib import Path

    # A source tree says it itself; what happens to be installed may be another version.
    source = Path(__file__).resolve().parent.parent / "VERSION"
    if source.is_file():
        return source.read_text().strip()
    return metadata.version("moe-infer")
