"""Loads the real server, kills it and its worker at random moments, and checks that no job is lost or wrong.

    python tests/serve_load.py load --jobs 200 --clients 20
    python tests/serve_load.py server-kills --kills 50
    python tests/serve_load.py worker-kills --kills 50

By hand (PATIENCE=600 on a busy machine). Jobs are videos of two windows of the tiny model; every one must
equal the video of `trt-wan run` byte for byte. Exits with 1 for a fault.
"""

import argparse
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from statistics import median

import httpx
import psutil
from serve_base import PATIENCE, WORKER, Base, children, resident, verdict
from serving import Server, ok
from tiny_job import FRAMES, read_frames

KINDS = [(seed, steps) for steps in (1, 2) for seed in (0, 1)]  # of jobs: a seed and a number of steps
WAITING = 8  # jobs that are kept in the queue while processes are killed
GROWTH = {"server": 15.0, "worker": 60.0}  # MB, from the second tenth of the time to the last
Orders = dict[str, tuple[int, int]]  # the kind of a job by its id


def load(base: Base, folder: Path, jobs: int, clients: int) -> list[str]:
    orders: Orders = {}
    faults: list[str] = []
    memory: dict[str, list[float]] = {"server": [], "worker": []}

    def client(server: Server, number: int) -> None:
        mine = []
        for count in range(number, jobs, clients):
            try:
                mine.append(order(server, file, orders, KINDS[count % len(KINDS)]))
            except (httpx.HTTPError, AssertionError) as error:
                faults.append(f"order {count}: {error}")
        for id in mine:
            server.ended({"object": "video", "id": id}, PATIENCE * jobs)

    with base.serving(folder / "data") as server:
        file = server.upload(base.clips)["id"]
        threads = [threading.Thread(target=client, args=(server, number)) for number in range(clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        processes = {"server": psutil.Process(server.process.pid)}
        while any(thread.is_alive() for thread in threads):
            processes.update(("worker", worker) for worker in children(server, WORKER))
            for name, process in processes.items():
                memory[name].append(resident(process))
            time.sleep(0.5)
        seconds = time.monotonic() - began
        faults += finished(base, server, orders)
    for name, figures in memory.items():
        tenth = len(figures) // 10 + 1
        first, last = median(figures[tenth : 2 * tenth] or figures), median(figures[-tenth:])
        print(
            f"{name}: {first:.0f} MB after a tenth, {last:.0f} MB at the end, at most {max(figures):.0f} MB"
        )
        if last > first + GROWTH[name]:
            faults.append(f"the {name} grew from {first:.0f} to {last:.0f} MB")
    print(f"{len(orders)} jobs of {clients} clients, {seconds / jobs:.2f} s per job")
    return faults + whole(folder / "data", orders)


def server_kills(base: Base, folder: Path, kills: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    data = folder / "data"
    with base.serving(data) as server:
        file = server.upload(base.clips)["id"]
    orders: Orders = {}
    faults: list[str] = []
    half: set[str] = set()
    went_on: set[str] = set()
    for number in range(kills + 1):
        with base.serving(data) as server:
            told = states(server, orders)
            if left := sorted(path.name for path in (data / "incoming").iterdir()):
                told.append(f"left in incoming/: {left}")
            went_on |= {id for id in halves(data) if goes_on(server, id)}
            if number == kills:
                faults += [*told, *finished(base, server, orders)]
                break
            calm = threading.Event()
            clients = [
                threading.Thread(target=order_on, args=(server, file, orders, calm)),
                threading.Thread(target=upload_on, args=(server, base, calm)),
            ]
            for client in clients:
                client.start()
            pass_a_moment(server, chance)
            processes = children(server)
            server.process.kill()
            calm.set()
            for client in clients:
                client.join()
            _, alive = psutil.wait_procs(processes, PATIENCE)
        told += [f"{process} outlives its server" for process in alive]
        told += whole(data, orders)
        half |= set(halves(data))
        faults += [f"kill {number}: {fault}" for fault in told]
        print(f"kill {number}: {len(orders)} jobs, {len(half)} half done, {len(faults)} faults", flush=True)
    print(f"{len(half)} jobs had their first window alone; of {len(went_on)} the next step was of the second")
    if half and not went_on:
        faults.append("no job went on after its first window")
    return faults + whole(data, orders)


def worker_kills(base: Base, folder: Path, kills: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    orders: Orders = {}
    calm = threading.Event()
    done = 0
    with base.serving(folder / "data") as server:
        file = server.upload(base.clips)["id"]
        client = threading.Thread(target=order_on, args=(server, file, orders, calm))
        client.start()
        while done < kills:
            pass_a_moment(server, chance)
            # Three deaths in a row without a new window are the job's fault, and it fails.
            with closing(sqlite3.connect(f"file:{server.data}/server.sqlite3?mode=ro", uri=True)) as database:
                query = "SELECT attempts FROM jobs WHERE status IN ('queued', 'in_progress')"
                if any(attempts > 1 for (attempts,) in database.execute(query)):
                    continue
            for worker in children(server, WORKER):
                with suppress(psutil.Error):
                    worker.kill()
                    done += 1
        calm.set()
        client.join()
        faults = finished(base, server, orders)
        told = server.client.get("/metrics").text.partition("\ntrt_wan_worker_deaths_total ")[2]
    print(f"{done} workers killed, {float(told.split()[0]):.0f} in the middle of one of {len(orders)} jobs")
    return faults + whole(folder / "data", orders)


def pass_a_moment(server: Server, chance: random.Random) -> None:
    """A part of them falls into the start and into the opening of the model, most into the work."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 3))
        return
    seconds = None
    while seconds is None:
        for video in ok(server.client.get("/v1/videos?limit=100"))["data"]:
            if video["status"] == "in_progress" and video["step"]:
                seconds = video["seconds_per_step"]
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 15 * seconds))


def order(server: Server, file: str, orders: Orders, kind: tuple[int, int]) -> str:
    seed, steps = kind
    id = str(server.video(control_reference=file, seed=seed, num_inference_steps=steps)["id"])
    orders[id] = kind
    return id


def order_on(server: Server, file: str, orders: Orders, calm: threading.Event) -> None:
    """Keeps jobs waiting until `calm`, or until the server has gone."""
    count = len(orders)
    with suppress(httpx.TransportError):
        while not calm.is_set():
            if ok(server.client.get("/health"))["waiting"] < WAITING:
                order(server, file, orders, KINDS[count % len(KINDS)])
                count += 1
            else:
                calm.wait(0.1)


def upload_on(server: Server, base: Base, calm: threading.Event) -> None:
    with suppress(httpx.TransportError):
        while not calm.is_set():
            server.upload(base.clips)
            calm.wait(0.5)


def halves(data: Path) -> list[str]:
    """The jobs with a finished window and no video."""
    from trt_wan.runtime.kept.windows import finished_part

    jobs = [job for job in (data / "jobs").iterdir() if not (job / "out.mp4").exists()]
    return [job.name for job in jobs if finished_part(job / "out.mp4") is not None]


def whole(data: Path, orders: Orders) -> list[str]:
    """Faults of the files of a server that has ended."""
    faults = []
    with tempfile.TemporaryDirectory() as copy:
        for path in data.glob("server.sqlite3*"):
            shutil.copy(path, copy)
        with closing(sqlite3.connect(f"{copy}/server.sqlite3")) as database:
            if (found := database.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
                faults.append(f"the database: {found}")
            rows = {id for (id,) in database.execute("SELECT id FROM jobs")}
    faults += [f"{id} is not in the database" for id in orders.keys() - rows]
    for video in data.glob("jobs/*/out.mp4"):
        try:
            if (frames := len(read_frames(video))) != FRAMES:
                faults.append(f"{video}: {frames} frames")
        except Exception as error:
            faults.append(f"{video}: {error}")
    return faults


def states(server: Server, orders: Orders) -> list[str]:
    """Faults of the jobs after a start: those that ended came first, and none failed."""
    found = {id: ok(server.client.get(f"/v1/videos/{id}"))["status"] for id in orders}
    right = ("queued", "in_progress", "completed")
    faults = [f"{id} is {state}" for id, state in found.items() if state not in right]
    ended = [state == "completed" for state in found.values()]
    if sorted(ended, reverse=True) != ended:
        faults.append(f"jobs do not end in their order: {[*found.values()]}")
    return faults


def goes_on(server: Server, id: str) -> bool:
    """Whether the first step of the job that is seen belongs to the second window."""
    seen = server.until(
        {"object": "video", "id": id}, lambda now: now["step"] or now["status"] == "completed", PATIENCE
    )
    return bool(seen["status"] == "in_progress" and seen["window"] == 2)


def finished(base: Base, server: Server, orders: Orders) -> list[str]:
    """Waits for all jobs. Faults of those that are not completed, or differ from a single run."""
    faults = []
    for id, kind in orders.items():
        video = server.ended({"object": "video", "id": id}, PATIENCE * 10)
        if video["status"] != "completed":
            faults.append(f"{id} is {video['status']}: {video['error']}")
        elif server.content(video) != base.single(*kind):
            faults.append(f"{id} differs from trt-wan run with seed and steps {kind}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("load", "server-kills", "worker-kills"))
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("serve-load"))
    given = parser.parse_args()
    base = Base.made(given.folder / "base")
    folder = Path(tempfile.mkdtemp(dir=given.folder.absolute(), prefix=f"{given.what}-"))
    if given.what == "load":
        return verdict(load(base, folder, given.jobs, given.clients))
    kill = server_kills if given.what == "server-kills" else worker_kills
    return verdict(kill(base, folder, given.kills, given.seed))


if __name__ == "__main__":
    sys.exit(main())
