"""A thread beside its caller: order, overlap, room, and every way in which either of the two can fail."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from waits import SOON, until, waited

from trt_wan.runtime.video.writer_thread import Beside


def test_items_are_used_in_order_and_all_of_them() -> None:
    used: list[int] = []
    with Beside[int](used.extend, room=2) as beside:
        for k in range(1000):
            beside.put(k)
    assert used == list(range(1000))
    with Beside[int](used.extend, room=2):
        pass
    assert len(used) == 1000


def test_the_next_item_is_made_while_one_is_used() -> None:
    """Each waits for the other: one after the other, neither would come."""
    using, made = threading.Event(), threading.Event()

    def use(items: Iterator[int]) -> None:
        for _ in items:
            using.set()
            waited(made)

    with Beside[int](use, room=1) as beside:
        beside.put(0)
        waited(using)
        made.set()
        beside.put(1)
    assert beside.busy_seconds >= 0


def test_no_more_wait_than_there_is_room_for() -> None:
    go, put = threading.Event(), []

    def use(items: Iterator[int]) -> None:
        for _ in items:
            waited(go)

    def fill() -> None:
        with Beside[int](use, room=3) as beside:
            for k in range(10):
                beside.put(k)
                put.append(k)

    filler = threading.Thread(target=fill)
    filler.start()
    until(lambda: len(put) == 4)  # one in use, three that wait
    time.sleep(0.1)
    assert len(put) == 4
    go.set()
    filler.join(SOON)
    assert len(put) == 10


def fails_at(number: int) -> Callable[[Iterator[int]], None]:
    def use(items: Iterator[int]) -> None:
        for item in items:
            if item == number:
                raise ValueError(f"item {item}")

    return use


@pytest.mark.parametrize("count", [4, 100])
def test_what_the_thread_raises_is_raised_here(count: int) -> None:
    """Whether the last item was put before (4, room for all) or somebody waits for room (100)."""
    with pytest.raises(ValueError, match="item 3"), Beside[int](fails_at(3), room=4) as beside:
        for k in range(count):
            beside.put(k)


def test_a_failure_shows_without_another_item() -> None:
    def asked() -> bool:
        beside.check()
        return False

    with pytest.raises(ValueError, match="item 0"), Beside[int](fails_at(0), room=4) as beside:
        beside.put(0)
        until(asked)


def test_a_thread_that_stops_early_holds_nobody_up() -> None:
    with Beside[int](next, room=1) as beside:  # type: ignore[arg-type]
        for k in range(100):
            beside.put(k)


def test_what_was_put_before_an_error_is_used() -> None:
    used: list[int] = []
    go = threading.Event()

    def use(items: Iterator[int]) -> None:
        waited(go)
        used.extend(items)

    with pytest.raises(KeyError), Beside[int](use, room=5) as beside:
        for k in range(5):
            beside.put(k)
        go.set()
        raise KeyError
    assert used == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError), Beside[int](fails_at(0), room=5) as beside:
        beside.put(0)
        raise KeyError  # the first that went wrong is what is reported


def test_an_interrupt_while_it_waits_drops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    go = threading.Event()

    def use(items: Iterator[int]) -> None:
        for item in items:
            used.append(item)
            waited(go)

    beside = Beside[int](use, room=5)
    join = beside._thread.join

    def interrupted() -> None:
        monkeypatch.setattr(beside._thread, "join", join)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(beside._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), beside:
        for k in range(5):
            beside.put(k)
        until(lambda: used == [0])
    assert used == [0] and not beside._thread.is_alive()
