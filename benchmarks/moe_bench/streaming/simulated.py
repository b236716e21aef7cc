"""What moe_infer.simulate says of a measured point, from the rates of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_bench.streaming.shapes import DECODER, expert_bytes
from moe_infer.simulate import Machine


def simulated_ms(point: Mapping[str, Any]) -> float | None:
    """Milliseconds of a step of part B; None for other points.

    Of the run it takes three numbers: the bus's speed, a layer's time with all experts resident,
    and how many experts were fetched (the replay of the trace gives the same). Nothing is fitted:
    a fetch costs its bytes alone, and no fetch hides behind what is computed.
    """
    if point["part"] != "B" or not point.get("bytes_a_run") or not point.get("resident_ms"):
        return None
    layers = int(point["layers"])
    size = expert_bytes(DECODER, point["dtype"])
    machine = Machine(
        expert_bytes=size,
        bus=1e-6 * point["bytes_a_run"] / point["bus_ms"],
        other_us=1e3 * point["resident_ms"] / layers,
    )
    misses = np.full(layers, point["bytes_a_run"] / size / layers)
    return 1e-3 * float(machine.call_us(np.zeros(layers), misses).sum())
