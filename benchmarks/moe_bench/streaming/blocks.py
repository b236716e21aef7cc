"""Mixtral's MoE blocks as transformers has them, with given weights."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from moe_bench.cases import Case
from moe_bench.weights import Experts


def make(case: Case, gate: torch.Tensor, experts: list[Experts]) -> list[Any]:
    """Blocks that share the experts' memory, one for each layer.

    Args:
        case: their shape.
        gate: (experts, d_model), every block's router.
        experts: the weights.

    Raises:
        ImportError: transformers is not installed, or has no such block.
        RuntimeError: its block has other weights.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.d_model,
        intermediate_size=case.hidden,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        num_hidden_layers=len(experts),
        router_jitter_noise=0.0,
    )
    blocks = []
    for own in experts:
        weights = {
            "gate.weight": gate,
            "experts.gate_up_proj": own.gate_up,
            "experts.down_proj": own.down,
        }
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)
        block.load_state_dict(weights, strict=True, assign=True)
        blocks.append(block.eval().requires_grad_(False))
    return blocks


def offload(blocks: list[Any], device: str) -> list[Any]:
    """The same blocks with their weights in the host's memory, moved for each call.

    Raises:
        ImportError: accelerate is not installed.
    """
    from accelerate import cpu_offload

    moved = [block.to("cpu") for block in blocks]
    place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else device
    return [cpu_offload(block, execution_device=torch.device(place)) for block in moved]


def version(name: str) -> str:
    """For the table."""
    return f"{name} {metadata.version(name)}, MoE blocks alone"
