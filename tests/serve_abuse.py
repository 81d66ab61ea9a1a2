"""Sends the real server uploads and requests that are wrong in every way we know, by hand.

    python tests/serve_abuse.py --count 1000
    python tests/serve_abuse.py --kinds zips,pictures --count 100 --seed 7

Every answer must be a 4xx with our error, or belong to a request that is right after all. A job that was
accepted may fail, with a sentence. The server must stay alive, below MOST_SERVER and MOST_CHILD of memory and
MOST_DISK, and log no traceback; afterwards a good job must have the bits of `trt-wan run`. Exits with 1 for a
fault. test_serve_abuse.py sends a sample.
"""

import argparse
import io
import json
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fuzz import changed_tree, damaged, damaged_json, odd_value
from serve_base import PATIENCE, Base, children, resident, verdict
from serving import Server
from tiny_job import prepare, write_clip, write_reference, write_sound

TOKEN = "a-token-of-the-test"
UPLOAD = 20  # MB that the server takes
MOST_SERVER, MOST_CHILD, MOST_DISK = 600.0, 3_000.0, 300.0  # MB
Random = random.Random


@dataclass
class Answer:
    """`status` 0: the connection was closed without an answer."""

    status: int
    body: bytes = b""
    fine: bool = False  # whether a 2xx is right


Case = Callable[[Random, "Target"], Answer]


@dataclass
class Target:
    server: Server
    base: Base
    prepared: str  # the id of good clips
    video: str  # that of a finished video
    jobs: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.server.address.rstrip("/").rpartition("/")[2].rsplit(":", 1)
        return host, int(port)

    def ask(self, method: str, path: str, fine: bool = False, **more: Any) -> Answer:
        answer = self.server.client.request(method, path, **more)
        return Answer(answer.status_code, answer.content, fine)

    def upload(self, content: bytes, name: str = "clip.mp4", fine: bool = False) -> Answer:
        return self.ask("POST", "/v1/files", fine, files={"file": (name, content)})

    def order(self, fields: Any, fine: bool = False, path: str = "/v1/videos") -> Answer:
        content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        answer = self.ask("POST", path, fine, content=content, headers={"Content-Type": "application/json"})
        if answer.status == 200 and fine and path == "/v1/videos":
            self.jobs.append(json.loads(answer.body)["id"])
        return answer

    def raw(self, *parts: bytes, pause: float = 0.0, patience: float = 100.0) -> Answer:
        """Sends bytes as they are, and reads until the server closes or has answered."""
        with socket.create_connection(self.address, timeout=patience) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
            except OSError:
                pass  # it has closed, and may have said why
            return Answer(*_read(connection))


def _read(connection: socket.socket) -> tuple[int, bytes]:
    got = b""
    try:
        while b"\r\n\r\n" not in got and (data := connection.recv(65536)):
            got += data
        head, _, body = got.partition(b"\r\n\r\n")
        length = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while length and len(body) < int(length[0]) and (data := connection.recv(65536)):
            body += data
    except ConnectionError:
        return 0, b""
    return (int(head.split()[1]), body) if head else (0, b"")


def _head(path: str, *lines: str, method: str = "POST") -> bytes:
    authorised = f"Authorization: Bearer {TOKEN}"
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", authorised, *lines, "", ""]).encode(
        "latin-1"
    )


# --- Files -------------------------------------------------------------------------------------------------


@cache
def good_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        folder = prepare(Path(made), write_sound(Path(made) / "tone.m4a", 1))
        write_clip(folder / "clip.mp4")
        write_reference(folder / "picture.png")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def packed(files: dict[str, bytes], level: int = 1) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def clips(**other: bytes) -> dict[str, bytes]:
    good = {name: content for name, content in good_files().items() if name.startswith("src_")}
    return good | {f"{name}.mp4": content for name, content in other.items()}


