"""Takes jobs from the queue, one at a time per worker, and keeps their rows up to date.

A worker that dies leaves its job in the queue, in its old place, to go on after its last finished window. A
job in which workers die again and again without a new window fails.
"""

import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trt_wan.errors import TrtWanError
from trt_wan.preprocess.clips import artifacts
from trt_wan.serve.database import Job
from trt_wan.serve.live import Live, Progress
from trt_wan.serve.metrics import Metrics
from trt_wan.serve.orders import OUTPUT, PREPARED, command_of, told
from trt_wan.serve.settings import ServeSettings
from trt_wan.serve.store import Store
from trt_wan.worker.worker import Line, Runs, WorkerDied

MOST_DEATHS = 3  # workers that die in one job, without a finished window in between
MOST_NOTES = 50
NOT_RESUMED = ("usage", "output_unwritable")  # codes of errors after which --resume cannot work
PAUSE = 1.0  # seconds before another worker is started in place of one that died
log = logging.getLogger("trt_wan.serve")


class Dispatcher:
    def __init__(
        self, store: Store, live: Live, metrics: Metrics, settings: ServeSettings, workers: Sequence[Runs]
    ) -> None:
        self._store, self._live, self._metrics, self._settings = store, live, metrics, settings
        self._workers: list[Runs] = []
        self._running: dict[str, Runs] = {}
        self._deleted: set[str] = set()
        self._change = threading.Condition()
        self._closing = False
        self._warm: set[Runs] = set()
        self._first, self._threads = workers, list[threading.Thread]()
        self._starts = 0  # counts workers that are gone

    def start(self) -> None:
        for job in self._store.database.begin_again():
            if job.cancelling:
                self._end(job, "cancelled")
        for worker in self._first:
            self.add(worker)

    def add(self, worker: Runs) -> None:
        """Gives jobs to this worker, until it is gone."""
        with self._change:
            self._workers.append(worker)
            self._threads.append(
                threading.Thread(target=self._work, args=(len(self._threads), worker), daemon=True)
            )
            self._threads[-1].start()

    def close(self) -> None:
        """Jobs in progress go on when the server starts again."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join(timeout=10)

    @property
    def state(self) -> str:
        if not self._warm:
            return "starting"
        return "busy" if self._running else "ready"

    @property
    def starts(self) -> int:
        return self._starts + sum(worker.starts for worker in self._workers)

    def wake(self) -> None:
        """A job was added, or a worker is gone."""
        with self._change:
            self._change.notify_all()

    def cancel(self, job: Job) -> Job | None:
        """The job as it is now; None if it is gone."""
        database = self._store.database
        if (ended := database.end_queued(job.id)) is not None:
            self._metrics.ended.labels(job.kind, "cancelled").inc()
            self._live.tell(job.id)
            return ended
        with self._change:
            worker = self._running.get(job.id)
            now = database.job(job.id)
            if now is None or now.has_ended:
                return now
            now = database.change(job.id, cancelling=1)
        if worker is not None:
            worker.cancel(job.id)
        self._live.tell(job.id)
        return now

    def delete(self, job: Job) -> None:
        """Removes the job with its files, when it has ended."""
        with self._change:
            self._deleted.add(job.id)
        now = self.cancel(job)
        if now is not None and now.has_ended:
            self._forget(now)

    def _forget(self, job: Job) -> None:
        with self._change:
            self._deleted.discard(job.id)
        self._store.remove_job(job)
        self._live.tell(job.id)

    def _work(self, number: int, worker: Runs) -> None:
        if self._settings.warm_up:
            try:
                self._warm_up(number, worker)
            except Exception:
                if not self._closing:
                    log.exception("The warm-up failed")
        self._warm.add(worker)
        while True:
            with self._change:
                if worker.is_gone:
                    self._workers.remove(worker)
                    self._warm.discard(worker)
                    self._starts += worker.starts
                    return
                job = None if self._closing else self._store.database.take_next()
                if job is None:
                    if self._closing:
                        return
                    self._change.wait()
                    continue
                self._running[job.id] = worker
            try:
                self._run(job, worker)
            except Exception as error:
                if self._closing:
                    return
                log.exception("Job %s", job.id)
                fault = TrtWanError(
                    f"{type(error).__name__}: {error}", "This is a mistake in trt-wan: please report it."
                )
                self._end(job, "failed", error=told(fault, self._store.folder(job), self._store.data))
            finally:
                with self._change:
                    if self._running.get(job.id) is worker:  # another one may have it by now
                        del self._running[job.id]

    def _warm_up(self, number: int, worker: Runs) -> None:
        from trt_wan.serve.warm_up import warm_up

        line = warm_up(f"warm-up-{number}", worker, self._settings, self._store.incoming)
        if line is not None and not line["ok"] and not self._closing:
            log.error("The warm-up failed: %s %s", line["error"]["message"], line["error"]["hint"])

    def _run(self, job: Job, worker: Runs) -> None:
        folder, database = self._store.folder(job), self._store.database
        result = folder / (OUTPUT if job.kind == "video" else PREPARED)
        last = result if job.kind == "video" else result / artifacts.REFERENCE  # this file gets its name last
        progress = Progress(stage="starting")
        self._live.set(job.id, progress)
        self._tell_waiting()
        notes: list[str] = list(job.notes)
        finished = 0

        def on_event(event: Line) -> None:
            nonlocal progress, finished
            if event["event"] == "Note":
                _add_note(notes, event, folder)
            elif event["event"] == "StepDone":
                self._metrics.step.observe(event["seconds"])
                if progress.step == 0 and job.started_at is not None and job.started_at - job.created_at < 1:
                    self._metrics.first_step.observe(time.time() - job.created_at)
            elif event["event"] == "WindowDone":
                finished += 1
                self._metrics.frames.inc(event["frames"])
                database.change(job.id, attempts=0, notes=notes)
            progress = progress.after(event, job.kind)
            self._live.set(job.id, progress)

        try:
            if last.exists():  # finished, and the server died before it said so
                line: Line = {"ok": True, "data": {}}
            else:
                if job.kind == "preparation":
                    shutil.rmtree(result, ignore_errors=True)  # a part of its clips
                again = (
                    job.attempts > 0
                    or bool(list(folder.glob("out.partial*")))
                    or (folder / "out.inputs").exists()
                )
                command = command_of(job.kind, job.request, folder, self._settings, again)
                line = worker.run(job.id, command, on_event)
                if again and not line["ok"] and line["error"]["code"] in NOT_RESUMED and not last.exists():
                    # The kept windows are damaged, or of other weights: the video begins anew.
                    notes.append("Its finished windows could not be used: the video begins anew.")
                    anew = command_of(job.kind, job.request, folder, self._settings, again=False)
                    line = worker.run(job.id, [*anew, "-y"], on_event)
        except WorkerDied as death:
            if not self._closing:
                self._after_death(job, death, finished > 0, notes)
            return
        except TrtWanError as error:
            self._end(job, "failed", error=told(error, folder, self._store.data), notes=notes)
            return
        # A worker that was thought lost may have finished the job meanwhile.
        if line["ok"] or (line["error"]["code"] != "interrupted" and last.exists()):
            facts = facts_of(job, result) | {"windows": progress.windows}
            self._end(job, "completed", result=facts, notes=notes)
            return
        fault = TrtWanError(line["error"]["message"], line["error"]["hint"])
        fault.code = line["error"]["code"]
        if fault.code == "interrupted":
            now = database.job(job.id)
            if now is not None and not now.cancelling:  # the server ends
                database.change(job.id, status="queued", notes=notes)
                return
            self._end(job, "cancelled", notes=notes)
        else:
            self._end(job, "failed", error=told(fault, folder, self._store.data), notes=notes)

    def _after_death(self, job: Job, death: WorkerDied, got_on: bool, notes: list[str]) -> None:
        self._metrics.deaths.inc()
        now = self._store.database.job(job.id)
        if now is None or now.cancelling or job.id in self._deleted:
            self._end(job, "cancelled", notes=notes)
            return
        deaths = 1 if got_on else now.attempts + 1
        log.warning("Job %s: %s", job.id, death.message)
        if deaths >= MOST_DEATHS:
            death.message += f" That happened {deaths} times in a row."
            self._end(
                job, "failed", error=told(death, self._store.folder(job), self._store.data), notes=notes
            )
            return
        self._live.set(job.id, None)
        self._store.database.change(job.id, status="queued", attempts=deaths, notes=notes)
        self._live.tell(job.id)
        self.wake()
        time.sleep(PAUSE)

    def _end(self, job: Job, status: str, **values: Any) -> None:
        ended = self._store.database.change(job.id, status=status, completed_at=time.time(), **values)
        self._metrics.ended.labels(job.kind, status).inc()
        if job.started_at is not None:
            self._metrics.seconds.labels(job.kind).observe(time.time() - job.started_at)
        self._live.set(job.id, None)
        if ended is not None and job.id in self._deleted:
            self._forget(ended)

    def _tell_waiting(self) -> None:
        """Everyone in the queue has moved up."""
        for kind in ("video", "preparation"):
            for job in self._store.database.jobs(kind, 100) or ():
                if job.status == "queued":
                    self._live.tell(job.id)


def _add_note(notes: list[str], event: Mapping[str, Any], folder: Path) -> None:
    text = str(event["text"]).replace(f"{folder}/", "")
    quiet = {"waiting_for_lock", "kept_partial", "can_resume", "kept_nothing", "resumed", "prepared_before"}
    if event["code"] not in quiet and text not in notes and len(notes) < MOST_NOTES:
        notes.append(text)


def facts_of(job: Job, result: Path) -> dict[str, Any]:
    """Width, height, frames and rate of a finished video or of finished clips."""
    from trt_wan.runtime.video.reader import Clip

    path = result if job.kind == "video" else result / artifacts.POSE
    with Clip(path) as clip:
        return {"width": clip.width, "height": clip.height, "frames": clip.frames, "fps": float(clip.rate)}
