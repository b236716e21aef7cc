"""The MoELayer operator: attributes, defaults, checks and the shape rule.

This is the only definition on the Python side. The rewriter, the lowering, the reference, the
documentation's tables and the tests read it; ``ops/core/layer_config.cpp`` checks the same rules in
C++ with the same messages, and ``tests/test_native_check.py`` compares the two.

``names`` has what the node is called and its limits, ``attributes``, ``routers`` and ``sublayers``
the tables, and ``layer_config`` one node's attributes with all checks.
"""

from __future__ import annotations

from moe_infer.op.attributes import ATTRIBUTES, Attribute
from moe_infer.op.layer_config import LayerConfig, output_shape
from moe_infer.op.names import (
    DOMAIN,
    DTYPES,
    MAX_EXPERTS,
    MAX_HIDDEN_SIZE,
    OP_TYPE,
    OPSET_VERSION,
    PLUGIN_VERSION,
    RMS_NORM_EPSILON,
)
from moe_infer.op.routers import ROUTERS, Router
from moe_infer.op.sublayers import SUBLAYERS, ExpertTensor, SubLayer

__all__ = [
    "ATTRIBUTES",
    "DOMAIN",
    "DTYPES",
    "MAX_EXPERTS",
    "MAX_HIDDEN_SIZE",
    "OPSET_VERSION",
    "OP_TYPE",
    "PLUGIN_VERSION",
    "RMS_NORM_EPSILON",
    "ROUTERS",
    "SUBLAYERS",
    "Attribute",
    "ExpertTensor",
    "LayerConfig",
    "Router",
    "SubLayer",
    "output_shape",
]
