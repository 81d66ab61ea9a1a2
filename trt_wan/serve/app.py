"""The routes. Each reads the request, calls the service and shows the outcome."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import trt_wan
from trt_wan.errors import InputError, TrtWanError, UsageError, shown
from trt_wan.runtime.kept.windows import finished_part
from trt_wan.runtime.presets import PRESETS
from trt_wan.serve.database import Job, Kind
from trt_wan.serve.fields import FieldError, Fields, VideoFields, options_of
from trt_wan.serve.guard import COOKIE, Guard, Refused, error_body, is_token
from trt_wan.serve.lora_files import loras
from trt_wan.serve.orders import CHARACTER, DRIVING, INPUTS, OUTPUT, PREPARED
from trt_wan.serve.service import Service
from trt_wan.serve.store import Full
from trt_wan.serve.views import file_view

PAGE = Path(__file__).parent / "page"
KEEP_ALIVE = 15.0  # seconds
STATUS = {"server_full": 429, "memory_short": 413}
CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}
FRESH = {"Cache-Control": "no-cache"}


def make_app(service: Service) -> FastAPI:
    """The application; it starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service.settings.demo:
            from trt_wan.serve.demo import add_sample

            with suppress(InputError):  # the operator's limits are smaller than the sample
                service.sample = await run_in_threadpool(add_sample, service)
        await run_in_threadpool(service.start)
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="trt-wan", version=trt_wan.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    _add_errors(app)
    _add_jobs(app, service, "video", "/v1/videos", VideoFields)
    _add_jobs(app, service, "preparation", "/v1/preparations", Fields)
    _add_videos(app, service)
    _add_files(app, service)
    _add_information(app, service)
    _add_page(app, service)

    def count(method: str, route: str, status: int) -> None:
        service.metrics.requests.labels(method, route, str(status)).inc()

    app.add_middleware(Guard, settings=service.settings, count=count)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(TrtWanError)
    async def told(request: Request, error: TrtWanError) -> Response:
        status = STATUS.get(error.code, 400)
        param = error.param if isinstance(error, FieldError) else None
        return JSONResponse(error_body(status, error.code, error.message, error.hint, param), status)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {"Connection": "close"} if error.status in (408, 413) else None
        return JSONResponse(error.as_error(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return JSONResponse(
            error_body(error.status_code, "http", f"{error.detail}."), error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))
        return JSONResponse(error_body(400, "usage", f"{shown(param)}: {first['msg']}.", param=param), 400)

    @app.exception_handler(500)
    async def mistake(request: Request, error: Exception) -> Response:
        text = f"{type(error).__name__}: {error}"
        return JSONResponse(
            error_body(500, "failed", text[:400], "This is a mistake in trt-wan: please report it."),
            500,
            {"Connection": "close"},
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> Response:
        full = error.errno in (28, 122)  # ENOSPC, EDQUOT
        if not full:
            raise error
        return JSONResponse(error_body(429, Full.code, "The server's disk is full."), 429)


def _body(fields: type[Fields]) -> dict[str, Any]:
    """The body of a request in the schema: the routes read it themselves."""
    schema = fields.model_json_schema()
    form = json.loads(json.dumps(schema))
    for name in (CHARACTER, DRIVING):
        form["properties"][name] = {
            "type": "string",
            "format": "binary",
            "description": schema["properties"][name]["description"],
        }
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}}
    return {"requestBody": {"content": content, "required": True}}