@cache
def bomb() -> bytes:
    """A .zip of 4 MB with 4.2 GB in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("src_pose.mp4", "w", force_zip64=True) as target:
            zeros = bytes(1 << 24)
            for _ in range(250):
                target.write(zeros)
    return made.getvalue()


@cache
def entries(count: int) -> bytes:
    """A .zip whose directory has so many entries."""
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    where = len(local), len(entry) * count
    large = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, where[1], where[0])
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, sum(where), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return local + entry * count + large + locator + end


def linked(name: str, target: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for good, content in clips().items():
            if good != name:
                archive.writestr(good, content)
        entry = zipfile.ZipInfo(name)
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, target)
    return made.getvalue()


def playlist(rng: Random, target: Path) -> bytes:
    """What ffmpeg opens as a list of other files, whatever its name is."""
    return rng.choice(
        (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
            f"#EXTM3U\n#EXTINF:9,\nfile://{target}\n",
            f"ffconcat version 1.0\nfile '{target}'\n",
            "GIF8\nv=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n\n",
            f"\x1aEß£<MPD profiles='urn:mpeg:dash:profile:isoff-live:2011'><BaseURL>{target}</BaseURL></MPD>",
            f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' profiles='urn:mpeg:dash:"
            f"profile:isoff-live:2011'><Period><BaseURL>file://{target}</BaseURL></Period></MPD>",
        )
    ).encode("latin-1")


def zips(rng: Random, target: Target) -> Answer:
    files = clips()
    name = rng.choice(list(files))
    lured = target.base.folder / "clips" / "src_pose.mp4"
    match rng.randrange(9):
        case 0:
            return target.upload(bomb(), "bomb.zip")
        case 1:
            return target.upload(entries(rng.choice((10_000, 200_000))), "entries.zip")
        case 2:
            return target.upload(linked(name, rng.choice(("/etc/passwd", str(lured)))), "link.zip")
        case 3:
            odd = rng.choice(
                ("../../../{}", "/{}", "..\\..\\{}", "C:\\{}", "a/../../{}", "\n{}", "{}/", "{}\0.txt")
            )
            files[odd.format(name)] = files.pop(name)
            return target.upload(packed(files), "names.zip", fine=True)
        case 4:
            clip = rng.choice([name for name in files if name.endswith(".mp4")])
            return target.upload(packed({**files, clip: playlist(rng, lured)}), "playlist.zip")
        case 5:
            return target.upload(damaged(rng, packed(files)), "damaged.zip", fine=True)
        case 6:
            files[name] = damaged(rng, files[name])
            return target.upload(packed(files), "damaged.zip", fine=True)
        case 7:
            del files["src_ref.png"], files["src_pose.mp4"]
            return target.upload(packed(files), "missing.zip")
        case _:
            content = bytearray(packed(files))
            at = content.rindex(b"PK\1\2") + rng.choice((8, 10, 20, 24, 42))
            content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x01\0\x63\0", b"\0\0\0\x7f"))
            return target.upload(bytes(content), "directory.zip", fine=True)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def huge_picture(side: int, rows: int) -> bytes:
    """A PNG of side x side one-bit pixels, of which so many rows are there."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((side // 8 + 1) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", lines) + _chunk(b"IEND", b"")


def pictures(rng: Random, target: Target) -> Answer:
    good = good_files()["picture.png"]
    match rng.randrange(5):
        case 0:
            return target.upload(huge_picture(60_000, rng.choice((1, 60_000))), "huge.png")
        case 1:
            return target.upload(huge_picture(11_000, 11_000), "large.png")
        case 2:
            side = struct.pack(">HH", 65_000, 65_000)
            frame = b"\xff\xc0\0\x11\x08" + side + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01"
            return target.upload(
                b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0" + frame + b"\xff\xd9", "huge.jpg"
            )
        case 3:
            frame = b"VP8X" + struct.pack("<IB3x", 10, 0) + b"\x00\xfa\0" * 2
            return target.upload(b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame, "huge.webp")
        case _:
            return target.upload(damaged(rng, good), "damaged.png", fine=True)


