"""The plugin for those who build TensorRT networks themselves, without ONNX Runtime."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_infer.errors import PluginError
from moe_infer.op import OP_TYPE, PLUGIN_VERSION
from moe_infer.runtime import native, plugin


def create_plugin(*, name: str = "moe", phase: Any = None, **attributes: Any) -> Any:
    """Makes a MoE layer for ``network.add_plugin_v3([hidden_states], [], plugin)``.

    The inputs are ``hidden_states`` (tokens, d_model) or (batch, seq, d_model), float32, float16 or
    bfloat16, and, unless ``expert_centroids`` are given, ``router_logits`` (..., expert_count) and
    perhaps ``next_router_logits``.
    The weight file is opened and its index checked; weights are loaded when an execution context
    is made.

    Args:
        name: what TensorRT calls the layer.
        phase: a ``tensorrt.TensorRTPhase``; None: BUILD.
        **attributes: the operator's attributes, see docs/operator.md.

    Returns:
        A ``tensorrt.IPluginV3``.

    Raises:
        ImportError: TensorRT's Python module is not installed.
        ValueError: an attribute is wrong.
        WeightFileError: the weight file is missing, damaged or does not fit the attributes.
        PluginError: the plugin's library cannot be used with this TensorRT, or TensorRT refused it.
    """
    trt = _tensorrt()
    library = plugin.load()
    if library.moe_infer_register() != 0:
        raise PluginError(_last_error(library))
    native.check(attributes)  # the same checks as the plugin's, with the error's type
    fields, _memory = _fields(trt, attributes)
    creator = trt.get_plugin_registry().get_creator(OP_TYPE, PLUGIN_VERSION, "")
    if creator is None:
        raise PluginError(
            f"TensorRT {trt.__version__} has no plugin creator {OP_TYPE}; is more than one TensorRT"
            " loaded?"
        )
    made = creator.create_plugin(name, fields, trt.TensorRTPhase.BUILD if phase is None else phase)
    if made is None:
        raise PluginError(_last_error(library))
    return made


def _tensorrt() -> Any:
    for module in ("tensorrt", "tensorrt_bindings"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise ImportError(
        "create_plugin needs TensorRT's Python module, which is not installed:"
        " pip install 'moe-infer[gpu]'"
    )


def _fields(trt: Any, attributes: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The plugin fields, and the memory that they point to."""
    kinds = trt.PluginFieldType
    fields, memory = [], []
    for name, value in attributes.items():
        data: Any
        if isinstance(value, str | bytes):
            text = value if isinstance(value, bytes) else value.encode()
            data, kind = text + b"\0", kinds.CHAR
        elif isinstance(value, Sequence | np.ndarray | float | np.floating):
            data, kind = np.ascontiguousarray(value, np.float32).ravel(), kinds.FLOAT32
        else:
            data, kind = np.array([value], np.int32), kinds.INT32
        memory.append(data)
        fields.append(trt.PluginField(name, data, kind))
    return trt.PluginFieldCollection(fields), memory


def _last_error(library: Any) -> str:
    return str(library.moe_infer_last_error().decode(errors="replace"))
