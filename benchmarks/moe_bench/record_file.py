"""A JSON file of runs and points: whole after every point, so that a run that is cut off keeps what
it has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class RecordFile:
    """Points of this run, and with ``append`` those of earlier runs that it does not measure anew.

    Args:
        path: the file.
        head: what stands in it before the runs.
        machine: what ``machine.describe`` gives; each point names its run by number.
        append: keep what the file holds.
        key: fields that say what a point is about.
        summarise: what follows from all points.

    Attributes:
        data: as the file has it.

    Raises:
        ValueError: the file to append to is not one of ours.
    """

    def __init__(
        self,
        path: Path,
        head: dict[str, Any],
        machine: dict[str, Any],
        append: bool,
        key: Sequence[str],
        summarise: Callable[[list[dict[str, Any]]], Any],
    ) -> None:
        self._path, self._key, self._summarise = path, key, summarise
        self.data: dict[str, Any] = {**head, "runs": [], "points": [], "summary": []}
        if append and path.exists():
            old = json.loads(path.read_text())
            if not isinstance(old, dict) or not {"runs", "points"} <= set(old):
                raise ValueError(f"{path} has no runs and points; move it away or drop --append")
            self.data["runs"], self.data["points"] = old["runs"], old["points"]
        self._run = len(self.data["runs"])
        self.data["runs"].append({**machine, "failures": []})

    @property
    def run(self) -> dict[str, Any]:
        """This run's entry."""
        entry: dict[str, Any] = self.data["runs"][self._run]
        return entry

    @property
    def points(self) -> list[dict[str, Any]]:
        """Those of this run."""
        return [point for point in self.data["points"] if point["run"] == self._run]

    def add(self, point: dict[str, Any]) -> None:
        """Adds a point, in the place of an older one if there is one, and writes the file."""
        point = {**point, "run": self._run}
        points, key = self.data["points"], self._about(point)
        same = [i for i, other in enumerate(points) if self._about(other) == key]
        if same:
            points[same[0]] = point
        else:
            points.append(point)
        self.write()

    def _about(self, point: dict[str, Any]) -> list[Any]:
        return [point.get(name) for name in self._key]

    def add_failure(self, **failure: Any) -> None:
        """Something could not be measured at all."""
        self.run["failures"].append(failure)
        self.write()

    def write(self) -> None:
        """Writes the file anew, in one step."""
        self.data["summary"] = self._summarise(self.data["points"])
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self._path)