@cache
def endless() -> bytes:
    """An mp4 that decodes to 100,000 frames."""
    import av
    import numpy as np

    made = io.BytesIO()
    with av.open(made, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8)).reformat(format="yuv420p")
        for k in range(100_000):
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return made.getvalue()


def videos(rng: Random, target: Target) -> Answer:
    good, lured = good_files()["clip.mp4"], target.base.folder / "clips" / "src_pose.mp4"
    match rng.randrange(6):
        case 0:
            return target.upload(endless(), "endless.mp4")
        case 1:
            return target.upload(playlist(rng, rng.choice((Path("/etc/passwd"), lured))), "list.mp4")
        case 2:
            return target.upload(good[: rng.randrange(len(good))], "cut.mp4", fine=True)
        case 3:
            screen = struct.pack("<HH", 65_535, 65_535) + b"\xf7\0\0"
            return target.upload(b"GIF89a" + screen + bytes(768) + b";", "huge.gif")
        case _:
            return target.upload(damaged(rng, good), "damaged.mp4", fine=True)


def other_files(rng: Random, target: Target) -> Answer:
    good = good_files()["picture.png"]
    match rng.randrange(4):
        case 0:
            content = rng.choice(
                (b"", b"x", b"PK\3\4", b"\0" * 20, b"ID3", b"OggS", b"RIFF\0\0\0\0WAVE", b"%PDF-1.7")
            )
            return target.upload(content, "odd.bin", fine=content[:3] in (b"ID3", b"Ogg", b"RIF"))
        case 1:
            name = rng.choice(
                ("../../x.png", "/etc/passwd", "a" * 5000, "<script>alert(1)</script>", "\u202egnp.x", ".")
            )
            return target.upload(good, name, fine=True)
        case 2:
            content = damaged_json(rng, {"frames": [{"keypoints": [1, 2, 3]}]})
            return target.upload(content, "keypoints.json", fine=True)
        case _:
            return target.upload(damaged(rng, good_files()["tone.m4a"]), "tone.m4a", fine=True)


# --- Fields ------------------------------------------------------------------------------------------------

OPERATORS = (
    "weights",
    "output",
    "vram",
    "executor",
    "transformer",
    "detector",
    "overwrite",
    "repeated",
    "inputs",
)
BAD_FIELDS: dict[str, tuple[Any, ...]] = {
    "size": ("0x0", "-64x48", "999999x999999", "64x48x2", "64", "", "x", "6.4e1x48", "64x48\n"),
    "seconds": ("1e999", "-1", "0", "nan", "abc", "٣x"),
    "seed": (-1, 2**64, 2**200, 1.5, "x", True),
    "num_inference_steps": (0, -1, 10**9, "x", 2.5),
    "guidance_scale": ("high", [1], -1e308, 1e308),
    "flow_shift": (0, -1, "x"),
    "fps": (0, -1, "x"),
    "num_frames": (0, -5),
    "prompt": ("\ud800", "a\0b", "x" * 100_000, 5, ["a"]),
    "preset": ("none", "../x", ""),
    "lora": ("../../etc/passwd", {"name": "/etc/passwd"}, {"scale": 1}, [[]], 5, "[", {"name": "\ud800"}),
    "model": ("gpt", "\ud800", ""),
    "source": ("video_0", "../..", "\ud800", "prep_1"),
    "preparation": ("prep_0", "", "video_1"),
    "control_reference": (
        "file_0",
        "../../etc/passwd",
        "data:,x",
        "data:video/mp4;base64,!",
        "https://127.0.0.1/x",
        "\ud800",
    ),
    "input_reference": ("file:///etc/passwd", {"url": "http://169.254.169.254/"}, {"file_id": 5}),
    "control_type": ("dance", 1),
    "redo": ([0], [10**9], [-1], [True], "x", [1] * 10_000),
    "unknown": (1, "x"),
    "extra_params": (
        *({name: "x"} for name in OPERATORS),
        *({"window": value} for value in (0, -1, 12, 10**9, 1.5, True, "x")),
        *({"crf": value} for value in (-1, 1000, "x")),
        *({"overlap": value} for value in (-1, 100, "x")),
        *(
            [],
            "x",
            {"": 1},
            {"--weights": "x"},
            {"window": {"a": 1}},
            {"sigmas": "1," * 50_000},
            {"tile": [1] * 2000},
        ),
        *(
            {"start": "\ud800"},
            {"shift": "\0"},
            {"sampler": "<b>"},
            {"init": "file_0"},
            {"keypoints": "/etc/passwd"},
        ),
    ),
}


