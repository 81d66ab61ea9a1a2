"""The time of each part of a preprocessing, by the observer that `preprocess` calls around its parts.

A part counts the time spent in it but not in a part inside it. Parts run on the thread that makes the folder
or beside it. Only the first kind adds up to a run's time.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PartClock:
    """Create it on the thread that makes the folder."""

    def __init__(self) -> None:
        self._own: dict[str, float] = defaultdict(float)
        self._beside: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._running = threading.local()
        self._thread = threading.get_ident()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        stack: list[list[Any]] = self._running.__dict__.setdefault("stack", [])
        start = time.perf_counter()
        stack.append([name, 0.0])
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            _, within = stack.pop()
            if stack:
                stack[-1][1] += whole
            with self._lock:
                here = threading.get_ident() == self._thread
                (self._own if here else self._beside)[name] += whole - within

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns seconds by part since the last call, on the watched thread and beside it."""
        with self._lock:
            found = dict(self._own), dict(self._beside)
            self._own.clear()
            self._beside.clear()
        return found
