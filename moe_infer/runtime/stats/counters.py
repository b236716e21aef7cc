"""The counters of one layer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ExpertStats:
    """What one MoE layer did since it was made. None: nobody counts it there.

    A layer that streams its experts counts everything. One whose experts all stay on the GPU counts
    runs and tokens; which experts its tokens chose stays on the device, since to read it would stop
    a run that otherwise never waits. One that was lowered to ONNX Runtime's operators has no slots
    and counts nothing itself. Where a session was made with ``expert_use=True``, ``uses`` is
    counted from the values that route the tokens instead.

    Attributes:
        name: the node's, or file and prefix where no model is known.
        where: what runs it.
        weight_file: path, "" for a sub-layer without weights.
        weight_prefix: first part of its names in the file.
        experts: number of experts.
        slots: experts in device memory at most.
        slot_bytes: bytes of one expert there.
        runs: runs of the layer.
        tokens: tokens in all runs.
        hits: experts that a run needed and that lay in a slot.
        misses: experts that a run needed and that had to be fetched.
        evictions: experts that had to leave their slot.
        bytes_fetched: bytes of weights from host to device; with those of loading where all stay.
        prefetches_used: experts that were fetched ahead and then needed.
        prefetches_wasted: experts that were fetched ahead, in part at least, and not needed.
        prefetch_bytes_used: of the used ones, what had come when they were needed.
        prefetch_bytes_wasted: of the wasted ones; part of ``bytes_fetched``.
        stall_s: seconds for which runs waited for experts on their way.
        uses: (experts) int64, runs that needed each expert.
        slot_of_expert: (experts) int32, the slot in which each lies now, -1: in none.
        id: the layer's number in the library, never given twice in a process.
    """

    name: str
    where: str
    weight_file: str
    weight_prefix: str
    experts: int
    slots: int | None = None
    slot_bytes: int | None = None
    runs: int | None = None
    tokens: int | None = None
    hits: int | None = None
    misses: int | None = None
    evictions: int | None = None
    bytes_fetched: int | None = None
    prefetches_used: int | None = None
    prefetches_wasted: int | None = None
    prefetch_bytes_used: int | None = None
    prefetch_bytes_wasted: int | None = None
    stall_s: float | None = None
    uses: np.ndarray[Any, np.dtype[np.int64]] | None = None
    slot_of_expert: np.ndarray[Any, np.dtype[np.int32]] | None = None
    id: int | None = None

    @property
    def hit_rate(self) -> float | None:
        """Hits over experts needed; None before the first, or where they are not counted."""
        if self.hits is None or self.misses is None or not self.hits + self.misses:
            return None
        return self.hits / (self.hits + self.misses)

    @property
    def resident(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """(experts) whether each lies in a slot now."""
        return None if self.slot_of_expert is None else self.slot_of_expert >= 0

    def to_dict(self) -> dict[str, Any]:
        """For machines: lists instead of arrays."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