def fields(rng: Random, target: Target) -> Answer:
    good = {"control_reference": target.prepared, "num_inference_steps": 1}
    path = rng.choice(("/v1/videos", "/v1/videos", "/v1/preparations", "/v1/videos/sync"))
    name = rng.choice(list(BAD_FIELDS))
    if rng.random() < 0.7:
        return target.order({**good, name: rng.choice(BAD_FIELDS[name])}, path=path)
    return target.order({**good, name: odd_value(rng)}, fine=True, path=path.removesuffix("/sync"))


def prompts(rng: Random, target: Target) -> Answer:
    """Right requests, with texts that must come back as they are."""
    text = rng.choice(
        (
            "<script>alert(1)</script>",
            "\x1b[2J\x07",
            "a\r\nevent: x\r\n\r\n",
            "' OR 1=1; --",
            "%s%n{}",
            "\u202e\ufeff",
            "",
        )
    )
    order = {"control_reference": target.prepared, "num_inference_steps": 1, "prompt": text}
    answer = target.order(order, fine=True)
    if answer.status == 200 and json.loads(answer.body)["prompt"] != text:
        return Answer(599, b"another prompt came back")
    return answer


@cache
def many_values() -> bytes:
    return b'{"prompt": [' + b"[]," * 8_000_000 + b"1]}"


def bodies(rng: Random, target: Target) -> Answer:
    good = {"control_reference": target.prepared, "num_inference_steps": 1, "extra_params": {"window": 13}}
    match rng.randrange(4):
        case 0:
            return target.order(damaged_json(rng, good), fine=True)
        case 1:
            return target.order(json.dumps(changed_tree(rng, good)).encode(), fine=True)
        case 2:
            content = rng.choice(
                (
                    *(
                        b"[" * 200_000,
                        b'{"a":' * 100_000,
                        b"null",
                        b"[]",
                        b'"x"',
                        b"",
                        b"\xff\xfe{",
                        b"{" + b" " * 10**6,
                    ),
                    *(
                        b'{"seed": NaN}',
                        b'{"seed": 1e999}',
                        b'{"seed": ' + b"9" * 100_000 + b"}",
                        many_values(),
                    ),
                )
            )
            return target.order(content)
        case _:
            kind = rng.choice(
                ("text/plain", "multipart/form-data", "multipart/form-data; boundary=", "a" * 9000, "x/\x7f")
            )
            return target.ask("POST", "/v1/videos", content=b"{}", headers={"Content-Type": kind})


