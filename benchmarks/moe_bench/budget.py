"""Time for all points together."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_FOR_A_POINT = 40.0
FEWEST_FOR_A_POINT = 1.0


class Budget:
    """Shares seconds out among points: little time means fewer repetitions, never fewer checks.

    Args:
        seconds: for all.
        points: that are planned.
        clock: seconds.
    """

    def __init__(
        self, seconds: float, points: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock, self._begin = clock, clock()
        self._seconds = seconds
        self.left = points
        """Points that have not begun."""

    @property
    def used(self) -> float:
        """Seconds so far."""
        return self._clock() - self._begin

    @property
    def spent(self) -> bool:
        """No further point may begin."""
        return self.used >= self._seconds

    def share(self) -> float:
        """Seconds for the samples of the next point; half of what is left goes into set-up."""
        remaining = max(0.0, self._seconds - self.used)
        share = 0.5 * remaining / max(1, self.left)
        self.left -= 1
        return min(MOST_FOR_A_POINT, max(FEWEST_FOR_A_POINT, share))
