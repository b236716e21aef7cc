"""Options of the routers that the tests go through, on a GPU and without one."""

from __future__ import annotations

from typing import Any

SIGMOID_OPTIONS: list[tuple[int, dict[str, Any]]] = [
    # DeepSeek-V3, Kimi K2 (one group), and groups whose experts are spread over lanes unevenly.
    (256, {"top_k": 8, "n_group": 8, "topk_group": 4, "normalize_routing_weights": 1}),
    (384, {"top_k": 8, "normalize_routing_weights": 1, "routed_scaling_factor": 2.5}),
    (6, {"top_k": 2, "n_group": 3, "topk_group": 1}),
    (70, {"top_k": 9, "n_group": 7, "topk_group": 2}),
    (66, {"top_k": 4, "n_group": 33, "topk_group": 2}),
    (1024, {"top_k": 16, "n_group": 512, "topk_group": 100}),
    (1000, {"top_k": 1000, "n_group": 4}),
    (96, {"top_k": 3, "n_group": 3, "topk_group": 1, "router_bias": None}),
    (64, {"top_k": 6, "router_bias": None}),
]
"""(experts, attributes) of ``sigmoid_topk``; a ``router_bias`` of None: without one."""
