"""A real server of `trt-wan serve` in a process of its own, with the tiny model, for tests."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tiny_job import PLAN, TRT_WAN

SECONDS = 60.0  # for a job of the tiny model on a busy machine
SHORT: dict[str, Any] = {"num_inference_steps": 1}


@dataclass
class Server:
    address: str
    data: Path
    process: "subprocess.Popen[str]"
    client: httpx.Client
    headers: dict[str, str] = field(default_factory=dict)

    def upload(self, path: Path, name: str | None = None) -> dict[str, Any]:
        with path.open("rb") as file:
            return ok(self.client.post("/v1/files", files={"file": (name or path.name, file)}))

    def video(self, **fields: Any) -> dict[str, Any]:
        return ok(self.client.post("/v1/videos", json={**SHORT, **fields}))

    def ended(self, job: dict[str, Any], seconds: float = SECONDS) -> dict[str, Any]:
        return self.until(job, lambda now: now["status"] in ("completed", "failed", "cancelled"), seconds)

    def until(self, job: dict[str, Any], is_so: Any, seconds: float = SECONDS) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = ok(self.client.get(f"/v1/{job['object']}s/{job['id']}"))
            if is_so(now):
                return now
            assert now["status"] in ("queued", "in_progress"), now
            time.sleep(0.05)
        raise AssertionError(f"after {seconds} s: {now}")

    def content(self, job: dict[str, Any]) -> bytes:
        answer = self.client.get(f"/v1/videos/{job['id']}/content")
        assert answer.status_code == 200, answer.text
        return answer.content


def ok(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
    return answer.json()  # type: ignore[no-any-return]


def error(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, f"{answer.status_code} {answer.text}"
    return answer.json()["error"]  # type: ignore[no-any-return]


@contextmanager
def serving(data: Path, home: Path, *options: str, token: str | None = None) -> Iterator[Server]:
    """The server, until the end of the block."""
    command = [*TRT_WAN, "serve", "--json", "--data", str(data), "--port", "0", *options]
    if not any(option.startswith(("--window", "--demo")) for option in options):
        command.append(f"--window={PLAN.frames}")
    environment = os.environ | {"TRT_WAN_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"TRT_WAN_TOKEN": token} if token else {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            if told.get("code") == "serving":
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()}: {line}")
        address = told["data"]["address"]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=address, timeout=60, headers=headers) as client:
            for _ in range(200):
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield Server(address, data, process, client, headers)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def zipped(folder: Path, target: Path) -> Path:
    return Path(shutil.make_archive(str(target.with_suffix("")), "zip", folder))
