"""The JSON file: whole after every point, so that a run that is cut off keeps what it has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moe_bench.cases import TARGET_CARD, TARGET_DENSE, TARGET_MS, TARGET_READ, TRITON_MS
from moe_bench.floor import Rates
from moe_bench.report import judge_point, summarise

_KEY = ("case", "dtype", "tokens", "routing")


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
        self._path = path
        self.data: dict[str, Any] = {
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
            "runs": [],
            "points": [],
            "summary": [],
        }
        if append and path.exists():
            old = json.loads(path.read_text())
            if not isinstance(old, dict) or not {"runs", "points"} <= set(old):
                raise ValueError(f"{path} has no runs and points; move it away or drop --append")
            self.data["runs"], self.data["points"] = old["runs"], old["points"]
        self._run = len(self.data["runs"])
        self.data["runs"].append({**machine, "layers": [], "failures": []})

    @property
    def failed(self) -> bool:
        """A MoELayer of this run gave a wrong result, or a layer could not be set up at all."""
        return bool(self.data["runs"][self._run]["failures"]) or any(
            contender.get("wrong") and contender.get("ours")
            for point in self.data["points"]
            if point["run"] == self._run
            for contender in point["contenders"].values()
        )

    def add(self, point: dict[str, Any]) -> None:
        """Adds a point in the place of an older one, and writes the file."""
        point = {**point, "run": self._run}
        point["verdicts"] = judge_point(point, self.data["runs"][self._run]["card"])
        key = [point[name] for name in _KEY]
        kept = [p for p in self.data["points"] if [p[name] for name in _KEY] != key]
        self.data["points"] = [*kept, point]
        self._write()

    def add_failure(self, case: str, dtype: str, reason: str) -> None:
        """A layer's measurements ended early."""
        failure = {"case": case, "dtype": dtype, "reason": reason}
        self.data["runs"][self._run]["failures"].append(failure)
        self._write()

    def add_state(
        self, case: str, dtype: str, before: dict[str, str], after: dict[str, str], rates: Rates
    ) -> None:
        """Adds clocks and rates of a layer's measurements."""
        layer = {"case": case, "dtype": dtype, "before": before, "after": after}
        layer["read_bytes_a_second"] = rates.read
        layer["dense_operations_a_second"] = rates.dense[dtype]
        layer["sustained_operations_a_second"] = rates.sustained.get(dtype)
        self.data["runs"][self._run]["layers"].append(layer)
        self._write()

    def _write(self) -> None:
        self.data["summary"] = summarise(self.data["points"])
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self._path)
