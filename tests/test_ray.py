"""Workers that come and go: those of a Ray cluster (trt_wan/serve/ray_workers.py)."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from serve_base import Base
from serving import Server, ok

from trt_wan.serve.dispatch import PAUSE, Dispatcher
from trt_wan.serve.live import Live
from trt_wan.serve.metrics import Metrics
from trt_wan.serve.settings import Limits, ServeSettings
from trt_wan.serve.store import Store
from trt_wan.worker.worker import Line, WorkerDied

KINDS = [(seed, steps) for steps in (1, 2) for seed in (0, 1)]


REQUEST = {
    **dict.fromkeys(("files", "redo", "loras"), []),
    **dict.fromkeys(("options", "facts", "names"), {}),
    **dict.fromkeys(("source", "preparation")),
    "inputs": True,
    "uploaded": True,
}


class Hand:
    """A worker that takes a job and keeps it until it is told to end."""

    def __init__(self) -> None:
        self.starts, self.is_gone = 1, False
        self.has_job, self.goes_on = threading.Event(), threading.Event()

    def run(self, id: str, arguments: Sequence[str], on_event: Callable[[Line], None]) -> Line:
        self.has_job.set()
        assert self.goes_on.wait(10)
        if self.is_gone:
            raise WorkerDied(-9)
        return {"ok": False, "error": {"code": "interrupted", "message": "", "hint": ""}}

    def cancel(self, id: str) -> None:
        self.goes_on.set()

    def close(self) -> None:
        self.goes_on.set()


def test_a_job_of_a_lost_worker_goes_to_another_one(tmp_path: Path) -> None:
    with Store(tmp_path, Limits()) as store:
        (store.jobs / "video_1").mkdir()
        store.database.add_job("video_1", "video", REQUEST, 9)
        live, metrics = Live(), Metrics(lambda: 0, lambda: 0, lambda: 0)
        lost, other = Hand(), Hand()
        dispatcher = Dispatcher(store, live, metrics, ServeSettings(tmp_path, warm_up=False), [lost])
        assert dispatcher.state == "starting"
        dispatcher.start()
        assert lost.has_job.wait(10)
        dispatcher.add(other)
        lost.is_gone = True
        lost.goes_on.set()
        assert other.has_job.wait(10)
        time.sleep(1.5 * PAUSE)  # the thread of the lost worker ends
        assert (dispatcher.starts, dispatcher.state) == (2, "busy")
        job = store.database.job("video_1")
        assert job is not None and (job.status, job.attempts) == ("in_progress", 1)
        dispatcher.cancel(job)
        wait_for(lambda: store.database.counts() == {("video", "cancelled"): 1}, 10)
        dispatcher.close()
        assert dispatcher._workers == [other]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes of one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.mark.long
def test_a_node_is_lost_and_another_one_joins(cluster: Any, tmp_path: Path, tiny_home: Path) -> None:
    base = Base.made(tmp_path / "base", tiny_home)
    with base.serving(tmp_path / "data", "--ray", cluster.address) as server:
        file = server.upload(base.clips)["id"]
        jobs = []
        for count in range(30):
            seed, steps = KINDS[count % len(KINDS)]
            jobs.append(server.video(control_reference=file, seed=seed, num_inference_steps=steps))
        wait_for(lambda: len(states(server, "in_progress")) == 3)
        wait_for(lambda: len(states(server, "completed")) >= 6)
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        wait_for(lambda: len(states(server, "completed")) >= 12)
        lost = deaths(server)
        cluster.add_node(num_cpus=1)
        wait_for(lambda: len(states(server, "in_progress")) == 3)
        for count, job in enumerate(jobs):
            video = server.ended(job, 600)
            assert video["status"] == "completed", video["error"]
            assert server.content(video) == base.single(*KINDS[count % len(KINDS)])
    assert lost == 1


def wait_for(is_so: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def states(server: Server, status: str) -> list[str]:
    videos = ok(server.client.get("/v1/videos?limit=100"))["data"]
    return [video["id"] for video in videos if video["status"] == status]


def deaths(server: Server) -> float:
    told = server.client.get("/metrics").text.partition("\ntrt_wan_worker_deaths_total ")[2]
    return float(told.split()[0])
