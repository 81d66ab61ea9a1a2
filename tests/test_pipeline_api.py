"""trt_wan.AnimatePipeline: diffusers' names for the same jobs, and media of every kind."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from lora_files import FAMILIES
from made_clips import FakePeople, FakeSegmenter
from PIL import Image
from tiny_job import PLAN, prepare, write_sound

from trt_wan import AnimatePipeline
from trt_wan.api.media import picture_file, video_file
from trt_wan.errors import Stopped, TrtWanError, UsageError
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import open_model
from trt_wan.runtime.settings import Settings, WeightFiles

WEIGHTS = WeightFiles(random="tiny")
SHORT: dict[str, Any] = {"segment_frame_length": PLAN.frames, "num_inference_steps": 2, "generator": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clips")
    return prepare(made, write_sound(made / "tone.m4a", 1))


@pytest.fixture(scope="module")
def pipe(tiny_home: Path) -> Iterator[AnimatePipeline]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        with AnimatePipeline.from_pretrained(random="tiny", executor="onnxruntime") as made:
            yield made


def frames_of(path: Path) -> Any:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def wanted(folder: Path, pipe: AnimatePipeline) -> Any:
    job = Job(Inputs.from_folder(folder, "animate"), window=PLAN.frames, steps=2, seed=7)
    with open_model(WEIGHTS, Settings(executor="onnxruntime")) as model:
        return np.stack(list(model.stream(job)))


def clips(folder: Path) -> dict[str, Any]:
    return {"image": folder / "src_ref.png", "pose_video": folder / "src_pose.mp4"} | {
        "face_video": folder / "src_face.mp4"
    }


def test_paths_and_arrays_give_the_frames_of_the_job(
    pipe: AnimatePipeline, folder: Path, wanted: Any
) -> None:
    made = pipe(**clips(folder), **SHORT)
    assert made.frames[0].dtype == np.float32
    np.testing.assert_array_equal(np.rint(made.frames[0] * 255), wanted)
    assert made.fps == pytest.approx(30000 / 1001)
    reference = cv2.cvtColor(cv2.imread(str(folder / "src_ref.png")), cv2.COLOR_BGR2RGB)
    pose, face = frames_of(folder / "src_pose.mp4"), frames_of(folder / "src_face.mp4")
    generator = torch.Generator().manual_seed(7)
    steps: list[tuple[int, float]] = []
    callback = lambda pipe, step, timestep, tensors: steps.append((step, timestep))  # noqa: E731
    given = {**SHORT, "generator": generator, "callback_on_step_end": callback, "output_type": "pil"}
    in_memory = pipe(
        Image.fromarray(reference),
        list(map(Image.fromarray, pose)),
        face.transpose(0, 3, 1, 2) / 255,
        **given,
    )
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in in_memory.frames[0]]), wanted)
    assert [step for step, _ in steps] == [0, 1, 2, 3] and in_memory.fps == 30
    assert steps[0][1] > steps[1][1] and steps[0][1] == steps[2][1], "two windows of two steps"


def test_a_file_with_sound(pipe: AnimatePipeline, folder: Path, tmp_path: Path, wanted: Any) -> None:
    out = tmp_path / "out.mp4"
    made = pipe(**clips(folder), **SHORT, output_type="path", output=out)
    assert made.frames == [str(out)]
    with av.open(str(out)) as container:
        assert container.streams.audio and container.streams.video[0].frames == len(wanted)
    with pytest.raises(TrtWanError, match="exists already"):
        pipe(**clips(folder), **SHORT, output_type="path", output=out)


def test_a_driving_video(pipe: AnimatePipeline, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_wan.preprocess import stages

    people = stages.Stages(FakePeople(), FakeSegmenter())
    monkeypatch.setattr(stages, "open_stages", lambda *given, **more: people)
    given = {"driving_video": folder / "src_pose.mp4", "width": 64, "height": 48, **SHORT}
    made = pipe(folder / "src_ref.png", **given, preprocess={"face": False, "rate": 15})
    assert made.frames[0].shape == (10, 48, 64, 3) and made.fps == 15
    with pytest.raises(UsageError, match="driving_video and pose_video"):
        pipe(folder / "src_ref.png", folder / "src_pose.mp4", **given)
    with pytest.raises(UsageError, match="no setting 'fase'"):
        pipe(folder / "src_ref.png", **given, preprocess={"fase": False})


def test_loras_stay_until_others_are_set(
    folder: Path, tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any
) -> None:
    from trt_wan.runtime.weights.tiny import write_tiny_weights

    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    write_tiny_weights(tmp_path / "weights", seed=5)
    lora = FAMILIES["peft"]().save(tmp_path / "lora.safetensors")
    with AnimatePipeline.from_pretrained(tmp_path / "weights", executor="onnxruntime") as pipe:
        plain = pipe(**clips(folder), **SHORT).frames[0]
        pipe.load_lora(lora, 0.5)
        changed = pipe(**clips(folder), **SHORT).frames[0]
        with pytest.raises(TrtWanError):
            pipe.load_lora(tmp_path / "weights" / "none.safetensors")
        assert [(lora.file, lora.strength) for lora in pipe.loras] == [(lora, 0.5)]
        pipe.set_loras([])
        np.testing.assert_array_equal(pipe(**clips(folder), **SHORT).frames[0], plain)
    assert not np.array_equal(changed, plain)


def test_it_stops_and_goes_on(pipe: AnimatePipeline, folder: Path, wanted: Any) -> None:
    given = {**clips(folder), **SHORT}
    with pytest.raises(Stopped):
        pipe(**given, callback_on_step_end=lambda pipe, step, timestep, tensors: pipe.stop())
    np.testing.assert_array_equal(np.rint(pipe(**given).frames[0] * 255), wanted)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"output_type": "latent"}, "no output_type"),
        ({"output_type": "path"}, "belong together"),
        ({"output": "x.mp4"}, "belong together"),
        ({"num_videos_per_prompt": 2}, "no setting 'num_videos_per_prompt'"),
        ({"steps": 3}, "no setting 'steps'"),
        ({"width": 832}, "The clips are 64x48"),
        ({"preprocess": {}}, "belongs to driving_video"),
        ({"generator": "7"}, "Job.seed"),
        ({"callback_on_step_end": lambda *given: {"latents": 1}}, "returned tensors"),
        ({"pose_video": np.zeros((3, 5))}, "no video of RGB frames"),
        ({"pose_video": np.full((5, 48, 64, 3), 3.0)}, "floats from 3 to 3"),
        ({"pose_video": np.full((5, 48, 64, 3), 300)}, "no levels of 0 to 255"),
        (
            {"pose_video": [np.zeros((48, 64, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)]},
            "different sizes",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    pipe: AnimatePipeline, folder: Path, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        pipe(**{**clips(folder), **SHORT, **given})
    assert error.value.hint


def test_a_generator_that_was_drawn_from_is_refused(pipe: AnimatePipeline, folder: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    torch.rand(1, generator=generator)
    with pytest.raises(UsageError, match="numbers were drawn"):
        pipe(**clips(folder), **{**SHORT, "generator": generator})


def test_settings_and_a_closed_pipeline(
    tiny_home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no setting 'torch_dtype'"):
        AnimatePipeline.from_pretrained(random="tiny", torch_dtype=None)
    with AnimatePipeline.from_pretrained(random="tiny", executor="onnxruntime") as closed:
        pass
    with pytest.raises(UsageError, match="closed"):
        closed(**clips(folder), **SHORT)


def test_media_keep_their_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), np.uint8)
    for given in (pixels, list(pixels), torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), pixels / 255):
        np.testing.assert_array_equal(frames_of(video_file(given, "v", tmp_path, 25)), pixels)
    masks = pixels[..., 0] > 127
    np.testing.assert_array_equal(frames_of(video_file(masks, "m", tmp_path, 25))[..., 1], masks * 255)
    picture = cv2.imread(str(picture_file(pixels[0], "p", tmp_path)))[..., ::-1]
    np.testing.assert_array_equal(picture, pixels[0])
    with pytest.raises(UsageError, match="transparent"):
        picture_file(np.zeros((8, 8, 4), np.uint8), "p", tmp_path)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, trt_wan; assert 'numpy' not in sys.modules; trt_wan.AnimatePipeline; "
    code += "assert not {'torch', 'onnx', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
