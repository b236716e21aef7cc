"""Files that several pytest workers make and use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "MOE_INFER_TEST_FOLDER"
"""The variable that names the folder of this run, for all of its workers (conftest.py makes it)."""


def folder() -> Path:
    return Path(os.environ[FOLDER])


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process is in here with the same path; a process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
