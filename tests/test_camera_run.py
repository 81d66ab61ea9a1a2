"""Whole jobs with a camera on ONNX Runtime: the bits where it is off, and the server's requests for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_job import PLAN, prepare, write_sound

from trt_wan.build.graphs import build_graphs
from trt_wan.checks.weights import weights_checks
from trt_wan.engines.config import TINY
from trt_wan.engines.shape import CameraPlan
from trt_wan.errors import UsageError
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.tiny import write_tiny_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_tiny_weights(tmp_path / "weights", seed=5)
    return tmp_path / "weights"


@pytest.fixture
def model(weights: Path, tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenModel]:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    build_graphs(TINY, CameraPlan.beside(PLAN, TINY.camera.ffn_dim), lambda name, seconds: None)
    with open_model(WeightFiles((weights,)), Settings(executor="onnxruntime", text_cache=False)) as made:
        yield made


@pytest.mark.long
def test_the_bits_of_a_video_with_and_without(model: OpenModel, tmp_path: Path) -> None:
    """On one open model, before and after a job with a camera."""
    clips = prepare(tmp_path / "clips", write_sound(tmp_path / "tone.m4a", 1))
    inputs = Inputs(clips / "src_ref.png", clips / "src_pose.mp4", None)

    def frames(camera: Camera | None, **more: Any) -> Any:
        job = Job(inputs, window=PLAN.frames, steps=1, camera=camera, **more)
        return np.stack(list(model.stream(job)))

    without = frames(None)
    static, twice = (frames(Camera("static"), guidance=guidance) for guidance in (1.0, 2.0))
    assert np.abs(static.astype(int) - without).mean() > 1
    assert not np.array_equal(static, twice)
    for off in (Camera("static", strength=0), Camera("static", start=0, end=0), None):
        np.testing.assert_array_equal(frames(off), without)
    np.testing.assert_array_equal(frames(Camera("static")), static)


def test_doctor_says_whether_it_is_there(weights: Path) -> None:
    def said() -> str:
        checks, _ = weights_checks([weights], "fp32")
        (found,) = (check for check in checks if check.topic == "camera control")
        assert found.state == "ok"
        return found.text

    uni3c = next(weights.glob("*Uni3C*"))
    assert str(uni3c) in said()
    uni3c.unlink()
    assert said() == "none, which only --camera needs"


def test_a_request_names_a_move_or_an_upload() -> None:
    from trt_wan.serve.fields import fields_from, options_given, options_of
    from trt_wan.serve.service import Service

    assert "camera" in options_of("video") and "camera_control" not in options_of("video")
    for name, value, upload in (("camera", "orbit", False), ("camera", "file_12", True)):
        fields = fields_from("video", {"prompt": "x", "extra_params": {name: value}})
        try:
            wanted = Service._references(fields, {}, {})
        except UsageError as error:  # ids have a form
            wanted = {"camera": error.message}
        assert (name in wanted) == upload
        assert ("camera" in options_given("video", fields)) != upload
