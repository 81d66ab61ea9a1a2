"""Peak memory of a process without the page cache: anonymous and shared pages, as Linux counts them."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

STATUS = Path("/proc/self/status")
COUNTED = ("RssAnon:", "RssShmem:")  # RssFile is memory of mapped files, which the kernel can drop
INTERVAL = 0.02  # seconds


def own_bytes(status: Path = STATUS) -> int | None:
    """None where the system has no such file."""
    try:
        rows = [line.split() for line in status.read_text().splitlines()]
    except OSError:
        return None
    return sum(int(row[1]) * 1024 for row in rows if row and row[0] in COUNTED)


class HostPeak:
    """A context manager that samples `own_bytes`. `peak_bytes` is the largest sample so far."""

    def __init__(self) -> None:
        self.peak_bytes = own_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.peak_bytes is not None and not self._done.wait(INTERVAL):
            self.peak_bytes = max(self.peak_bytes, own_bytes() or 0)
