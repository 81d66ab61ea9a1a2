"""The options of `run` about the camera: what they make of a job, what is refused, what a record keeps."""

from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_camera_slots import pictures

from trt_wan.cli import camera_options
from trt_wan.cli.camera_options import take_camera
from trt_wan.cli.dry_run import _camera_calls
from trt_wan.cli.main import cli
from trt_wan.cli.repeating import deciding, lasting
from trt_wan.cli.run import RunOptions, run
from trt_wan.engines.config import TINY
from trt_wan.errors import InputError, UsageError
from trt_wan.runtime import camera
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.kept.record import as_values
from trt_wan.runtime.video.camera_render import covering, opened_render

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), Path("face.mp4"))


def camera_of(*arguments: str) -> Camera | None:
    with run.make_context("run", ["-o", "o.mp4", *arguments]) as context:
        return take_camera(context.params)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(tmp_path / "still.png")
    return tmp_path / "still.png"


def test_the_options_of_a_camera(picture: Path) -> None:
    assert camera_of() is None
    for move in camera_options.MOVES:
        assert camera_of("--camera", move) == Camera(move)
    assert camera_options.MOVES == camera.MOVES == get_args(camera.Move)
    made = camera_of(
        *("--camera", str(picture), "--camera-strength", "0.5"),
        *("--camera-start", "20", "--camera-end", "60"),
    )
    assert made == Camera(picture, 0.5, 20, 60)
    assert RunOptions(camera=made).job(INPUTS) == Job(INPUTS, camera=made)
    assert picture in RunOptions(camera=made).files()
    assert RunOptions(camera=Camera("orbit")).files() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--camera-strength", "1"], "Without --camera --camera-strength would do nothing"),
        (["--camera-end", "10"], "Without --camera --camera-end would do nothing"),
        (["--camera", "static", "--camera-strength", "-1"], "A camera strength of -1.0"),
        (["--camera", "static", "--camera-strength", "nan"], "A camera strength of nan"),
        (["--camera", "static", "--camera-strength", "11"], "A camera strength of 11.0"),
    ],
)
def test_what_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        camera_of(*arguments)
    assert says in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [(0, 0.1, "less than a step"), (101, 100, "not possible"), (60, 10, "none is between")],
)
def test_percent_are_those_of_pose_and_face(start: float, end: float, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Job(INPUTS, camera=Camera("static", 1, start, end))
    assert "--camera-" in caught.value.hint or "Use" in caught.value.hint or "write" in caught.value.hint


def test_no_such_file_names_the_moves(tmp_path: Path) -> None:
    shown = CliRunner().invoke(run, ["-o", str(tmp_path / "o.mp4"), "--camera", "orbti"])
    assert shown.exit_code == 2 and "static, orbit, dolly" in shown.stderr


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    with pytest.raises(InputError, match="bad.mp4"):
        camera_of("--camera", str(bad))
    assert camera_of("--camera", str(bad), "--camera-strength", "0") == Camera(bad, 0)


def test_a_record_keeps_moves_as_words_and_files_as_files(picture: Path, tmp_path: Path) -> None:
    def kept(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
        with run.make_context("run", ["-o", "o.mp4", "--inputs", str(tmp_path), *arguments]) as context:
            left = lasting(context.params, tmp_path)
        return dict(left.options), dict(left.paths)

    options, paths = kept("--camera", "orbit", "--camera-end", "20")
    assert options == {"camera": "orbit", "camera_end": 20.0} and set(paths) == {"inputs"}
    options, paths = kept("--camera", str(picture))
    assert options == {"camera": picture.name} and paths["camera"] == str(picture)
    values = as_values(Job(INPUTS, camera=Camera("orbit", 2)))
    assert values["camera"] == {"render": "orbit", "strength": 2.0, "start": 0.0, "end": 100.0}
    for name in ("camera strength", "camera render", "render"):
        assert {"camera", "camera_strength", "camera_end"} <= deciding(name)
    assert "weights" in deciding("camera_control")


def test_a_file_of_another_shape_covers_the_frame(tmp_path: Path) -> None:
    """Its middle, and a note; a length that differs has one too."""
    wide = np.zeros((20, 80, 3), np.uint8)
    wide[:, 20:60] = 200
    np.testing.assert_array_equal(covering(wide, 40, 20), np.full((20, 40, 3), 200))
    assert covering(wide, 10, 30).shape == (30, 10, 3)
    clip = pictures(tmp_path / "clip", range(5))
    reference = np.zeros((32, 48, 3), np.uint8)
    with opened_render(Camera(clip), reference, (48, 32), 9, 1) as render:
        assert render is not None
        assert [note.code for note in render.notes] == ["camera_length", "camera_size"]
        assert render.frames([0, 8]).shape == (2, 32, 48, 3)
        assert render.frames([8]).max() == 4 * 4 and render.key([8]) == render.key([4]) != render.key([3])


def test_the_forecast_counts_its_calls() -> None:
    basis: Any = type("Basis", (), {"weights": type("Weights", (), {"config": TINY})})
    job = Job(INPUTS, steps=4, guidance=(3.0, 1.0), camera=Camera("static", end=25), window=13)
    layers = TINY.camera.layers
    assert _camera_calls(basis, job, [13, 13]) == {
        "uni3c_patch": 4,
        **dict.fromkeys(("uni3c_in", "uni3c_attention", "uni3c_out"), 4 * layers),
        "uni3c_add": 2 * 3 * layers,  # the first step twice: it is guided
    }
    assert _camera_calls(basis, Job(INPUTS), [13]) == {}


@pytest.mark.parametrize(
    ("value", "says"), [("17", "multiple of 16"), ("no.safetensors", "There is no file")]
)
def test_engines_for_a_file_or_a_number(value: str, says: str) -> None:
    shown = CliRunner().invoke(cli, ["build", "--model", "tiny", "--camera-control", value, "--dry-run"])
    assert shown.exit_code == 2 and says in shown.stderr


def test_click_knows_no_other_names() -> None:
    names = {str(param.name) for param in run.params if str(param.name).startswith("camera")}
    assert names == {"camera", "camera_control", *camera_options.FIELDS}
    assert isinstance(next(param for param in run.params if param.name == "camera"), click.Option)
