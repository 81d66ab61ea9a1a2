"""Stands before every request (ASGI): who may ask, how much they may send, how long they may take.

Without a token the server listens on this machine alone, where any web page that the user visits could send
requests too: a request from a browser must name this server as its host, and its page as its origin.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from typing import Any

from trt_wan.errors import shown
from trt_wan.serve.settings import LOOPBACK, Limits, ServeSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "trt_wan_token"
OPEN_PATHS = ("/", "/health", "/session", "/favicon.ico")
PAGE = "/page/"
SLOW_AFTER, LEAST_RATE = 60.0, 1000.0  # seconds, bytes per second
LINGER = 5.0  # seconds in which a refused client may finish its request
TOGETHER = 4  # requests of the largest size that may arrive at a time
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """An answer with this status and error."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint

    def as_error(self) -> dict[str, Any]:
        return error_body(self.status, self.code, self.message, self.hint)


def error_body(
    status: int, code: str, message: str, hint: str = "", param: str | None = None
) -> dict[str, Any]:
    """The form of OpenAI's errors, with our code and hint. `param` is the field or option at fault."""
    message, hint = (text.encode(errors="replace").decode() for text in (message, hint))  # no surrogates
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {
        "error": {
            "code": code,
            "message": message,
            "hint": hint,
            "type": kind,
            "param": None if param is None else _sendable(param),
        }
    }


def _sendable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON has and UTF-8 has not."""
    return shown(text).encode(errors="replace").decode()


class Guard:
    def __init__(self, app: App, settings: ServeSettings, count: Callable[[str, str, int], None]) -> None:
        self._app, self._settings, self._count = app, settings, count
        self._arriving = {"bytes": 0}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        allowed = origin if origin in self._settings.origins else None
        sent = 0
        body = Body(headers, receive, self._settings.limits, self._arriving)

        async def answer(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
                more = {**HEADERS, **(_cors(allowed) if allowed else {})}
                known = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), v.encode()) for n, v in more.items() if n.lower().encode() not in known),
                ]
                route = getattr(scope.get("route"), "path", "other")
                self._count(scope["method"], route, sent)
            if message["type"] == "http.response.body" and sent >= 400 and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.drop_rest()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._require_allowed(scope, headers, origin, allowed)
            if allowed and scope["method"] == "OPTIONS":
                await _send_json(answer, 200, {})
                return
            body.require_small()
            await self._app(scope, body.receive, answer)
        except Refused as refused:
            if sent:
                raise
            await _send_json(answer, refused.status, refused.as_error(), close=True)
        finally:
            body.forget()

    def _require_allowed(
        self, scope: Scope, headers: Mapping[str, str], origin: str | None, allowed: str | None
    ) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        hosts = self._settings.hosts
        if hosts or self._settings.token is None:
            hosts = (*hosts, *LOOPBACK)
        if hosts and name.strip("[]") not in hosts:
            raise Refused(
                403,
                "host_refused",
                "The server does not answer to this name.",
                "Start it with --allow-host NAME.",
            )
        own = origin in (f"http://{host}", f"https://{host}")
        if origin is not None and not own and allowed is None and scope["method"] not in ("GET", "HEAD"):
            raise Refused(
                403,
                "origin_refused",
                "Other pages may not use this server.",
                "Start it with --allow-origin, such as https://example.org.",
            )
        path = scope["path"]
        if scope["method"] == "OPTIONS" and allowed:
            return
        if self._settings.token is None or path in OPEN_PATHS or path.startswith(PAGE):
            return
        if not is_token(_token(headers), self._settings.token):
            raise Refused(
                401, "unauthorised", "The token is missing or wrong.", "Send it: Authorization: Bearer TOKEN"
            )


class Body:
    """The body of a request as it arrives, counted. `arriving` are the bytes of all requests."""

    def __init__(
        self, headers: Mapping[str, str], receive: Receive, limits: Limits, arriving: dict[str, int]
    ) -> None:
        self._receive, self._limits, self._arriving = receive, limits, arriving
        self._promised = headers.get("content-length", "0")
        self._ended = self._promised == "0" and "transfer-encoding" not in headers
        self._got, self._start = 0, time.monotonic()

    def require_small(self) -> None:
        """Raises Refused for a body whose length is told, and too large."""
        if self._promised.isascii() and self._promised.isdigit():
            if int(self._promised[:20]) > self._limits.upload:
                raise _too_large(self._limits.upload)

    async def receive(self) -> Message:
        """Raises Refused."""
        if self._ended:
            return await self._receive()  # the body is empty, or waits for the client to go
        try:
            message = await asyncio.wait_for(self._receive(), self._limits.idle)
        except TimeoutError:
            raise _too_slow() from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._got += size
            self._arriving["bytes"] += size
            self._ended = not message.get("more_body", False)
            if self._got > self._limits.upload:
                raise _too_large(self._limits.upload)
            if self._arriving["bytes"] > TOGETHER * self._limits.upload:
                raise Refused(429, "server_full", "Too much is being uploaded.", "Try again later.")
            seconds = time.monotonic() - self._start
            if not self._ended and seconds > SLOW_AFTER and self._got < seconds * LEAST_RATE:
                raise _too_slow()
        return message

    async def drop_rest(self) -> None:
        """Reads the rest of a refused request: its client would miss an answer whose connection is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while not self._ended:
                    message = await self._receive()
                    self._ended = message["type"] != "http.request" or not message.get("more_body", False)

    def forget(self) -> None:
        self._arriving["bytes"] -= self._got


def is_token(given: str | None, token: str) -> bool:
    """In a time that does not depend on how much of it is right."""
    return given is not None and hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _token(headers: Mapping[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return cookie.value if cookie is not None else None


def _too_large(most: int) -> Refused:
    return Refused(
        413, "too_large", f"A request has at most {most / 1e6:g} MB here.", "Make the clip smaller."
    )


def _too_slow() -> Refused:
    return Refused(408, "too_slow", "The request came too slowly.", "Send it again.")


def _cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": "authorization, content-type",
        "Vary": "Origin",
    }


async def _send_json(send: Send, status: int, body: Mapping[str, Any], close: bool = False) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
