"""The seconds that a whole measurement may take. Work that they end, or that does not fit, is "not measured"
with the reason, and all rows before it are kept.
"""

import math
import time
from collections.abc import Callable

PATIENCE = 900.0  # seconds for one answer of a process: compiling a 14B takes minutes


class Budget:
    """None is no limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.now, self._seconds = clock, math.inf if seconds is None else seconds
        self._until = clock() + self._seconds

    @property
    def left(self) -> float:
        """Seconds, 0 in the end."""
        return max(self._until - self.now(), 0.0)

    @property
    def over(self) -> str:
        """The reason for work that is not measured; empty while seconds are left."""
        return "" if self.left else f"the budget of {self._seconds:.0f} s was over"

    def too_short(self, needed: float, what: str) -> str:
        """The reason not to begin work that takes `needed` seconds, or an empty text."""
        if needed > self.left:
            tenths = math.ceil(needed * 10), math.floor(self.left * 10)  # never equal
            return f"{what} takes {tenths[0] / 10} s, {tenths[1] / 10} s are left"
        return self.over

    def patience(self, least: float = 1.0) -> float:
        """Seconds to wait for an answer of a process."""
        return min(PATIENCE, max(self.left, least))
