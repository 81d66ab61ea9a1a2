"""A sample of tests/serve_abuse.py, which sends a thousand by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serve_abuse import Answer, Target, attack, clips, fault_of, packed, serving_target
from serve_base import Base

QUICK = ("fields", "bodies", "forms", "addresses", "tokens", "names", "lengths", "garbage", "zips", "videos")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("abuse")
    with serving_target(Base.made(folder / "base", tiny_home), folder / "data") as target:
        yield target


def test_a_sample_of_wrong_requests(target: Target) -> None:
    faults, seen = attack(target, QUICK, 30, seed=3)
    assert not faults
    assert sum(statuses.total() for statuses in seen.values()) == 30
    assert target.server.process.poll() is None


@pytest.mark.parametrize(
    ("send", "text"),
    [
        (lambda target: target.order({"model": "\ud800"}), "There is no model"),
        (lambda target: target.order({"control_reference": "\ud800"}), "There is no file"),
        (lambda target: target.ask("POST", "/session", content=b'{"token": "\\ud800"}'), "token is wrong"),
        (lambda target: target.order(b'{"a": [' + b"[]," * 200_000 + b"1]}"), "values"),
        (lambda target: target.upload(packed(clips(src_pose=bytes(21_000_000)))), "larger than 20 MB"),
        (lambda target: target.upload(packed(clips(src_pose=b"#EXTM3U\n/x.mp4\n"))), "is no mp4"),
        (lambda target: target.upload(b"#EXTM3U\n/etc/passwd\n"), "no mp4, mov"),
        (lambda target: target.upload(bytes(25_000_000)), "at most 20 MB"),  # read after all is sent
    ],
    ids=("model", "file", "token", "values", "bomb", "playlist inside", "playlist", "length"),
)
def test_what_was_found(target: Target, send: Callable[[Target], Answer], text: str) -> None:
    answer = send(target)
    assert fault_of(answer, target.server.data) is None
    assert text in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500, b'{"error": {"code": "failed", "message": "x", "hint": "", "type": "server_error"}}'),
        Answer(200),
        Answer(0),
        Answer(400, b"Bad Request"),
        Answer(400, b'{"error": {"code": "usage", "message": "", "hint": "", "type": "x"}}'),
    ],
)
def test_faults_are_seen(answer: Answer) -> None:
    assert fault_of(answer, Path("/data")) is not None
