"""The work behind the routes: a request to a job, with uploads, source and preparation looked up."""

import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request

from trt_wan.errors import UsageError, shown
from trt_wan.serve.database import File, Job, Kind
from trt_wan.serve.dispatch import Dispatcher
from trt_wan.serve.fields import FILE_OPTIONS, FieldError, Fields, fields_from, names_file, parsed
from trt_wan.serve.guard import Refused
from trt_wan.serve.live import Live
from trt_wan.serve.metrics import Metrics
from trt_wan.serve.orders import (
    CHARACTER,
    DRIVING,
    Given,
    command_of,
    new_id,
    order_of,
    place,
    require_possible_order,
)
from trt_wan.serve.people import require_people
from trt_wan.serve.reading import read
from trt_wan.serve.settings import ServeSettings
from trt_wan.serve.store import Full, Store
from trt_wan.serve.uploads import Accepted, Uploads
from trt_wan.serve.views import view
from trt_wan.worker.worker import Runs

if TYPE_CHECKING:
    from trt_wan.serve.ray_workers import Cluster

FILE_FIELDS = (CHARACTER, DRIVING, *FILE_OPTIONS)


class Service:
    def __init__(
        self, settings: ServeSettings, workers: list[Runs], cluster: "Cluster | None" = None
    ) -> None:
        self.settings, self.cluster = settings, cluster
        self.store = Store(settings.data, settings.limits)
        self.live = Live()
        self.metrics = Metrics(
            self.store.database.waiting, lambda: self.dispatcher.starts, lambda: self.store.size()
        )
        self.uploads = Uploads(self.store.incoming, settings.limits)
        self.dispatcher = Dispatcher(self.store, self.live, self.metrics, settings, workers)
        self.sample: dict[str, str] | None = None

    def start(self) -> None:
        self.dispatcher.start()
        if self.cluster is not None:
            self.cluster.start(self.dispatcher.add, self.dispatcher.wake)
        self.uploads.prepare()

    def close(self) -> None:
        self.dispatcher.close()
        if self.cluster is not None:
            self.cluster.close()
        self.uploads.close()
        self.store.close()

    def shown(self, job: Job) -> dict[str, Any]:
        progress = self.live.of(job.id)
        if progress is None and job.status == "in_progress":  # it may have ended since the row was read
            job = self.store.database.job(job.id) or job
        return view(job, self.store, progress, self.settings.name)

    def job(self, kind: Kind, id: str) -> Job:
        """Raises Refused."""
        found = self.store.database.job(id)
        if found is None or found.kind != kind:
            raise Refused(404, "not_found", f"There is no {kind} {shown(id)}.")
        return found

    def file(self, id: str) -> File:
        """Raises Refused."""
        found = self.store.database.file(id)
        if found is None:
            raise Refused(404, "not_found", f"There is no file {shown(id)}.")
        return found

    async def create(self, kind: Kind, request: Request) -> Job:
        """The job of a request, in the queue. Raises TrtWanError, Refused."""
        await run_in_threadpool(self.store.require_room)
        async with read(request) as (values, files), AsyncExitStack() as stack:
            fields = fields_from(kind, {n: v for n, v in values.items() if not names_file(n, v)})
            wanted = self._references(fields, values, files)
            given = {name: await self._given(stack, one) for name, one in wanted.items()}
            return await run_in_threadpool(self._create, kind, fields, given)

    @staticmethod
    def _references(
        fields: Fields, values: Mapping[str, Any], files: Mapping[str, UploadFile]
    ) -> dict[str, UploadFile | str]:
        """Uploads, ids and data: URLs by field; those of options may stand in extra_params."""
        wanted: dict[str, UploadFile | str] = dict(files)
        extra = dict(fields.extra_params or {})
        named = {CHARACTER: fields.input_reference, DRIVING: fields.control_reference}
        named |= {name: value for name, value in values.items() if names_file(name, value)}
        if doubled := sorted(named.keys() & extra.keys()):
            raise FieldError(doubled[0], f"{doubled[0]} is given twice.", "Give it once.")
        named |= {name: extra.pop(name) for name in list(extra) if names_file(name, extra[name])}
        if fields.extra_params is not None:
            fields.extra_params = extra
        for name, value in named.items():
            if value is None:
                continue
            if name in wanted:
                raise UsageError(f"{name} is given twice.", "Give it once.")
            wanted[name] = _reference(name, value)
        if unknown := sorted(wanted.keys() - set(FILE_FIELDS)):
            raise UsageError(
                f"There is no upload {shown(unknown[0])!r}.", f"Uploads are {CHARACTER} and {DRIVING}."
            )
        return wanted

    async def _given(self, stack: AsyncExitStack, one: UploadFile | str) -> Given:
        if isinstance(one, str) and not one.startswith("data:"):
            file = self.file(one)
            folder = self.store.files / file.id
            return Given(file.facts, self.store.content(file), folder / "clips", file.filename, file.id)
        accepted = await stack.enter_async_context(self.uploads.accepted(one))
        self.metrics.uploaded.inc(accepted.facts["bytes"])
        return Given(accepted.facts, accepted.content, accepted.clips, accepted.filename)

    def _create(self, kind: Kind, fields: Fields, given: Mapping[str, Given]) -> Job:
        if fields.model not in (None, self.settings.name):
            raise Refused(
                404, "not_found", f"There is no model {shown(fields.model)}.", f"It has {self.settings.name}."
            )
        source = self._other(kind, fields.source)
        preparation = self._other("preparation", getattr(fields, "preparation", None))
        order = order_of(kind, fields, given, self.settings, source, preparation)
        id = new_id(kind)
        folder = self.store.incoming / id
        try:
            request = place(order, folder)
            command = command_of(kind, request, folder, self.settings, again=False)
            require_possible_order(kind, command, request, self.settings.limits)
            if order.inputs is None and "keypoints.json" not in request["files"]:
                require_people(self.settings.preparing)
            os.replace(folder, self.store.jobs / id)
            job = self.store.database.add_job(id, kind, request, self.settings.limits.queue)
            if job is None:
                shutil.rmtree(self.store.jobs / id, ignore_errors=True)
                raise Full(f"{self.settings.limits.queue} jobs wait already.", "Try again later.")
        except FileNotFoundError as error:
            raise Refused(409, "gone", "A file or job of the request was deleted meanwhile.") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.live.tell(id)
        self.dispatcher.wake()
        return job

    def _other(self, kind: Kind, id: str | None) -> tuple[Job, Path] | None:
        if id is None:
            return None
        job = self.job(kind, id)
        return job, self.store.folder(job)

    async def upload(self, request: Request) -> File:
        """Raises TrtWanError, Refused."""
        await run_in_threadpool(self.store.require_room)
        async with read(request) as (values, files):
            one = files.get("file") or _text(values, "file")
            if not one:
                raise FieldError("file", "There is no field file.", "Send a form with the upload as file.")
            if unknown := sorted({*files, *values} - {"file", "purpose", "expires_after"}):
                raise UsageError(f"There is no field {shown(unknown[0])!r}.", "A form has file and purpose.")
            async with self._accepted(one) as accepted:
                purpose = _text(values, "purpose")[:100]
                id = f"file_{secrets.token_hex(12)}"
                return await run_in_threadpool(self.store.keep, accepted, id, purpose)

    @asynccontextmanager
    async def _accepted(self, one: UploadFile | str) -> AsyncIterator[Accepted]:
        async with self.uploads.accepted(one) as accepted:
            self.metrics.uploaded.inc(accepted.facts["bytes"])
            yield accepted


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    if not isinstance(value, str):
        raise FieldError(name, f"{name} is no text.")
    return value


def _reference(name: str, value: Any) -> str:
    """An id or a data: URL, also in the objects that vLLM-Omni's clients send."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parsed(value, name)
    if isinstance(value, Mapping):
        inner = [value[key] for key in ("file_id", "image_url", "video_url", "url") if key in value]
        value = inner[0] if inner else None
        value = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise FieldError(name, "The server fetches no URLs.", "Upload the file.")
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{name} names no file.", "Give an upload, the id of a file, or a data: URL.")
    return value
