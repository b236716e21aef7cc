"""The file of the resident layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_bench.cases import TARGET_CARD, TARGET_DENSE, TARGET_MS, TARGET_READ, TRITON_MS
from moe_bench.floor import Rates
from moe_bench.record_file import RecordFile
from moe_bench.report import judge_point, summarise

_KEY = ("case", "dtype", "tokens", "routing")
_HEAD = {
    "benchmark": "an MoE layer with all experts in GPU memory",
    "unit": "milliseconds for one run of the layer, router logits given",
    "targets": {
        "card": TARGET_CARD,
        "read_bytes_a_second": TARGET_READ,
        "dense_operations_a_second": TARGET_DENSE,
        "milliseconds": TARGET_MS,
        "vllm_triton_milliseconds": TRITON_MS,
        "on_another_card": "time / floor <= target / floor on the card of the targets",
    },
}


class Record:
    """Points of this run, and with ``append`` those of earlier runs that it does not measure anew.

    Args:
        path: the file.
        machine: what ``machine.describe`` gives; each point names its run by number.
        append: keep what the file holds.

    Raises:
        ValueError: the file to append to is not one of ours.
    """

    def __init__(self, path: Path, machine: dict[str, Any], append: bool) -> None:
        started = {**machine, "layers": []}
        self._file = RecordFile(path, _HEAD, started, append, _KEY, summarise)

    @property
    def data(self) -> dict[str, Any]:
        """As the file has it."""
        return self._file.data

    @property
    def failed(self) -> bool:
        """A MoELayer of this run gave a wrong result, or a layer could not be set up at all."""
        return bool(self._file.run["failures"]) or any(
            contender.get("wrong") and contender.get("ours")
            for point in self._file.points
            for contender in point["contenders"].values()
        )

    def add(self, point: dict[str, Any]) -> None:
        """Adds a point in the place of an older one, and writes the file."""
        self._file.add({**point, "verdicts": judge_point(point, self._file.run["card"])})

    def add_failure(self, case: str, dtype: str, reason: str) -> None:
        """A layer's measurements ended early."""
        self._file.add_failure(case=case, dtype=dtype, reason=reason)

    def add_state(
        self, case: str, dtype: str, before: dict[str, str], after: dict[str, str], rates: Rates
    ) -> None:
        """Adds clocks and rates of a layer's measurements."""
        layer = {"case": case, "dtype": dtype, "before": before, "after": after}
        layer["read_bytes_a_second"] = rates.read
        layer["dense_operations_a_second"] = rates.dense[dtype]
        layer["sustained_operations_a_second"] = rates.sustained.get(dtype)
        self._file.run["layers"].append(layer)
        self._file.write()
