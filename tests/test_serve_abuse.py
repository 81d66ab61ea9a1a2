"""A sample of tests/serve_abuse.py, which sends a thousand by hand."""

from pathlib import Path

import pytest
from serve_abuse import Answer, attack, fault_of, serving_target
from serve_base import Base

QUICK = ("fields", "bodies", "forms", "addresses", "tokens", "names", "lengths", "garbage", "zips", "videos")


def test_a_sample_of_wrong_requests(tmp_path: Path, tiny_home: Path) -> None:
    with serving_target(Base.made(tmp_path / "base", tiny_home), tmp_path / "data") as target:
        faults, seen = attack(target, QUICK, 30, seed=3)
        assert not faults
        assert sum(statuses.total() for statuses in seen.values()) == 30
        assert target.server.process.poll() is None


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
