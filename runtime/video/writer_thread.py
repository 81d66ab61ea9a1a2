"""A thread that uses items while its caller makes the next ones: pictures are encoded while a GPU decodes.

    with Beside(use, room=16) as beside:  # use(items: Iterator) runs in the thread
        for item in make():
            beside.put(item)

Each item is used once, in order. At the end of the block all items have been used, or the thread's exception
is raised.
"""

import time
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class _End:
    pass


class Beside(Generic[Item]):
    """`use` gets an iterator over the items. At most `room` items wait for it."""

    def __init__(self, use: Callable[[Iterator[Item]], object], room: int) -> None:
        self.busy_seconds = 0.0  # the thread's time without its waits for items
        self._use = use
        self._waiting: Queue[Item | _End] = Queue(room)
        self._error: BaseException | None = None
        self._dropping = self._ended = False
        self.has_dropped = False  # whether an item was not used
        # A daemon: what is left open when Python ends does not keep it.
        self._thread = Thread(target=self._run, name="beside", daemon=True)

    @property
    def is_over(self) -> bool:
        """Whether the thread has used all items, or failed and dropped the rest."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """For use without `with`: then call `end`, `join` and `check`."""
        self._thread.start()

    def put(self, item: Item) -> None:
        """Waits for room. Raises the thread's exception."""
        self.check()
        self._waiting.put(item)

    def check(self) -> None:
        """Raises the thread's exception, for callers that take long to make an item."""
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """No more items come."""
        self._waiting.put(_End())

    def join(self) -> None:
        """Waits until the thread is over. Call after `end`."""
        self._thread.join()

    def drop(self) -> None:
        """Items that wait are not used."""
        self._dropping = True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remaining items are used, after an error too. An interrupt drops them, also during this wait."""
        if isinstance(error, KeyboardInterrupt):
            self.drop()
        try:
            self.end()
            self.join()
        except BaseException:
            self.drop()
            self.end()
            self.join()
            raise
        if error is None:
            self.check()

    def _run(self) -> None:
        try:
            self._use(self._items())
        except BaseException as error:
            self._error = error
        while not self._ended:  # so that put() never waits for ever
            self._get()

    def _items(self) -> Iterator[Item]:
        while not isinstance(item := self._get(), _End):
            if self._dropping:
                self.has_dropped = True
                return
            since = time.perf_counter()
            yield item
            self.busy_seconds += time.perf_counter() - since
            del item

    def _get(self) -> Item | _End:
        item = self._waiting.get()
        self._ended = isinstance(item, _End)
        return item
