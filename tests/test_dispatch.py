"""The dispatcher with workers that are made up: lost ones, and jobs that were finished before."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_job import FRAMES, write_clip, write_reference

from trt_wan.serve.database import Job, Kind
from trt_wan.serve.dispatch import PAUSE, Dispatcher
from trt_wan.serve.live import Live
from trt_wan.serve.metrics import Metrics
from trt_wan.serve.service import Service
from trt_wan.serve.settings import Limits, ServeSettings
from trt_wan.serve.store import Store
from trt_wan.worker.worker import Line, WorkerDied

REQUEST = {
    **dict.fromkeys(("files", "redo", "loras"), []),
    **dict.fromkeys(("options", "facts", "names"), {}),
    **dict.fromkeys(("source", "preparation")),
    "inputs": True,
    "uploaded": True,
}


class Hand:
    """A worker that takes a job, keeps it until it is told to go on, and ends it with an error."""

    def __init__(self, ends: str = "interrupted") -> None:
        self.ends, self.starts, self.is_gone = ends, 1, False
        self.has_job, self.goes_on = threading.Event(), threading.Event()

    def run(self, id: str, arguments: Sequence[str], on_event: Callable[[Line], None]) -> Line:
        self.has_job.set()
        assert self.goes_on.wait(10)
        if self.is_gone:
            raise WorkerDied(-9)
        return {"ok": False, "error": {"code": self.ends, "message": "", "hint": ""}}

    def cancel(self, id: str) -> None:
        self.goes_on.set()

    def close(self) -> None:
        self.goes_on.set()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, Limits()) as store:
        yield store


def dispatcher_of(store: Store, worker: Hand) -> Dispatcher:
    settings = ServeSettings(store.data, warm_up=False)
    return Dispatcher(store, Live(), Metrics(lambda: 0, lambda: 0, lambda: 0), settings, [worker])


def queued(store: Store, kind: Kind, files: Sequence[str] = ()) -> Path:
    """The folder of a job that waits."""
    store.database.add_job("job_1", kind, REQUEST | {"files": list(files)}, 9)
    folder = store.jobs / "job_1"
    folder.mkdir()
    return folder


def ended(store: Store) -> Job:
    wait_for(lambda: job_of(store).has_ended)
    return job_of(store)


def job_of(store: Store) -> Job:
    job = store.database.job("job_1")
    assert job is not None
    return job


def test_a_job_of_a_lost_worker_goes_to_another_one(store: Store) -> None:
    queued(store, "video")
    lost, other = Hand(), Hand()
    dispatcher = dispatcher_of(store, lost)
    assert dispatcher.state == "starting"
    dispatcher.start()
    assert lost.has_job.wait(10)
    dispatcher.add(other)
    lost.is_gone = True
    lost.goes_on.set()
    assert other.has_job.wait(10)
    time.sleep(1.5 * PAUSE)  # the thread of the lost worker ends
    assert (dispatcher.starts, dispatcher.state) == (2, "busy")
    job = job_of(store)
    assert (job.status, job.attempts) == ("in_progress", 1)
    dispatcher.cancel(job)
    assert ended(store).status == "cancelled"
    dispatcher.close()


def test_a_job_that_a_lost_worker_finished_is_completed(store: Store) -> None:
    """The next worker waits for its lock, and then finds the video."""
    folder, worker = queued(store, "video"), Hand("output")
    dispatcher = dispatcher_of(store, worker)
    dispatcher.start()
    assert worker.has_job.wait(10)
    write_clip(folder / "out.mp4")
    worker.goes_on.set()
    job = ended(store)
    assert (job.status, job.result["frames"]) == ("completed", FRAMES)
    dispatcher.close()


@pytest.mark.parametrize("whole", [False, True])
def test_clips_without_their_picture_are_made_again(store: Store, whole: bool) -> None:
    """The server was killed while a preparation gave its files their names; the picture gets it last."""
    folder, worker = queued(store, "preparation", ["reference.png", "clip.mp4"]), Hand("input")
    clips = folder / "prepared"
    clips.mkdir()
    write_clip(clips / "src_pose.mp4")
    if whole:
        write_reference(clips / "src_ref.png")
    worker.goes_on.set()
    dispatcher = dispatcher_of(store, worker)
    dispatcher.start()
    assert ended(store).status == ("completed" if whole else "failed")
    assert (worker.has_job.is_set(), clips.exists()) == (not whole, whole)
    dispatcher.close()


def wait_for(is_so: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_that_ends_while_it_is_shown_goes_on_from_its_progress(store: Store) -> None:
    """Its row is read, it ends, and its progress is gone: an event said 0 behind 50."""
    store.database.add_job("job_1", "preparation", REQUEST | {"uploads": []}, 9)
    before = store.database.take_next()
    assert before is not None and before.status == "in_progress"
    store.database.change("job_1", status="completed", completed_at=time.time(), result={})
    service: Any = SimpleNamespace(live=Live(), store=store, settings=ServeSettings(store.data))
    shown = Service.shown(service, before)
    assert shown["status"] == "completed" and shown["progress"] == 100