def forms(rng: Random, target: Target) -> Answer:
    line, end = b"--b\r\nContent-Disposition: form-data; name=", b"\r\n--b--\r\n"
    content = rng.choice(
        (
            *(
                line,
                line + b'"file"\r\n\r\nx',
                line + b'"file"; filename="x"\r\n\r\n' + end,
                b"--b--\r\n",
                b"\r\n" * 9999,
            ),
            *(
                b"".join(line + b'"f%d"\r\n\r\n1\r\n' % k for k in range(2000)) + end,
                line + b'"' + b"a" * 10**6,
            ),
            *(line + b'"prompt"\r\n\r\n' + b"x" * 15_000_000 + end, b"--b\r\n" + b"X: y\r\n" * 50_000 + end),
            *((line + b'"file"; filename="a"\r\n\r\nx\r\n') * 2 + end, line + b'"seed"\r\n\r\nabc' + end),
            *(
                line + b'"file"; filename="\xff\0\n"\r\n\r\n' + end,
                b"--b\r\nContent-Type: multipart/mixed\r\n\r\n" + end,
            ),
            *(line + b'"extra_params"\r\n\r\n' + b"[" * 100_000 + end, line + b'"redo"\r\n\r\n{}' + end),
            *(line + b'"control_reference"; filename="x.mp4"\r\n\r\n' + b"#EXTM3U\n/etc/passwd\n" + end, b""),
        )
    )
    kind = rng.choice(("multipart/form-data; boundary=b", "multipart/form-data; boundary=b; charset=utf-16"))
    path = rng.choice(("/v1/videos", "/v1/files", "/v1/preparations"))
    return target.ask("POST", path, content=content, headers={"Content-Type": kind})


# --- Addresses, headers, connections -----------------------------------------------------------------------

ODD_IDS = (
    *(
        "..",
        "%2e%2e",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%5c..",
        "%00",
        "video_%00",
        "a" * 5000,
        "%ff%fe",
        "%0d%0a",
    ),
    *("<script>", "video_0", "' OR '1'='1", "%F0%9F%92%A3", "~", "%25", ".", "*", "file_0;x=1"),
)
PLACES = (
    *(
        "/v1/videos/{}",
        "/v1/videos/{}/content",
        "/v1/videos/{}/preview",
        "/v1/videos/{}/driving",
        "/v1/files/{}",
    ),
    *(
        "/v1/videos/{}/reference",
        "/v1/videos/{}/events",
        "/v1/files/{}/content",
        "/v1/preparations/{}/files/{}",
    ),
    *(
        "/v1/preparations/{}",
        "/page/{}",
        "/{}",
        "/v1/videos?after={}",
        "/v1/videos?limit={}",
        "/v1/files?limit={}",
    ),
)


def addresses(rng: Random, target: Target) -> Answer:
    path = rng.choice(PLACES)
    path = path.format(*(rng.choice(ODD_IDS) for _ in range(path.count("{}"))))
    method = rng.choice(("GET", "GET", "GET", "DELETE", "POST", "PUT", "PATCH", "HEAD"))
    answer = target.raw(_head(path.replace(" ", "%20"), "Connection: close", method=method))
    return Answer(answer.status, b"" if method == "HEAD" else answer.body)


def ranges(rng: Random, target: Target) -> Answer:
    wanted = rng.choice(
        (
            *(
                "bytes=5-1",
                "bytes=-",
                "bytes=a-b",
                "bytes=999999999-",
                "bytes=-0",
                "items=0-1",
                "bytes=0-0,",
                "bytes",
            ),
            *(
                "bytes=" + ",".join(f"{k}-{k}" for k in range(3000)),
                "bytes=" + "0-," * 500,
                "bytes=0-" + "9" * 4000,
            ),
            *("bytes=--1", "bytes=0x1-2", "bytes=٣-٤".encode().decode("latin-1"), "bytes=1-2,2-3,0-", ""),
        )
    )
    path = f"/v1/videos/{target.video}/{rng.choice(('content', 'reference', 'driving'))}"
    answer = target.raw(_head(path, f"Range: {wanted}", "Connection: close", method="GET"))
    return Answer(answer.status, b"", fine=True)


