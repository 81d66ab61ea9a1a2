"""`trt-wan serve --ray ADDRESS`: one actor per GPU of a Ray cluster, each with one worker.

Where no node of the cluster has a GPU, every node gets one actor. Nodes that join later get theirs, and a
node that leaves loses them; the dispatcher gives its job to another one. Jobs travel as command lines, so
that all nodes must see the server's data folder under the same path. An actor dies with its server.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import trt_wan
from trt_wan.engines.store.home import home
from trt_wan.errors import OutputError, TrtWanError, UsageError, shown, with_commands
from trt_wan.runtime.closing import Closing
from trt_wan.serve.settings import ServeSettings
from trt_wan.worker.worker import Line, Runs, Worker, WorkerDied

EVERY = 2.0  # seconds between two looks at the cluster
PATIENCE = 60.0  # seconds for a node to look at the data folder
Slot = tuple[str, int]  # the id of a node, and the number of its actor
log = logging.getLogger("trt_wan.serve")


class WorkerLost(WorkerDied):
    """The actor died, or its node."""

    def __init__(self, address: str) -> None:
        TrtWanError.__init__(self, f"The worker on {address} was lost.", "The log of Ray there may say more.")


class Actor:
    """In a process of Ray, whose GPU the worker's process inherits: that may crash, and the actor stays."""

    def __init__(self, folder: str) -> None:
        self._worker = Worker({"TRT_WAN_HOME": folder})

    def run(self, id: str, arguments: Sequence[str]) -> Iterator[Line]:
        try:
            yield from self._worker.lines(id, arguments)
        except WorkerDied as death:
            yield {"died": death.returncode}

    def cancel(self, id: str) -> None:
        self._worker.cancel(id)

    def answer(self) -> None:
        pass


class RayWorker:
    """The server's side of an actor: `Runs` of worker.py."""

    def __init__(self, actor: Any, address: str) -> None:
        self._actor, self._address = actor, address
        self.starts, self.is_gone, self.is_known = 1, False, False
        self._answer = actor.answer.remote()

    def run(self, id: str, arguments: Sequence[str], on_event: Callable[[Line], None]) -> Line:
        try:
            for reference in self._actor.run.remote(id, list(arguments)):
                line: Line = ray.get(reference)
                if "died" in line:
                    self.starts += 1
                    raise WorkerDied(line["died"])
                if "schema" in line:
                    return line
                on_event(line)
        except RayError as error:
            log.warning("The worker on %s: %s", self._address, str(error).partition("\n")[0])
        self.is_gone = True
        raise WorkerLost(self._address)

    def cancel(self, id: str) -> None:
        self._actor.cancel.remote(id)

    def close(self) -> None:
        self.is_gone = True
        ray.kill(self._actor)

    def answers(self) -> bool:
        """Whether it has answered since the last look. Notices its death."""
        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        try:
            ray.get(self._answer)
        except RayError:
            self.is_gone = True
            return False
        self._answer = self._actor.answer.remote()
        return True


class Cluster(Closing):
    """`address` is that of Ray's head, or `auto`. Raises TrtWanError."""

    def __init__(self, address: str, settings: ServeSettings) -> None:
        _connect(address)
        self._data = settings.data
        self._workers: dict[Slot, RayWorker] = {}
        self._nodes: dict[str, bool] = {}  # whether they can be used
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        for node in _nodes():
            if (fault := self._fault_of(node)) is not None:
                raise OutputError(
                    f"{fault}.", "All nodes need the same trt-wan, and --data on a disk that they share."
                )
            self._nodes[node["NodeID"]] = True

    def start(self, add: Callable[[Runs], None], wake: Callable[[], None]) -> None:
        """`add` is told of each worker when it can run, `wake` when one of them is gone."""
        self._add, self._wake = add, wake
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        ray.shutdown()

    def _follow(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
            except Exception:
                log.exception("The Ray cluster cannot be looked at")
            self._closing.wait(EVERY)

    def _look(self) -> None:
        slots = self._slots()
        for slot, worker in list(self._workers.items()):
            if worker.answers() and not worker.is_known:
                worker.is_known = True
                self._add(worker)
            if slot not in slots or worker.is_gone:
                log.warning("The worker on %s is gone", worker._address)
                del self._workers[slot]
                worker.close()
                self._wake()
        for slot in slots.keys() - self._workers.keys():
            self._workers[slot] = self._started(slot[0], slots[slot])

    def _slots(self) -> dict[Slot, dict[str, Any]]:
        """The nodes that have room for actors, by slot."""
        nodes = _nodes()
        for node in nodes:
            if node["NodeID"] not in self._nodes:
                fault = self._fault_of(node)
                self._nodes[node["NodeID"]] = fault is None
                if fault is not None:
                    log.error("%s; the node gets no jobs", fault)
        return {
            (node["NodeID"], number): node
            for node in nodes
            if self._nodes[node["NodeID"]]
            for number in range(int(node["Resources"].get("GPU", 0)) or (not _have_gpus(nodes)))
        }

    def _started(self, id: str, node: dict[str, Any]) -> RayWorker:
        kind = "num_gpus" if "GPU" in node["Resources"] else "num_cpus"
        actor = ray.remote(Actor).options(
            **{kind: 1}, max_concurrency=4, scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False)
        )
        return RayWorker(actor.remote(str(home())), node["NodeManagerAddress"])

    def _fault_of(self, node: dict[str, Any]) -> str | None:
        """Why a node cannot take jobs."""
        probe, word = self._data / f"probe-{secrets.token_hex(8)}", secrets.token_hex(8)
        self._data.mkdir(parents=True, exist_ok=True)
        probe.write_text(word)
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            look = ray.remote(_seen).options(num_cpus=0, scheduling_strategy=here)
            version, text = ray.get(look.remote(str(probe)), timeout=PATIENCE)
        except RayError as error:
            why = str(error).strip().rpartition("\n")[2]
            return f"The node {node['NodeManagerAddress']} cannot run trt-wan: {shown(why)}"
        finally:
            probe.unlink()
        if version != trt_wan.__version__:
            return f"The node {node['NodeManagerAddress']} has trt-wan {version}, not {trt_wan.__version__}"
        return None if text == word else f"The node {node['NodeManagerAddress']} does not see {self._data}"


def _seen(path: str) -> tuple[str, str | None]:
    """The version of trt-wan and the text of a file, as a node sees it."""
    try:
        return trt_wan.__version__, Path(path).read_text()
    except OSError:
        return trt_wan.__version__, None


def _nodes() -> list[dict[str, Any]]:
    """Those that are alive and may get actors."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resource = "GPU" if _have_gpus(nodes) else "CPU"
    return [node for node in nodes if node["Resources"].get(resource, 0) >= 1]


def _have_gpus(nodes: Sequence[dict[str, Any]]) -> bool:
    return any("GPU" in node["Resources"] for node in nodes)


def _connect(address: str) -> None:
    """Raises UsageError."""
    if "://" in address:
        raise UsageError(
            f"{shown(address)} is an address of Ray Client, over which no actor can be followed.",
            "Start the server on a node of the cluster, with the head's address, such as 10.0.0.1:6379.",
        )
    if address != "auto":
        _require_listener(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that starts here
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(None if address == "auto" else address, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise _no_cluster(address, str(error).partition("\n")[0][:200]) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _require_listener(address: str) -> None:
    """Raises UsageError. Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, why: str) -> UsageError:
    return UsageError(
        f"No Ray cluster can be joined at {shown(address)}: {why}",
        with_commands("Start one on its first machine:", "ray start --head --port 6379"),
    )
