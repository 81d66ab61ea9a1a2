"""The options of `run` about guidance: what they make of a job, and what is refused."""

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from trt_wan.cli.guidance_options import CLIP_VISION, NAG, guided, with_guidance
from trt_wan.cli.run import RunOptions, run
from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.guidance import ClipVision, Nag
from trt_wan.runtime.job import Inputs, Job

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), Path("face.mp4"))


def job_of(*arguments: str) -> Job:
    known = (*RunOptions.__annotations__, *NAG, *CLIP_VISION, "nag_prompt")
    with run.make_context("run", ["-o", "o.mp4", *arguments]) as context:
        given = {name: value for name, value in context.params.items() if name in known}
        return RunOptions(**with_guidance(given)).job(INPUTS)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "second.png")
    return tmp_path / "second.png"


def test_without_options_a_job_is_the_default() -> None:
    assert job_of() == Job(INPUTS)


def test_the_options_of_a_job(picture: Path) -> None:
    made = job_of(
        *("--guidance", "5, 2.5,1", "--cfg-zero-star", "--nag-prompt", "a | b", "--nag-tau", "2"),
        *("--pose-start", "10", "--pose-end", "50", "--face-start", "20", "--face-end", "60"),
        *("--clip-image-2", str(picture), "--clip-strength", "1", "--clip-strength-2", "0.3"),
        *("--clip-tiles", "2", "--clip-tile-ratio", "0.7", "--prompt", "0:00 x | 0:02 y"),
    )
    assert made == Job(
        INPUTS,
        guidance=(5.0, 2.5, 1.0),
        cfg_zero_star=True,
        nag=Nag("a | b", tau=2),
        pose_start=10,
        pose_end=50,
        face_start=20,
        face_end=60,
        clip_vision=ClipVision(picture, 1, 0.3, 2, 0.7),
        prompt="0:00 x | 0:02 y",
    )
    assert job_of("--no-clip").clip_vision == ClipVision(off=True)
    assert job_of("--nag-prompt", "").nag == Nag("")
    assert job_of("--guidance", "[2.0, 1.0]").guidance == (2.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nag-scale", "5"], "Without --nag-prompt"),
        (["--clip-tile-ratio", "1"], "Without --clip-tiles"),
        (["--clip-strength-2", "1"], "no second CLIP picture"),
        (["--cfg-zero-star"], "Without guidance --cfg-zero-star"),
        (["--cfg-zero-star", "--guidance", "1,1"], "Without guidance --cfg-zero-star"),
        (["--no-clip", "--clip-tiles", "2"], "its other settings would do nothing"),
        (["--guidance", "2,0.5"], "A guidance of 0.5"),
        (["--guidance", "3,2,1", "--steps", "2"], "3 values of guidance for 2 steps"),
        (["--pose-end", "0.5"], "less than a step"),
        (["--face-strength", "0", "--face-end", "50"], "--face-end would do nothing"),
    ],
)
def test_what_would_do_nothing_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        job_of(*arguments)
    assert says in caught.value.message and caught.value.hint


def test_the_hint_for_a_clip_strength_names_the_default(picture: Path) -> None:
    for second, usual in ((None, "1"), (picture, "0.5")):
        with pytest.raises(UsageError) as caught:
            ClipVision(second, strength=11)
        assert caught.value.hint.endswith(f"mostly {usual}.")


@pytest.mark.parametrize("value", ["", "high", "2,", "2;1", "1|2"])
def test_what_is_no_guidance_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match="no list such as 5,1"):
        job_of("--guidance", value)


def test_a_second_picture_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "second.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        job_of("--clip-image-2", str(tmp_path / "second.png"))


def test_the_output_is_not_the_second_picture(picture: Path) -> None:
    options: Any = RunOptions(clip_vision=ClipVision(picture))
    assert picture in options.files()


def test_a_negative_prompt_without_guidance(tmp_path: Path) -> None:
    assert guided((1.0, 2.0)) and guided(2.0) and not guided((1.0, 1.0)) and not guided(None)
    arguments = ["-o", str(tmp_path / "o.mp4"), "--inputs", str(tmp_path), "--negative-prompt", "x"]
    for value, refused in (("1,1", True), ("2,1", False)):
        shown = CliRunner().invoke(run, [*arguments, "--guidance", value])
        assert ("Without guidance --negative-prompt" in shown.stderr) == refused, shown.stderr