def tokens(rng: Random, target: Target) -> Answer:
    value = rng.choice(
        (
            *(
                "",
                "Bearer",
                "Bearer ",
                "Bearer x",
                f"Basic {TOKEN}",
                f"Bearer {TOKEN}x",
                f"Bearer {TOKEN[:-1]}",
            ),
            *("Bearer " + "x" * 30_000, "Bearer \xff\xfe", f"Bearer\t{TOKEN}é"),
        )
    )
    name = rng.choice(("Authorization", "Cookie", "X-Token"))
    value = value.replace("Bearer ", "trt_wan_token=") if name == "Cookie" else value
    lines = "\r\n".join(
        ["GET /v1/videos HTTP/1.1", "Host: 127.0.0.1", f"{name}: {value}", "Connection: close", "", ""]
    )
    if rng.random() < 0.6:
        return target.raw(lines.encode("latin-1"))
    token = rng.choice(("x", "", "\ud800", TOKEN + "\0", "x" * 9000, 5, None, [TOKEN], {"a": TOKEN}, "é"))
    content = (
        json.dumps({"token": token}) if rng.random() < 0.8 else rng.choice(("", "[", "[]", "[" * 100_000))
    )
    return target.ask("POST", "/session", content=content.encode())


def names(rng: Random, target: Target) -> Answer:
    """Of hosts and origins."""
    if rng.random() < 0.5:
        host = rng.choice(
            ("example.org", "127.0.0.1.example.org", "[::1", "", "a" * 5000, "127.0.0.1@x", "\xff", "0")
        )
        head = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        return target.raw(head.encode("latin-1"))
    origin = rng.choice(
        (
            "https://example.org",
            "null",
            "http://127.0.0.1.example.org",
            "\xff",
            "file://",
            "http://127.0.0.1:1",
        )
    )
    return target.raw(
        _head("/v1/videos", f"Origin: {origin}", "Content-Length: 2", "Connection: close") + b"{}"
    )


def lengths(rng: Random, target: Target) -> Answer:
    head = ("Content-Type: multipart/form-data; boundary=b", "Connection: close")
    match rng.randrange(4):
        case 0:
            return target.raw(
                _head("/v1/files", *head, f"Content-Length: {rng.choice((10**10, 10**19 - 1))}")
            )
        case 1:
            length = rng.choice(("-1", "1e3", "0x10", "9" * 30, "5, 6", "five", "+5"))
            answer = target.raw(_head("/v1/files", *head, f"Content-Length: {length}") + b"xxxxx")
            return Answer(answer.status)  # of uvicorn
        case 2:
            start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
            piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
            parts = [
                _head("/v1/files", *head, "Transfer-Encoding: chunked"),
                b"%x\r\n%s\r\n" % (len(start), start),
            ]
            return target.raw(*parts, *[piece] * (UPLOAD * 20))
        case _:
            lines = (
                "Content-Length: 5",
                "Transfer-Encoding: chunked",
                "Transfer-Encoding: gzip",
                "Content-Length: 6",
            )
            body = rng.choice(
                (b"zz\r\n", b"5\r\nabc", b"-1\r\n", b"fffffffffffffffffff\r\n", b"5;" + b"a" * 99_999)
            )
            answer = target.raw(_head("/v1/files", *head, *rng.sample(lines, 2)) + body + b"\r\n\r\n")
            return Answer(answer.status)


def garbage(rng: Random, target: Target) -> Answer:
    content = rng.choice(
        (
            *(
                b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + rng.randbytes(200),
                b"GET\r\n\r\n",
                b"\r\n\r\n\r\n",
                rng.randbytes(500),
            ),
            *(
                b"GET / HTTP/9.9\r\n\r\n",
                b"GET / HTTP/1.1\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\0" * 5000,
            ),
            *(
                b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a\r\n b: c\r\n\r\n",
            ),
            *(
                _head("/", *(f"X-{k}: y" for k in range(20_000)), method="GET"),
                _head("/", "X: " + "a" * 200_000),
            ),
            *(
                _head("/v1/videos", "Transfer-Encoding: identity"),
                _head("/v1/files", "Expect: 200-maybe", "Content-Length: x"),
            ),
            *(
                _head(
                    "/v1/events",
                    "Upgrade: websocket",
                    "Connection: Upgrade",
                    "Sec-WebSocket-Version: 13",
                    method="BREW",
                ),
            ),
        )
    )
    answer = target.raw(content + b"\r\n\r\n")
    # uvicorn answers for itself here, with a line of text or by closing.
    return Answer(answer.status if answer.status not in (0, 400) else 499, b"")


