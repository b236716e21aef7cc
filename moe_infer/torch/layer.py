"""The module that takes an MoE module's place: computes in PyTorch, exports as one node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_infer.op import DOMAIN, OP_TYPE, OPSET_VERSION, LayerConfig
from moe_infer.torch import eager
from moe_infer.weights import open_expert_weights


class MoELayer(nn.Module):  # type: ignore[misc]
    """One MoE layer whose experts are in a weight file; it has no parameters.

    Args:
        config: attributes, as the exported node shall have them.
        d_model: last dimension of the hidden states.
        folder: of the weight file, for running in PyTorch.
    """

    def __init__(self, config: LayerConfig, d_model: int, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.weights = open_expert_weights(config, d_model, folder)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """One MoELayer node while exporting, else what it computes, for inference.

        Args:
            hidden_states: (tokens, d_model) or (batch, seq, d_model).
            router_logits: (..., expert_count), of the same type or float32.

        Returns:
            In the shape and type of ``hidden_states``.

        Raises:
            RuntimeError: the TorchScript exporter is at work.
        """
        if torch.compiler.is_exporting():
            return self._node(hidden_states, router_logits)
        if torch.jit.is_tracing():
            raise RuntimeError(
                "MoELayer exports through torch.export only; call torch.onnx.export with"
                " dynamo=True, or moe_infer.torch.export"
            )
        with torch.no_grad():
            return eager.moe_layer(hidden_states, router_logits, self.config, self.weights)

    def _node(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        attributes: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.config.to_attributes().items()
        }
        node: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP_TYPE}",
            (hidden_states, router_logits),
            attrs=attributes,
            dtype=hidden_states.dtype,
            shape=hidden_states.shape,
            version=OPSET_VERSION,
        )
        return node

    def extra_repr(self) -> str:
        """For printing a model."""
        c = self.config
        return (
            f"{c.expert_count} experts {c.expert_sublayer_type} {self.d_model} x {c.hidden_size},"
            f" {c.moe_variant} top {c.top_k}, {c.expert_weight_file} {c.expert_weight_prefix}"
        )
