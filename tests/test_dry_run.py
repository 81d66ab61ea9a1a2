"""`run --dry-run` tells the windows and the needs of a job, and makes nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from made_clips import write_clip, write_reference
from tiny_job import PLAN, RATE, prepare, write_sound

from trt_wan.cli.dry_run import _seconds, forecast
from trt_wan.cli.main import cli
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import CameraPlan, Plan
from trt_wan.errors import MemoryShort
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.executors.onnxruntime import least_memory
from trt_wan.runtime.identity import FaceIdentity
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.lynx import LynxSearch
from trt_wan.runtime.opening.model import Basis, OpenWeights
from trt_wan.runtime.opening.residency import weight_bytes
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.camera_weights import CameraWeights
from trt_wan.runtime.weights.sources import RandomSource
from trt_wan.runtime.windows import Windows

JOB = Job(Inputs(Path("r.png"), Path("p.mp4"), None), window=13, steps=4, guidance=3)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    folder = tmp_path / "place"
    prepare(folder / "clips", write_sound(tmp_path / "tone.m4a", 1), 40)
    write_reference(folder / "character.png", (128, 96))
    write_clip(folder / "dance.mp4", 60)
    monkeypatch.chdir(folder)
    return folder


def dry_run(*arguments: str) -> dict[str, Any]:
    options = ("--random-weights", "tiny", "-o", "out.mp4", "--steps", "3", "--dry-run", "--json")
    result = CliRunner().invoke(cli, ["run", *arguments, *options])
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])["data"]
    return data


def test_prepared_clips(place: Path) -> None:
    before = set(place.rglob("*"))
    told = dry_run("--inputs", "clips", "--window", "13", "--overlap", "5", "--guidance", "2")
    windows = Windows(40, 13, 5).total
    assert (told["frames"], told["width"], told["height"], told["windows"]) == (40, 64, 48, windows)
    assert told["evaluations"] == windows * 3 * 2 and told["memory"] == least_memory(TINY, PLAN)
    assert len(told["missing_graphs"]) > 20 and told["engines"] == [] and told["seconds"] is None
    assert set(place.rglob("*")) == before and not (place.parent / "home").exists()


def test_frames_before_the_clip_count(place: Path) -> None:
    """A clip of 13 frames is one window, unless frames of another video come before it."""
    write_clip(place / "first.mkv", 9, (64, 48), RATE)
    short = ("--inputs", "clips", "--window", "13", "--overlap", "5", "--end", "13")
    assert dry_run(*short)["windows"] == 1
    assert dry_run(*short, "--extend", "first.mkv")["windows"] == Windows(18, 13, 5).total == 2


def test_a_last_window_of_few_frames_is_told(place: Path) -> None:
    given = ["--random-weights", "tiny", "-o", "out.mp4", "--inputs", "clips", "--window", "13", "--dry-run"]
    for end, told in (("25", False), ("26", True), ("29", False)):
        result = CliRunner().invoke(cli, ["run", *given, "--end", end])
        assert ("The last of 3 windows adds 1 frame and" in result.output) == told, result.output


def test_clips_that_are_not_prepared(place: Path) -> None:
    """The size and the number of frames that preparing would give; no person is looked for."""
    before = set(place.rglob("*"))
    told = dry_run("character.png", "dance.mp4", "--size", "64x48", "--window", "13", "--rate", "15")
    assert (told["width"], told["height"], told["frames"]) == (64, 48, 75), "60 frames at 12 a second"
    assert set(place.rglob("*")) == before


def test_the_frames_before_the_clip_and_those_of_whole_windows_count(place: Path) -> None:
    told = dry_run("--inputs", "clips", "--window", "13", "--compat", "kijai")
    assert (told["frames"], told["windows"]) == (37, 3), "40 frames are rounded down to 37"
    told = dry_run("--inputs", "clips", "--window", "13", "--end", "13", "--extend", "clips/src_pose.mp4")
    assert (told["frames"], told["windows"]) == (13, 2), "one frame is carried over into the first window"


def test_resume_changes_no_forecast_and_a_note_says_so(place: Path) -> None:
    job = ["--inputs", "clips", "--random-weights", "tiny", "-o", "out.mp4", "--window", "13"]
    result = CliRunner().invoke(cli, ["run", *job, "--resume", "--dry-run"])
    assert result.exit_code == 0 and "forecast is of all windows" in result.stderr


def test_what_the_job_refuses_is_refused(place: Path) -> None:
    for more, code in (
        (["--window", "12"], 2),
        (["--seed", "x"], 2),
        (["-o", "no/out.mp4"], 1),
        (["--extend", "clips/src_face.mp4"], 1),
        (["--start-frame", "character.png"], 1),
        (["--init", "dance.mp4", "--start-step", "1"], 1),
    ):
        arguments = [
            "run",
            "--inputs",
            "clips",
            "--random-weights",
            "tiny",
            "-o",
            "o.mp4",
            "--dry-run",
            *more,
        ]
        assert CliRunner().invoke(cli, arguments).exit_code == code


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--extend", "clips/src_pose.mp4"], "has 29.97 frames per second, and the clips"),
        (["--init", "clips/src_pose.mp4", "--start-step", "1"], "has 40 frames, and the clips will have 60"),
    ],
)
def test_a_video_that_does_not_fit_is_refused_before_clips_are_made(
    place: Path, more: list[str], says: str, dry: list[str]
) -> None:
    job = ["character.png", "dance.mp4", "--random-weights", "tiny", "-o", "o.mp4", "--size", "64x48"]
    result = CliRunner().invoke(cli, ["run", *job, *more, *dry])
    assert result.exit_code == 1 and says in result.stderr and not (place / "o.inputs").exists()


def a_basis(free: float) -> Any:
    gpu: Any = SimpleNamespace(name="GPU", capability=(9, 0), driver=13, free_bytes=lambda: free)
    flavour: Any = SimpleNamespace(name="tensorrt_rtx", version="1")
    tokenizer: Any = None
    camera = CameraWeights(TINY, WeightFiles(random="tiny"), "bf16")
    lynx = LynxSearch(random=True)
    weights = OpenWeights(TINY, {}, RandomSource(0), tokenizer, camera, lynx=lynx)
    settings = Settings(keep_encoders=False)
    return Basis(weights, (gpu, flavour), "bf16", settings, WeightFiles(random="tiny"))


def test_the_memory_of_a_gpu_is_planned_as_before_a_job(place: Path) -> None:
    roomy = forecast(a_basis(20e9), JOB, 64, 48, 40)[1]
    assert roomy["engines"] is None and roomy["streamed_blocks"] == 0, "unknown without the graphs"
    assert 0.7e9 < roomy["memory"] < 1e9, "mostly the context"
    face = replace(JOB, identity=FaceIdentity(Path("face.png")))
    assert forecast(a_basis(20e9), face, 64, 48, 40)[1]["memory"] > roomy["memory"] + 4e6, "keys of a face"
    with pytest.raises(MemoryShort, match="even if all blocks stream"):
        forecast(a_basis(0.7e9), JOB, 64, 48, 40)


def test_the_adapters_of_an_identity_are_told(place: Path) -> None:
    identity = ("--identity", "character.png", "--identity-landmarks", "30,30,60,30,45,45,33,60,57,60")
    shared = ("--inputs", "clips", "--window", "13")
    told = dry_run(*shared, *identity)["identity"]
    assert (told["ip"], told["ref"], told["kind"]) == (False, True, "full")
    assert told["text"].endswith("no IP adapter: there is no --face-embedder")
    assert "identity" not in dry_run(*shared)
    options = ("--random-weights", "tiny", "-o", "out.mp4", "--dry-run")
    done = CliRunner().invoke(cli, ["run", *shared, *identity, *options])
    assert re.search(r"identity +the ref adapter \(of a picture, scale 1\)", done.output), done.output


def test_the_memory_and_the_graphs_of_a_camera(place: Path) -> None:
    """Its weights but for those that pass, and its arrays; off it needs nothing."""
    plain, off, acting = (
        forecast(a_basis(20e9), replace(JOB, camera=camera), 64, 48, 40)[1]
        for camera in (None, Camera(strength=0), Camera())
    )
    assert off == plain
    plan = CameraPlan.beside(Plan(64, 48, 13, "bf16"), TINY.camera.ffn_dim)
    weights = weight_bytes(networks(TINY, plan))
    more = sum(weights.values()) - weights["uni3c_modulation"]
    assert 0 < more <= acting["memory"] - plain["memory"] < 2 * more
    assert len(acting["missing_graphs"]) == len(plain["missing_graphs"]) + 6
    times = dict.fromkeys(("uni3c_add", "uni3c_attention"), 1.0)
    camera = replace(JOB, camera=Camera(end=10))  # the first of four steps, which are guided
    total, unmeasured = _seconds(a_basis(1), Plan(64, 48, 13), camera, [13], times)
    assert total == (2 + 1) * TINY.camera.layers and "uni3c_out" in unmeasured


def test_memory_that_does_with_the_vae_in_tiles(place: Path) -> None:
    job = replace(JOB, window=9, guidance=1.0)
    whole = forecast(a_basis(0.807e9), job, 512, 128, 40)[1]
    text, tiled = forecast(a_basis(0.79e9), job, 512, 128, 40)
    assert not whole["vae_tiles"]
    assert tiled["vae_tiles"] and "the VAE computes in two tiles" in text
    assert len(tiled["missing_graphs"]) == len(whole["missing_graphs"]) + 4


def test_time_is_that_of_every_call_of_the_measured_networks() -> None:
    layers, lengths = TINY.transformer.layers, [13] * 3
    times = {"ffn": 0.002, "head": 0.5, "vae_decode_first": 7.0, "image_embed": 11.0}
    total, unmeasured = _seconds(a_basis(1), Plan(64, 48, 13), JOB, lengths, times)
    steps = 3 * 4 * 2  # the guidance doubles them
    assert total == pytest.approx(steps * (0.002 * layers + 0.5) + 3 * 7 + 11)
    assert "attention" in unmeasured and "ffn" not in unmeasured and "text_embed" not in unmeasured
    assert _seconds(a_basis(1), Plan(64, 48, 13), JOB, lengths, {})[0] is None
    basis = replace(a_basis(1), settings=Settings(tier="turbo"))
    times = {"attention": 1.0, "sparse_attention": 100.0}
    sparse = 3 * 3 * 2 * (layers - 2)  # all but the first of four steps, all but two blocks
    total, unmeasured = _seconds(basis, Plan(64, 48, 13), JOB, lengths, times)
    assert total == steps * layers - sparse + 100 * sparse and "sparse_attention" not in unmeasured
    assert "sparse_attention" in _seconds(basis, Plan(64, 48, 13), JOB, lengths, {"attention": 1.0})[1]