def slow(rng: Random, target: Target) -> Answer:
    """Senders that take half a minute and more; they are closed or told so."""
    head = _head("/v1/files", "Content-Type: multipart/form-data; boundary=b", "Content-Length: 1000")
    match rng.randrange(4):
        case 0:
            answer = target.raw(head[:40])
        case 1:
            answer = target.raw(head + b"--b\r\n")
        case 2:
            answer = target.raw(*([head] + [b"x"] * 80), pause=1.0)
        case _:
            answer = target.raw(*(head[k : k + 1] for k in range(80)), pause=1.0)
    return Answer(answer.status or 408, b"")


def crowd(rng: Random, target: Target) -> Answer:
    """300 connections that are held open: the server still answers."""
    held = [socket.create_connection(target.address, timeout=30) for _ in range(300)]
    try:
        for connection in held[::3]:
            connection.sendall(_head("/v1/events", method="GET"))
        for connection in held[1::3]:
            connection.sendall(
                _head("/v1/files", "Content-Type: multipart/form-data; boundary=b", "Content-Length: 99")
            )
        answer = target.ask("GET", "/health")
        return Answer(404, b"") if answer.status == 200 else answer
    finally:
        for connection in held:
            connection.close()


KINDS: dict[str, tuple[Case, float]] = {  # with their share
    **{case.__name__: (case, 4.0) for case in (zips, videos, pictures, bodies, forms, addresses)},
    **{case.__name__: (case, 2.0) for case in (other_files, ranges, tokens, names, lengths, garbage)},
    "fields": (fields, 10.0),
    "prompts": (prompts, 0.5),
    "slow": (slow, 1.5),
    "crowd": (crowd, 0.1),
}
SLOW = {"slow"}  # kinds that wait more than they work


def fault_of(answer: Answer, data: Path) -> str | None:
    """What is wrong with an answer of a server whose data is in that folder."""
    if answer.fine and 200 <= answer.status < 300:
        return None
    if not 400 <= answer.status < 500:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if not answer.body:
        return None
    try:
        error = json.loads(answer.body)["error"]
        texts = [error[name] for name in ("code", "message", "hint", "type")]
    except (ValueError, KeyError, TypeError):
        return f"no error of ours: {answer.status} {answer.body[:300]!r}"
    if not error["message"] or len(error["message"]) > 400:
        return f"no sentence: {error['message'][:600]!r}"
    if any(str(data) in text for text in texts):
        return f"tells the server's folders: {error}"
    if "is a mistake in trt-wan" in error["hint"] or "Traceback" in error["message"]:
        return f"a mistake: {error}"
    return None


@dataclass
class Watch:
    """The most memory and disk that were seen, in MB."""

    server: float = 0.0
    child: float = 0.0
    disk: float = 0.0

    def follow(self, target: Target, done: threading.Event) -> None:
        import psutil

        process = psutil.Process(target.server.process.pid)
        while not done.wait(0.3):
            self.server = max(self.server, resident(process))
            self.child = max([self.child, *map(resident, children(target.server))])
            self.disk = max(self.disk, used(target.server.data))

    def faults(self) -> list[str]:
        found = (
            (self.server, MOST_SERVER, "server"),
            (self.child, MOST_CHILD, "child"),
            (self.disk, MOST_DISK, "disk"),
        )
        return [f"the {name} took {most:.0f} MB" for most, limit, name in found if most > limit]


