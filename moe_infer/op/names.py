"""What the operator is called, and its limits."""

from __future__ import annotations

DOMAIN = "trt.plugins"
"""The only ONNX domain in which ONNX Runtime's TensorRT provider looks for plugins."""

OP_TYPE = "MoELayer"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"

MAX_EXPERTS = 1024
"""Most experts of one layer: the router keeps one row of scores in shared memory."""

MAX_HIDDEN_SIZE = 2**30 - 1
"""Largest intermediate size: the kernels count gate and up columns together in 32 bits."""

RMS_NORM_EPSILON = 1e-6
"""Epsilon of the RMS normalisation in ``T5_FF`` and in the ``cpm_2`` router."""

DTYPES = ("float32", "float16", "bfloat16")
"""Types of ``hidden_states``, and of the weights in the file (the two are independent)."""
