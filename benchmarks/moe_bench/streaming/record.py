"""The file of the streaming layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_bench.record_file import RecordFile
from moe_bench.streaming.claims import summarise
from moe_bench.streaming.shapes import INFMOE_MS

_KEY = ("part", "dtype", "tokens", "slots", "routing", "state", "mode", "recall", "pause_us")
_HEAD = {
    "benchmark": "MoE layers whose experts do not all fit in GPU memory",
    "unit": "milliseconds for one run of all layers of a point, router logits given",
    "infmoe_milliseconds": INFMOE_MS,
}


def open_record(path: Path, machine: dict[str, Any], append: bool) -> RecordFile:
    """The file; see RecordFile."""
    return RecordFile(path, _HEAD, {**machine, "bus": []}, append, _KEY, summarise)


def failed(record: RecordFile) -> bool:
    """One of our layers gave a wrong result, or a part could not be measured at all."""
    return bool(record.run["failures"]) or any(
        point.get("wrong") and point["state"] != "peer" for point in record.points
    )
