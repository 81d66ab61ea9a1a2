"""Listens until it is stopped."""

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trt_wan.cli.command import note
from trt_wan.cli.report import Report
from trt_wan.errors import OutputError, Stopped, with_commands
from trt_wan.serve.app import make_app
from trt_wan.serve.service import Service
from trt_wan.serve.settings import ServeSettings
from trt_wan.worker.worker import Worker

HEADERS_SECONDS = 30.0  # for the head of a request to arrive
MOST_CONNECTIONS = 1000  # that may wait to be accepted


class Protocol(H11Protocol):
    """Closes connections whose next request takes too long to begin; uvicorn lets them wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADERS_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_waiting() and self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_SECONDS, self._late)
        elif not self._is_waiting():
            self._forget_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._is_waiting() and not self.transport.is_closing():
            self.transport.close()


def listen(settings: ServeSettings, host: str, port: int, report: Report) -> str:
    """Serves until a signal ends it, and returns a sentence. Raises TrtWanError."""
    opened = _socket(host, port)
    if settings.ray is None:
        service = Service(settings, [Worker()])
    else:
        from trt_wan.serve.ray_workers import Cluster

        service = Service(settings, [], Cluster(settings.ray, settings))
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{opened.getsockname()[1]}/"
    note(report, f"Serving on {address}, data in {settings.data}. Ctrl-C stops.", "serving", address=address)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    config = uvicorn.Config(
        make_app(service),
        http=Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=int(HEADERS_SECONDS),
        timeout_graceful_shutdown=5,
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = uvicorn.Server(config)
    try:
        server.run(sockets=[opened])
    except KeyboardInterrupt:
        pass
    if not server.started:
        raise OutputError("The server could not start.", "The lines above say why.")
    raise Stopped("The server was stopped.", "Jobs that had not ended go on when it starts again.")


def _socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(MOST_CONNECTIONS)
        return opened
    except OSError as error:
        raise OutputError(
            f"Nothing can listen on {host}:{port}: {error.strerror}.",
            with_commands("Choose another port:", f"trt-wan serve --port {(port + 1) % 65536}"),
        ) from error
