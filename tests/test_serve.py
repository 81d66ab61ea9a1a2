"""`trt-wan serve`: a real server, a real worker, a real database."""

import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import cv2
import httpx
import made_clips
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from serving import SHORT, Server, error, ok, serving, zipped
from tiny_job import FRAMES, PLAN, TRT_WAN, prepare, read_frames, write_reference, write_sound

from trt_wan.cli.main import cli
from trt_wan.cli.serve import _require_jobs
from trt_wan.errors import OutputError
from trt_wan.preprocess.clips.keypoints import FoundPeople, write_keypoints
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.runtime.events import silent
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.serve.check import suffix_of
from trt_wan.serve.database import Database
from trt_wan.serve.fields import FieldError, options_given, options_of
from trt_wan.serve.guard import is_token
from trt_wan.serve.orders import command_of, require_limits, told
from trt_wan.serve.settings import Limits, ServeSettings
from trt_wan.serve.store import Store
from trt_wan.serve.warm_up import warm_up

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    tone = write_sound(folder.parent / "tone.m4a", 1)
    return prepare(folder, tone)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path, weights: Path) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("data"), tiny_home, "--weights", str(weights), "--max-steps=999"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def prepared(server: Server, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of an uploaded .zip."""
    packed = zipped(clips, tmp_path_factory.mktemp("zip") / "clips")
    return str(server.upload(packed)["id"])


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path, weights: Path, clips: Path) -> bytes:
    """What `trt-wan run` makes of the same clips and settings."""
    output = tmp_path_factory.mktemp("run") / "out.mp4"
    command = [*TRT_WAN, "run", "--inputs", str(clips), "--weights", str(weights), "-o", str(output)]
    command += [f"--window={PLAN.frames}", "--steps=1", "--seed=5", "--no-sidecar"]
    environment = os.environ | {"TRT_WAN_HOME": str(tiny_home), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return output.read_bytes()


def test_the_openai_client_makes_a_video(server: Server, prepared: str, wanted: bytes) -> None:
    client = openai.OpenAI(base_url=f"{server.address}v1", api_key="any")
    video = client.videos.create(
        prompt="", extra_body={"control_reference": prepared, "seed": 5, "num_inference_steps": 1}
    )
    assert video.status in ("queued", "in_progress") and video.object == "video"
    with pytest.raises(openai.ConflictError, match="The video is"):
        client.videos.download_content(video.id)
    while video.status in ("queued", "in_progress"):
        time.sleep(0.1)
        video = client.videos.retrieve(video.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    content = client.videos.download_content(video.id).read()
    assert len(content) > 1000 and video.size == f"{PLAN.width}x{PLAN.height}"
    assert video.id in [one.id for one in client.videos.list()]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    assert not (server.data / "jobs" / video.id).exists()


def test_the_example_of_the_readme(server: Server, clips: Path, tmp_path: Path) -> None:
    """With prepared clips, which bring their picture, in place of a clip in which people must be found."""
    (example,) = re.findall(r"```python\n(import openai\n.*?)```", README, re.DOTALL)
    zipped(clips, tmp_path / "clips").rename(tmp_path / "dance.mp4")
    for written, here in (
        ("http://127.0.0.1:8000/", server.address),
        ('    input_reference=open("character.png", "rb"),\n', ""),
        ('"num_inference_steps": 4', '"num_inference_steps": 1'),
    ):
        assert written in example
        example = example.replace(written, here)
    subprocess.run([sys.executable, "-W", "ignore", "-c", example], cwd=tmp_path, check=True)
    assert len(read_frames(tmp_path / "out.mp4")) == FRAMES


def test_a_video_has_the_bits_of_run(server: Server, prepared: str, wanted: bytes, tmp_path: Path) -> None:
    job = server.ended(server.video(control_reference=prepared, seed=5))
    assert job["frames"] == FRAMES
    assert job["notes"] == ["Not used in the mode animate: src_bg.mp4, src_mask.mp4."]
    (tmp_path / "served.mp4").write_bytes(server.content(job))
    (tmp_path / "run.mp4").write_bytes(wanted)
    assert (read_frames(tmp_path / "served.mp4") == read_frames(tmp_path / "run.mp4")).all()


@pytest.mark.long
def test_ranges_of_the_video(server: Server, prepared: str) -> None:
    job = server.ended(server.video(control_reference=prepared))
    whole = server.content(job)
    part = server.client.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-type"] == "video/mp4"


@pytest.mark.long
def test_sync_returns_the_video(server: Server, clips: Path, prepared: str) -> None:
    answer = server.client.post(
        "/v1/videos/sync", data={"control_reference": prepared, "num_inference_steps": "1"}
    )
    assert answer.status_code == 200 and answer.content[4:8] == b"ftyp"


def test_a_form_with_uploads_of_its_own(server: Server, clips: Path, tmp_path: Path) -> None:
    packed = zipped(clips, tmp_path / "mine")
    form = {"prompt": 'a "quote"', "extra_params": json.dumps({"steps": 1, "pose_strength": 0.5})}
    with packed.open("rb") as file:
        job = ok(server.client.post("/v1/videos", data=form, files={"control_reference": file}))
    done = server.ended(job)
    assert done["status"] == "completed" and done["settings"]["pose_strength"] == 0.5
    assert done["names"] == {"control_reference": "mine.zip"} and done["uploads"] == {}


def test_preparing_and_then_a_video(server: Server, tmp_path: Path) -> None:
    """With keypoints in a file no network is needed."""
    size, frames = (128, 96), 13
    made_clips.write_clip(tmp_path / "clip.mp4", size=size, frames=frames)
    write_reference(tmp_path / "ref.png", size=size)
    pictures = read_frames(tmp_path / "clip.mp4")
    people = list(made_clips.FakePeople().follow(pictures, PersonChoice(), silent))
    write_keypoints(tmp_path / "keypoints.json", FoundPeople(people, size, None, (64, 48)))
    names = ("ref.png", "clip.mp4", "keypoints.json")
    picture, clip, keypoints = (server.upload(tmp_path / name)["id"] for name in names)
    plain = {"input_reference": picture, "control_reference": clip, "size": "64x48"}
    answer = server.client.post("/v1/preparations", json=plain)
    assert find_spec("mediapipe") or "find people" in error(answer)["message"]
    paint = np.zeros((*size[::-1], 4), np.uint8)
    paint[:, :64] = 255
    cv2.imwrite(str(tmp_path / "paint.png"), paint)
    more = {"mask_paint": server.upload(tmp_path / "paint.png")["id"], "segmenter": "box"}
    fields = {**plain, "control_type": "replace", "extra_params": {**more, "keypoints": keypoints}}
    job = ok(server.client.post("/v1/preparations", json=fields))
    early = server.client.post("/v1/videos", json={**SHORT, "preparation": job["id"]})
    assert early.status_code == 200 or error(early)["param"] == "preparation"
    done = server.ended(job)
    assert (done["status"], done["error"], done["frames"]) == ("completed", None, frames)
    assert {"src_mask.mp4", "src_bg.mp4", "preview.mp4", "keypoints.json"} <= set(done["files"])
    mask = server.client.get(f"/v1/preparations/{job['id']}/files/src_mask.mp4")
    (tmp_path / "mask.mp4").write_bytes(mask.content)
    assert (read_frames(tmp_path / "mask.mp4")[:, :, :28] > 128).all(), "painted"
    video = server.ended(server.video(preparation=job["id"]))
    assert (video["status"], video["error"]) == ("completed", None)
    assert video["settings"]["mode"] == "replace" and video["uploads"]["mask_paint"] == more["mask_paint"]
    answer = server.client.post("/v1/videos", json={"preparation": job["id"], "extra_params": {"grow": 3}})
    assert error(answer)["param"] == "grow"


@pytest.mark.long
def test_again_with_another_seed(server: Server, prepared: str) -> None:
    first = server.ended(server.video(control_reference=prepared, seed=5, prompt="one"))
    second = server.ended(server.video(source=first["id"], seed=6))
    third = server.ended(server.video(source=first["id"]))
    assert second["settings"] == first["settings"] | {"seed": 6} and second["source"] == first["id"]
    assert server.content(second) != server.content(first)
    server.client.delete(f"/v1/videos/{first['id']}")
    assert server.content(third), "a job needs no other job's files"


def test_redo_renders_one_window_again(server: Server, prepared: str, tmp_path: Path) -> None:
    first = server.ended(server.video(control_reference=prepared, seed=5))
    again = server.ended(
        ok(server.client.post("/v1/videos", json={"source": first["id"], "redo": [2], "seed": 9}))
    )
    assert again["status"] == "completed", again["error"]
    for job in (first, again):
        (tmp_path / f"{job['id']}.mp4").write_bytes(server.content(job))
    before, after = (read_frames(tmp_path / f"{job['id']}.mp4") for job in (first, again))
    assert (before[: PLAN.frames] == after[: PLAN.frames]).all() and (before[-1] != after[-1]).any()
    answer = server.client.post(
        "/v1/videos", json={"source": first["id"], "redo": [2], "num_inference_steps": 3}
    )
    assert error(answer)["param"] == "num_inference_steps"


def test_events_tell_every_change(server: Server, prepared: str) -> None:
    job = server.video(control_reference=prepared, num_inference_steps=2)
    states: list[dict[str, Any]] = []
    with server.client.stream("GET", f"/v1/videos/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                states.append(json.loads(line[6:]))
    assert states[-1]["status"] == "completed" and states[-1]["progress"] == 100
    progress = [state["progress"] for state in states]
    assert progress == sorted(progress) and any(state["step"] for state in states)


def test_a_waiting_and_a_running_job_are_cancelled(server: Server, prepared: str) -> None:
    running = server.video(control_reference=prepared, num_inference_steps=900)
    waiting = server.video(control_reference=prepared, num_inference_steps=900)
    assert waiting["queue_position"] is not None
    ended = ok(server.client.post(f"/v1/videos/{waiting['id']}/cancel"))
    assert ended["status"] == "cancelled"
    server.until(running, lambda now: now["step"] > 0)
    server.client.post(f"/v1/videos/{running['id']}/cancel")
    assert server.ended(running)["status"] == "cancelled"
    again = ok(server.client.post(f"/v1/videos/{running['id']}/cancel"))
    assert again["status"] == "cancelled"
    assert server.ended(server.video(control_reference=prepared))["status"] == "completed"


@pytest.mark.long
def test_a_running_job_is_deleted(server: Server, prepared: str) -> None:
    job = server.video(control_reference=prepared, num_inference_steps=900)
    server.until(job, lambda now: now["step"] > 0)
    assert ok(server.client.delete(f"/v1/videos/{job['id']}"))["deleted"]
    for _ in range(200):
        if server.client.get(f"/v1/videos/{job['id']}").status_code == 404:
            break
        time.sleep(0.05)
    assert not (server.data / "jobs" / job["id"]).exists()


@pytest.mark.long
def test_the_worker_dies_and_the_job_goes_on(server: Server, prepared: str) -> None:
    job = server.video(control_reference=prepared, num_inference_steps=10)
    server.until(job, lambda now: now["step"] > 2)
    children = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "trt_wan.worker.child"], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    assert server.ended(job)["status"] == "completed"
    assert "worker_deaths_total 1.0" in server.client.get("/metrics").text


def test_a_killed_server_goes_on(
    tmp_path: Path, tiny_home: Path, weights: Path, clips: Path, wanted: bytes
) -> None:
    packed = zipped(clips, tmp_path / "clips")
    with serving(tmp_path / "data", tiny_home, "--weights", str(weights)) as server:
        prepared = server.upload(packed)["id"]
        jobs = [server.video(control_reference=prepared, num_inference_steps=n) for n in (100, 1)]
        server.until(jobs[0], lambda now: now["frames_done"] > 0)
        preview = server.client.get(f"/v1/videos/{jobs[0]['id']}/preview")
        server.process.kill()
        server.process.wait()
    (tmp_path / "preview.mp4").write_bytes(preview.content)
    assert len(read_frames(tmp_path / "preview.mp4")) == PLAN.frames
    rows = sqlite3.connect(tmp_path / "data" / "server.sqlite3").execute("SELECT status FROM jobs").fetchall()
    assert [row[0] for row in rows] == ["in_progress", "queued"]
    with serving(tmp_path / "data", tiny_home, "--weights", str(weights)) as server:
        done = [server.ended(job) for job in jobs]
        assert [job["status"] for job in done] == ["completed", "completed"]
        assert server.client.get(f"/v1/files/{prepared}").status_code == 200


def test_clips_that_would_do_nothing_are_refused(server: Server, prepared: str, clips: Path) -> None:
    """Uploads win over the source's, or are refused: none is left aside, in whatever order they come."""
    picture = server.upload(clips / "src_ref.png")["id"]
    clip = server.upload(clips / "src_pose.mp4")["id"]
    done = server.ended(server.video(control_reference=prepared))
    source = {"source": done["id"]}
    for fields, param in (
        ({"input_reference": picture, "control_reference": prepared}, "input_reference"),
        ({**source, "input_reference": picture}, "input_reference"),
        ({**source, "control_reference": clip}, "control_reference"),
        ({**source, "extra_params": {"mask_paint": picture}}, "mask_paint"),
        ({**source, "redo": [1], "input_reference": picture}, "input_reference"),
        ({**source, "redo": [1], "control_reference": prepared}, "control_reference"),
        ({**source, "redo": []}, "redo"),
        ({**source, "redo": [3]}, "redo"),
        ({**source, "redo": [0]}, "redo"),
        ({"control_reference": prepared, "extra_params": {"steps": "1000"}}, "steps"),
        ({"control_reference": prepared, "extra_params": {"window": "4001"}}, "window"),
        ({"control_reference": prepared, "extra_params": {"clip_tiles": "16"}}, "clip_tiles"),
        ({"control_reference": prepared, "seed": 2**64}, "seed"),
        ({"control_reference": "https://example.org/a.mp4"}, "control_reference"),
        ({"control_reference": prepared, "\ud800": 1}, "?"),
    ):
        assert (
            error(server.client.post("/v1/videos", content=json.dumps(fields), headers=JSON))["param"]
            == param
        )
    # A picture and a clip in place of the zip: these must be prepared, for which nothing is here.
    answer = server.client.post(
        "/v1/videos", json={**source, "input_reference": picture, "control_reference": clip}
    )
    assert answer.status_code == 200 or "find people" in error(answer)["message"]
    assert "no field file" in error(server.client.post("/v1/files", data={"purpose": "x"}))["message"]
    for body in ({"file": 5}, {"file": ["x"]}, {"file": {"url": "x"}}, {"purpose": {"a": 1}}):
        error(server.client.post("/v1/files", json=body))


JSON = {"Content-Type": "application/json"}


def test_lists_and_objects_of_the_openai_client(server: Server, prepared: str, clips: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.address}v1", api_key="any")
    more = {"control_reference": prepared, "num_inference_steps": 1, "extra_params": {"pose_strength": 0.5}}
    lasting = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(
        file=("a.png", (clips / "src_ref.png").read_bytes()), purpose="user_data", expires_after=lasting
    )  # type: ignore[arg-type]
    assert file.filename == "a.png"
    first = server.ended({"object": "video", "id": client.videos.create(prompt="", extra_body=more).id})
    assert first["settings"]["pose_strength"] == "0.5" and first["windows"] == 2
    again = {"source": first["id"], "redo": [2], "seed": 3}
    second = server.ended({"object": "video", "id": client.videos.create(prompt="", extra_body=again).id})
    assert (second["status"], second["redo"]) == ("completed", [2])
    assert client.models.retrieve("wan2.2-animate-14b").id == "wan2.2-animate-14b"


def test_an_end_cuts_prepared_clips(server: Server, prepared: str) -> None:
    done = server.ended(server.video(control_reference=prepared, num_frames=5))
    assert (done["status"], done["frames"]) == ("completed", 5)


class TestRefusals:
    def test_each_names_its_field(self, server: Server, prepared: str) -> None:
        for fields, param in (
            ({"control_reference": prepared, "extra_params": {"weights": "/etc"}}, "weights"),
            ({"control_reference": prepared, "extra_params": {"output": "/tmp/x.mp4"}}, "output"),
            ({"control_reference": prepared, "extra_params": {"stepps": 3}}, "stepps"),
            ({"control_reference": prepared, "extra_params": {"grow": 5}}, None),
            ({"control_reference": prepared, "num_inference_steps": 1000}, "steps"),
            ({"control_reference": prepared, "seed": -1}, "seed"),
            ({"control_reference": prepared, "size": "8x8x8"}, "size"),
            ({"control_reference": prepared, "lora": "none"}, "lora"),
            ({"control_reference": prepared, "prompt": "\0"}, "prompt"),
            ({"control_reference": prepared, "fields": 1}, "fields"),
            ({"prompt": "x"}, "input_reference"),
            ({"input_reference": prepared}, "input_reference"),
        ):
            told = error(server.client.post("/v1/videos", json=fields))
            assert told["param"] == param or param is None, (fields, told)
            assert 0 < len(told["message"]) < 400 and str(server.data) not in json.dumps(told), told

    def test_ids_that_are_none(self, server: Server) -> None:
        assert error(server.client.get("/v1/videos/x"), 404)["message"] == "There is no video x."
        assert error(server.client.get("/v1/videos/..%2f..%2fetc"), 404)
        assert error(server.client.get("/v1/preparations/prep_0/files/..%2fserver.sqlite3"), 404)
        assert error(server.client.post("/v1/videos", json={"control_reference": "file_0"}), 404)

    def test_other_pages_and_names(self, server: Server) -> None:
        evil = server.client.post("/v1/videos", json={}, headers={"Origin": "https://evil.example"})
        assert error(evil, 403)["code"] == "origin_refused"
        rebound = server.client.get("/v1/videos", headers={"Host": "evil.example"})
        assert error(rebound, 403)["code"] == "host_refused"
        assert "access-control-allow-origin" not in server.client.get("/health").headers

    def test_a_promise_of_ten_gigabytes(self, server: Server) -> None:
        place = urlsplit(server.address)
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 413")

    def test_uploads(self, server: Server, tmp_path: Path) -> None:
        bomb = io.BytesIO()
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../src_ref.png", b"\0" * 10_000_000)
        for name, data in (
            ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
            ("empty.png", b""),
            ("bomb.zip", bomb.getvalue()),
            ("cut.mp4", b"\0\0\0\x20ftypisom" + b"\0" * 100),
            ("<img src=x>.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 64),
        ):
            answer = server.client.post("/v1/files", files={"file": (name, data)})
            told = error(answer)
            assert told["message"] and str(server.data) not in json.dumps(told)
        assert not any((server.data / "incoming").iterdir())


class TestToken:
    @pytest.fixture(scope="class")
    @staticmethod
    def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path, weights: Path) -> Iterator[Server]:
        data = tmp_path_factory.mktemp("guarded")
        with serving(data, tiny_home, "--weights", str(weights), token="correct horse") as made:
            yield made

    def test_it_is_needed(self, guarded: Server) -> None:
        assert ok(guarded.client.get("/v1/videos"))["data"] == []
        for token in ("x", "wrong", "correct hors", "correct horse!"):
            bare = httpx.get(f"{guarded.address}v1/videos", headers={"Authorization": f"Bearer {token}"})
            assert error(bare, 401)["code"] == "unauthorised"
        assert httpx.get(f"{guarded.address}health").status_code == 200
        assert error(httpx.get(f"{guarded.address}metrics"), 401)

    def test_a_browser_gets_a_cookie(self, guarded: Server) -> None:
        with httpx.Client(base_url=guarded.address) as browser:
            assert error(browser.post("/session", json={"token": "wrong"}), 401)
            ok(browser.post("/session", json={"token": "correct horse"}))
            assert ok(browser.get("/v1/videos"))["object"] == "list"

    def test_is_token(self) -> None:
        assert is_token("a", "a") and not is_token("b", "a") and not is_token(None, "a")
        assert not is_token("ä", "a")


def test_an_address_for_others_needs_a_token(tmp_path: Path, tiny_home: Path, weights: Path) -> None:
    options = ("--weights", str(weights), "--host", "0.0.0.0")
    with serving(tmp_path, tiny_home, *options) as server:
        port = server.address.rstrip("/").rpartition(":")[2]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/videos").status_code == 401


@pytest.mark.parametrize(
    "options, told",
    [
        (("--token", "short"), "8 letters"),
        (("--token", "пароль-токен"), "ASCII"),
        (("--steps", "5000"), "steps"),
        (("--window", "10"), "window"),
        (("--preset", "fast4"), "LoRA"),
        (("--max-disk", "nan"), "nan"),
        (("--allow-origin", "foo"), "origin"),
        (("--detector", "/nope.onnx"), "nope.onnx"),
    ],
)
def test_settings_that_no_job_could_use(
    options: tuple[str, ...], told: str, weights: Path, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(
        cli, ["serve", "--data", str(tmp_path / "new"), "--weights", str(weights), *options]
    )
    assert ran.exit_code in (1, 2) and told in ran.output and "Traceback" not in ran.output, ran.output


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    """The folders of a lost database were removed."""
    (tmp_path / "jobs" / "important").mkdir(parents=True)
    with pytest.raises(OutputError, match="no server.sqlite3"):
        Store(tmp_path, Limits())
    assert (tmp_path / "jobs" / "important").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "server.sqlite3").write_bytes(b"no database, as long as a page" * 200)
    with pytest.raises(OutputError, match="cannot be used"):
        Store(tmp_path / "other", Limits())


def test_one_server_per_folder(server: Server, tiny_home: Path, weights: Path) -> None:
    command = [*TRT_WAN, "serve", "--data", str(server.data), "--weights", str(weights), "--port", "0"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRT_WAN_HOME": str(tiny_home)}
    )
    assert ran.returncode == 1 and "Another server uses" in ran.stderr


def test_files_of_an_identity_go_to_jobs_with_one(tmp_path: Path) -> None:
    of_identity = ["--lynx=/lynx", "--face-embedder=/net.onnx"]
    settings = ServeSettings(tmp_path, model=("--tier=fast", *of_identity))
    request: dict[str, Any] = {"options": {}, "redo": [], "inputs": True, "loras": [], "files": []}

    def given(**changed: Any) -> list[str]:
        made = command_of("video", request | changed, tmp_path, settings, again=False)
        assert "--tier=fast" in made
        return [option for option in made if option in of_identity]

    assert given() == []
    assert given(files=["identity.png"]) == of_identity
    assert given(files=["source.mp4"], redo=[1]) == of_identity  # its source may have an identity
    small = {"size": "64x48", "window": 5}
    settings = ServeSettings(tmp_path, model=(f"--lynx={tmp_path}", "--random-weights=tiny"), defaults=small)
    _require_jobs(settings)
    worker: Any = SimpleNamespace(run=lambda id, command, _: {"command": command})
    warm = warm_up("warm", worker, settings, tmp_path)
    assert warm is not None and not any("lynx" in option for option in warm["command"])


def test_options_are_those_of_the_command_line() -> None:
    """Every option is open to clients, or in a list of those that are not."""
    closed = {"weights", "output", "inputs", "vram", "executor", "build", "detector", "overwrite", "frames"}
    for kind in ("video", "preparation"):
        known = set(options_of(kind))  # type: ignore[arg-type]
        assert not known & closed and {"size", "point", "grow"} <= known
    from trt_wan.serve.fields import VideoFields

    fields = VideoFields(num_inference_steps=4, extra_params={"hands": False, "guidance": [5, 1]})
    assert options_given("video", fields) == {"steps": 4, "hands": False, "guidance": [5, 1]}


def test_a_message_names_no_folder_of_the_server(tmp_path: Path) -> None:
    error = OutputError(
        f"{tmp_path}/jobs/a/clip.mp4 and {tmp_path}/x", f"Look.\ntrt-wan run {tmp_path}/jobs/b"
    )
    made = told(error, tmp_path / "jobs" / "a", tmp_path)
    assert (made["message"], made["hint"]) == ("clip.mp4 and …/x", "Look.")


def test_the_size_of_clips_that_were_allowed_before_is_not_asked_again() -> None:
    params, facts = {"size": (832, 480), "rate": None}, {"frames": 5}
    require_limits(params, None, facts, None, Limits(pixels=3000))
    with pytest.raises(FieldError, match="3000 pixels"):
        require_limits(params, None, facts, (832, 480), Limits(pixels=3000))


def test_the_queue_keeps_its_order(tmp_path: Path) -> None:
    database = Database(tmp_path / "jobs.sqlite3")
    for name in "abc":
        assert database.add_job(name, "video", {}, most_waiting=3) is not None
    assert database.add_job("d", "video", {}, most_waiting=3) is None
    taken = database.take_next()
    assert taken is not None and taken.id == "a"
    assert [job.id for job in database.begin_again()] == ["a"]
    again = database.take_next()
    assert again is not None and again.id == "a", "in its old place"
    assert database.end_queued("a") is None and database.end_queued("b") is not None
    found = database.jobs("video", 2, after="c")
    assert found is not None and [job.id for job in found] == ["b", "a"]
    assert database.jobs("video", 2, after="z") is None and database.is_whole()


@pytest.mark.parametrize(
    "head, kind",
    [(b"\0\0\0\x18ftypmp42", "clip"), (b"\x89PNG\r\n\x1a\n", "picture"), (b"PK\x03\x04", "prepared")],
)
def test_kinds_by_first_bytes(head: bytes, kind: str) -> None:
    assert suffix_of(head)[0] == kind
