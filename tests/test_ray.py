"""Workers that come and go: those of a Ray cluster (trt_wan/serve/ray_workers.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_base import Base
from serving import Server, ok
from test_dispatch import wait_for

from trt_wan import __version__
from trt_wan.errors import OutputError, UsageError
from trt_wan.serve.settings import ServeSettings

KINDS = [(seed, steps) for steps in (1, 2) for seed in (0, 1)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes of one CPU each."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15, on a machine that is busy with other tests
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


@pytest.mark.long
def test_every_node_must_see_the_data(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_wan.serve import ray_workers

    for seen, fault in (((__version__, None), "does not see"), (("0.0", None), "has trt-wan 0.0, not")):
        monkeypatch.setattr(ray_workers, "_seen", lambda path, seen=seen: seen)
        try:
            with pytest.raises(OutputError, match=fault):
                ray_workers.Cluster(cluster.address, ServeSettings(tmp_path))
        finally:
            ray_workers.ray.shutdown()
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from trt_wan.serve.ray_workers import Cluster

    for address, text in (
        ("ray://10.0.0.1:10001", "address of Ray Client"),
        ("127.0.0.1:1", "No Ray cluster"),
    ):
        with pytest.raises(UsageError, match=text):
            Cluster(address, ServeSettings(tmp_path))


def states(server: Server, status: str) -> list[str]:
    videos = ok(server.client.get("/v1/videos?limit=100"))["data"]
    return [video["id"] for video in videos if video["status"] == status]


def deaths(server: Server) -> float:
    told = server.client.get("/metrics").text.partition("\ntrt_wan_worker_deaths_total ")[2]
    return float(told.split()[0])
