"""Waits of tests for what another thread does. One that takes too long fails."""

import threading
import time
from collections.abc import Callable

SOON = 20  # seconds after which a test that waits has failed


def waited(event: threading.Event) -> None:
    assert event.wait(SOON), "it never came"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)