def _add_jobs(app: FastAPI, service: Service, kind: Kind, path: str, fields: type[Fields]) -> None:
    """The routes that videos and preparations share."""
    tag: dict[str, Any] = {"tags": [f"{kind}s"]}

    @app.post(path, openapi_extra=_body(fields), name=f"create {kind}", **tag)
    async def create(request: Request) -> dict[str, Any]:
        return service.shown(await service.create(kind, request))

    @app.get(path, name=f"list {kind}s", **tag)
    def all(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        found = service.store.database.jobs(kind, limit + 1, after, order == "desc")
        if found is None:
            raise Refused(404, "not_found", f"There is no {kind} {shown(after)}.")
        data = [service.shown(job) for job in found[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, "has_more": len(found) > limit, **ends}

    @app.get(f"{path}/{{id}}", name=f"get {kind}", **tag)
    def one(id: str) -> dict[str, Any]:
        return service.shown(service.job(kind, id))

    @app.delete(f"{path}/{{id}}", name=f"delete {kind}", **tag)
    def delete(id: str) -> dict[str, Any]:
        service.dispatcher.delete(service.job(kind, id))
        return {"id": id, "object": f"{kind}.deleted", "deleted": True}

    @app.post(f"{path}/{{id}}/cancel", name=f"cancel {kind}", **tag)
    def cancel(id: str) -> dict[str, Any]:
        now = service.dispatcher.cancel(service.job(kind, id))
        if now is None:
            raise Refused(404, "not_found", f"There is no {kind} {shown(id)}.")
        return service.shown(now)

    @app.get(f"{path}/{{id}}/events", name=f"events of {kind}", response_class=StreamingResponse, **tag)
    async def events(id: str) -> Response:
        job = await run_in_threadpool(service.job, kind, id)
        return StreamingResponse(_events(service, job), media_type="text/event-stream", headers=FRESH)


def _add_videos(app: FastAPI, service: Service) -> None:
    tag: dict[str, Any] = {"tags": ["videos"]}

    @app.post("/v1/videos/sync", openapi_extra=_body(VideoFields), response_class=FileResponse, **tag)
    async def sync(request: Request) -> Response:
        """Waits for the video and returns it. A client that goes away cancels it."""
        job = await service.create("video", request)
        with service.live.listener() as listener:
            if listener is None:
                raise Full("Too many clients wait.", "Use POST /v1/videos.")
            while True:
                now = await run_in_threadpool(service.store.database.job, job.id)
                if now is None or now.has_ended:
                    break
                async for _ in listener.changed(1.0):
                    pass
                if await request.is_disconnected():
                    await run_in_threadpool(service.dispatcher.cancel, now)
                    return Response(status_code=499)
        if now is None or now.status != "completed":
            error = (now.error if now is not None else None) or {
                "code": "cancelled",
                "message": "It was cancelled.",
            }
            raise Refused(409, error["code"], error["message"], error.get("hint", ""))
        return _video(service.store.folder(now) / OUTPUT, {"X-Video-Id": now.id})

    @app.get("/v1/videos/{id}/content", response_class=FileResponse, **tag)
    def content(id: str) -> Response:
        job = service.job("video", id)
        if job.status != "completed":
            raise Refused(
                409,
                "not_ready",
                f"The video is {job.status.replace('_', ' ')}.",
                "Wait until it is completed.",
            )
        return _video(service.store.folder(job) / OUTPUT, CACHED, f"{job.id}.mp4")

    @app.get("/v1/videos/{id}/preview", **tag)
    def preview(id: str) -> Response:
        """The windows that are finished so far."""
        job = service.job("video", id)
        folder = service.store.folder(job)
        if job.status == "completed":
            return _video(folder / OUTPUT, FRESH)
        try:
            if (part := finished_part(folder / OUTPUT)) is not None:
                file = part[0].open("rb")
                headers = {**FRESH, "Content-Length": str(part[1])}
                return StreamingResponse(_beginning(file, part[1]), media_type="video/mp4", headers=headers)
        except FileNotFoundError:
            pass  # it has just become the video
        raise Refused(409, "not_ready", "No window is finished yet.", "Wait for the first one.")

    @app.get("/v1/videos/{id}/driving", response_class=FileResponse, **tag)
    def driving(id: str) -> Response:
        """The preview of the prepared clips, in step with the video; else the driving clip or the pose."""
        folder = service.store.folder(service.job("video", id))
        made = (folder / "out.inputs", folder / INPUTS)
        previews = [inputs / "preview.mp4" for inputs in made]
        return _file([*previews, *folder.glob("clip.*"), made[1] / "src_pose.mp4", made[1] / "src_face.mp4"])

    @app.get("/v1/videos/{id}/reference", response_class=FileResponse, **tag)
    def reference(id: str) -> Response:
        folder = service.store.folder(service.job("video", id))
        return _file([*folder.glob("reference.*"), folder / INPUTS / "src_ref.png"])

    @app.get("/v1/preparations/{id}/files/{name}", response_class=FileResponse, tags=["preparations"])
    def prepared(id: str, name: str) -> Response:
        folder = service.store.folder(service.job("preparation", id)) / PREPARED
        # Compared with the folder's own names: a name of the client's never becomes a path.
        return _file([path for path in (folder.iterdir() if folder.is_dir() else ()) if path.name == name])

    @app.get("/v1/events", response_class=StreamingResponse, tags=["events"])
    async def all_events() -> Response:
        """Every change of every job."""
        return StreamingResponse(_events(service, None), media_type="text/event-stream", headers=FRESH)


def _add_files(app: FastAPI, service: Service) -> None:
    tag: dict[str, Any] = {"tags": ["files"]}
    form = {
        "type": "object",
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}},
        "required": ["file"],
    }

    @app.post(
        "/v1/files",
        openapi_extra={
            "requestBody": {"content": {"multipart/form-data": {"schema": form}}, "required": True}
        },
        **tag,
    )
    async def upload(request: Request) -> dict[str, Any]:
        return file_view(await service.upload(request))

    @app.get("/v1/files", **tag)
    def all(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        found = service.store.database.files(limit + 1)
        data = [file_view(file) for file in found[:limit]]
        return {"object": "list", "data": data, "has_more": len(found) > limit}

    @app.get("/v1/files/{id}", **tag)
    def one(id: str) -> dict[str, Any]:
        return file_view(service.file(id))

    @app.get("/v1/files/{id}/content", response_class=FileResponse, **tag)
    def content(id: str) -> Response:
        return _file([service.store.content(service.file(id))], CACHED)

    @app.delete("/v1/files/{id}", **tag)
    def delete(id: str) -> dict[str, Any]:
        service.store.remove_file(service.file(id))
        return {"id": id, "object": "file", "deleted": True}


def _add_information(app: FastAPI, service: Service) -> None:
    settings = service.settings

    only = {"id": settings.name, "object": "model", "created": 0, "owned_by": "trt-wan"}

    @app.get("/v1/models", tags=["models"])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [only]}

    @app.get("/v1/models/{id}", tags=["models"])
    def model(id: str) -> dict[str, Any]:
        if id != settings.name:
            raise Refused(404, "not_found", f"There is no model {shown(id)}.")
        return only

    @app.get("/v1/options", tags=["models"])
    def options() -> dict[str, Any]:
        """All that a form for a job needs to know."""
        from trt_wan.serve.people import people_hint

        hint = people_hint(settings.preparing)
        return {
            "presets": [{"name": preset.name, "about": preset.about} for preset in PRESETS.values()],
            "loras": sorted(loras(settings)),
            "defaults": {"size": "832x480", "steps": 20, "window": 77, **settings.defaults},
            "limits": {
                name: getattr(settings.limits, name)
                for name in ("upload", "frames", "pixels", "steps", "window")
            },
            "options": {kind: _described(kind) for kind in ("video", "preparation")},
            "demo": settings.demo,
            "people": hint is None,
            "people_hint": hint,
            "sample": _still_there(service),
        }

    @app.get("/health", tags=["server"])
    def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "worker": service.dispatcher.state,
            "waiting": service.store.database.waiting(),
            "version": trt_wan.__version__,
        }

    @app.get("/metrics", response_class=Response, tags=["server"])
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _still_there(service: Service) -> dict[str, str] | None:
    """The sample's files, unless one was deleted."""
    sample = service.sample
    if sample is None or not all(service.store.database.file(id) for id in sample.values()):
        return None
    return sample