def used(folder: Path) -> float:
    """MB on the disk."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_blocks * 512
            except OSError:
                pass  # it has just been removed
    return total / 1e6


def attack(
    target: Target, kinds: Sequence[str], count: int, seed: int
) -> tuple[list[str], dict[str, Counter[int]]]:
    """Faults, and how often each kind got which status."""
    faults: list[str] = []
    seen: dict[str, Counter[int]] = {kind: Counter() for kind in kinds}
    weights = [KINDS[kind][1] for kind in kinds]
    chosen = list(enumerate(random.Random(seed).choices(kinds, weights, k=count)))

    def one(number: int, kind: str) -> None:
        try:
            answer = KINDS[kind][0](Random(f"{seed} {number}"), target)
            fault = fault_of(answer, target.server.data)
            seen[kind][answer.status] += 1
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            faults.append(f"{kind} {number}: {fault}")
            print(faults[-1], flush=True)

    with ThreadPoolExecutor(50) as waiting, ThreadPoolExecutor(4) as working:
        for number, kind in chosen:
            (waiting if kind in SLOW else working).submit(one, number, kind)
    return faults, seen


def settle(target: Target) -> list[str]:
    """Cancels most jobs that were accepted. Faults of the others, and of a good job."""
    for id in target.jobs[5:]:
        target.server.client.delete(f"/v1/videos/{id}")
    faults = []
    for id in target.jobs[:5]:
        video = target.server.ended({"object": "video", "id": id}, PATIENCE * 10)
        if video["status"] == "failed" and "mistake in trt-wan" in video["error"]["hint"]:
            faults.append(f"{id}: {video['error']}")
    for file in target.server.client.get("/v1/files").json()["data"]:
        if "/" in file["filename"] or file["filename"] in ("..", ""):
            faults.append(f"a file is called {file['filename']!r}")
    video = target.server.video(control_reference=target.prepared, seed=1)
    if target.server.ended(video, PATIENCE * 10)["status"] != "completed":
        faults.append("a good job does not end well")
    elif target.server.content(video) != target.base.single(1, 1):
        faults.append("a good job has other bits than before")
    return faults


@contextmanager
def serving_target(base: Base, data: Path) -> Iterator[Target]:
    options = ["--allow-host=videos.example.org", f"--max-upload={UPLOAD}", "--max-queue=50"]
    with base.serving(data, *options, token=TOKEN) as server:
        prepared = server.upload(base.clips)["id"]
        video = server.ended(server.video(control_reference=prepared, seed=1), PATIENCE * 10)
        yield Target(server, base, prepared, video["id"])


def run(base: Base, data: Path, kinds: Sequence[str], count: int, seed: int) -> list[str]:
    """Faults."""
    with serving_target(base, data) as target:
        watch, done = Watch(), threading.Event()
        watching = threading.Thread(target=watch.follow, args=(target, done))
        watching.start()
        try:
            faults, seen = attack(target, kinds, count, seed)
        finally:
            done.set()
            watching.join()
        for kind, statuses in seen.items():
            print(f"{kind}: {dict(sorted(statuses.items()))}")
        print(f"at most: server {watch.server:.0f} MB, child {watch.child:.0f} MB, disk {watch.disk:.0f} MB")
        if target.server.process.poll() is not None:
            return [*faults, f"the server ended with {target.server.process.returncode}"]
        return faults + watch.faults() + settle(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("serve-abuse"))
    given = parser.parse_args()
    base = Base.made(given.folder / "base")
    data = Path(tempfile.mkdtemp(dir=given.folder.absolute(), prefix="data-"))
    log = data.with_suffix(".log")
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)  # the server's stderr too
    faults = run(base, data, given.kinds.split(","), given.count, given.seed)
    told = log.read_text(errors="replace").split("Traceback (most recent call last):")[1:]
    return verdict([*faults, *(f"traceback: ...{text[-300:]}" for text in told)])


if __name__ == "__main__":
    sys.exit(main())
