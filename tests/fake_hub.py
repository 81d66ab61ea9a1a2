"""A server that answers as the Hugging Face Hub does, with the faults that tests ask for.

/<owner>/<name>/resolve/<revision>/<path> answers HEAD and GET with the Hub's headers and a redirect to the
file store, which knows ranges. Like the Hub it tells size and SHA-256 in X-Linked-Size and X-Linked-Etag.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` by `<owner>/<name>/<path>`. Faults are by the same name."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)  # the next answers end after so many bytes
    wrong: dict[str, int] = field(default_factory=dict)  # the byte at that place is another
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and X-Error-Code
    stalls: dict[str, int] = field(default_factory=dict)  # after so many bytes nothing comes until `go_on`
    ranges: bool = True
    store_fails_later: bool = False  # whether only a first request is answered
    go_on: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, name, range
    sent: int = 0  # bytes of files
    endpoint: str = ""
    store: str = ""  # another host, to which the token must not go
    tokens: list[str] = field(default_factory=list)  # sent to the store

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, method: str) -> None:
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
                self._resolve(method, f"{match[1]}/{match[3]}")
            else:
                self._store(method, self.path.removeprefix("/store/"))

        def _resolve(self, method: str, name: str) -> None:
            hub.requests.append((method, name, self.headers.get("Range", "")))
            status, code = hub.refused.get(name, (404, "EntryNotFound"))
            if name in hub.refused or name not in hub.files:
                self._headers(status, {"X-Error-Code": code, "Content-Length": "0"})
                return
            self._headers(
                302,
                {
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Etag": f'"{hub.sha256(name)}"',
                    "X-Linked-Size": str(len(hub.files[name])),
                    "X-Xet-Hash": "0" * 64,  # offered, as by the Hub, and not needed
                    "X-Xet-Refresh-Route": f"{hub.endpoint}/xet",
                    "Location": f"{hub.store}/store/{name}",
                    "Content-Length": "0",
                },
            )

        def _store(self, method: str, name: str) -> None:
            if self.headers.get("Range") and hub.store_fails_later:
                self._headers(503, {"Content-Length": "0"})
                return
            hub.tokens += self.headers.get_all("Authorization", [])
            content = bytearray(hub.files[name])
            if name in hub.wrong:
                content[hub.wrong[name]] ^= 1
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            hub.requests.append((method, f"store {name}", asked[0] if asked else ""))
            first = int(asked[1]) if asked and hub.ranges else 0
            body = bytes(content[first:])
            headers = {"Content-Length": str(len(body)), "ETag": f'"{hub.sha256(name)}"'}
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._headers(206 if first else 200, headers)
            if method == "GET":
                self._send(name, body)

        def _send(self, name: str, body: bytes) -> None:
            cut = hub.cuts[name].pop(0) if hub.cuts.get(name) else len(body)
            stall = hub.stalls.pop(name, None)
            hub.sent += cut
            if stall is not None:
                self.wfile.write(body[:stall])
                hub.go_on.wait(60)
                body, cut = body[stall:], cut - stall
            try:
                self.wfile.write(body[:cut])
            except OSError:
                pass  # the client has been stopped
            if cut < len(body):
                self.close_connection = True

        def _headers(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint, hub.store = (
        f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost")
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