def _described(kind: Any) -> dict[str, Any]:
    """The options of extra_params, from the command line's own."""
    return {
        name: {
            "help": option.help or "",
            "flag": option.is_flag,
            "choices": list(getattr(option.type, "choices", ())),
        }
        for name, option in options_of(kind).items()
    }


def _add_page(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/session", tags=["server"])
    async def session(request: Request) -> Response:
        """Gives a browser the token as a cookie, which its videos need too."""
        try:
            token = json.loads(bytes(await request.body())[:10_000])["token"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError("There is no token.", 'Send {"token": "…"}.') from error
        if settings.token is None or not isinstance(token, str) or not is_token(token, settings.token):
            raise Refused(
                401, "unauthorised", "The token is wrong.", "The server printed it when it started."
            )
        response = JSONResponse({"ok": True})
        response.set_cookie(
            COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return response

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return _file([PAGE / "index.html"], FRESH)

    @app.get("/page/{name}", include_in_schema=False)
    def page(name: str) -> Response:
        return _file([path for path in PAGE.iterdir() if path.name == name], FRESH)


def _file(found: list[Path], headers: dict[str, str] = FRESH) -> Response:
    """The first of these files that is there. Raises Refused."""
    for path in found:
        if path.is_file():
            return FileResponse(path, headers=headers)
    raise Refused(404, "not_found", "There is no such file.")


def _video(path: Path, headers: dict[str, str], name: str | None = None) -> Response:
    if not path.is_file():
        raise Refused(404, "not_found", "The video was deleted.")
    return FileResponse(
        path, media_type="video/mp4", headers=headers, filename=name, content_disposition_type="inline"
    )


def _beginning(file: BinaryIO, size: int) -> Iterator[bytes]:
    with file:
        while size > 0 and (data := file.read(min(size, 1 << 20))):
            size -= len(data)
            yield data


async def _events(service: Service, only: Job | None) -> AsyncIterator[str]:
    """Server-sent events about one job, from its state to its end, or about every job."""
    with service.live.listener() as listener:
        if listener is None:
            yield _event(
                "error", error_body(429, "server_full", "Too many clients listen.", "Try again later.")
            )
            return
        if only is not None:
            yield _event(only.kind, await run_in_threadpool(service.shown, only))
            if only.has_ended:
                return
        while True:
            quiet = True
            async for id in listener.changed(KEEP_ALIVE):
                quiet = False
                if only is not None and id != only.id:
                    continue
                job = await run_in_threadpool(service.store.database.job, id)
                if job is None:
                    yield _event("deleted", {"id": id})
                else:
                    yield _event(job.kind, await run_in_threadpool(service.shown, job))
                if only is not None and (job is None or job.has_ended):
                    return
            if quiet:
                yield ": still here\n\n"


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _schema(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    return app.openapi_schema
