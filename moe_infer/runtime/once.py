"""What is said once in a process."""

from __future__ import annotations

import threading


class Once:
    """Tells who comes first, among all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False

    def first(self) -> bool:
        """True the first time."""
        with self._lock:
            first, self._over = not self._over, True
            return first
