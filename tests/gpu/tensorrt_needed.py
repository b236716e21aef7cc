"""What tests with engines need: the plugin, and an ONNX Runtime with TensorRT's provider."""

from __future__ import annotations

import onnxruntime as ort
import pytest

from moe_infer.runtime import plugin

TRT = "TensorrtExecutionProvider"


def why_not() -> str:
    """The reason why no engine can be built here; empty when one can."""
    status = plugin.status()
    if not status.usable:
        return status.reason
    return "" if TRT in ort.get_available_providers() else "this ONNX Runtime has no TensorRT"


ENGINE = [
    pytest.mark.needs_library,
    pytest.mark.engine,
    pytest.mark.skipif(bool(why_not()), reason=f"no TensorRT: {why_not()}"),
]
"""Marks of a module whose tests build engines."""
