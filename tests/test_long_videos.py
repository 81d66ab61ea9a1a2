"""Videos longer than one forward of the model, with the tiny model on ONNX Runtime: windows that go on
from a state, context windows, and both together.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_job import FRAMES, PLAN, prepare, write_sound

from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.window_state import WindowState


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return prepare(folder / "clips", write_sound(folder / "tone.m4a", 1))


@pytest.fixture(scope="module")
def model(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    weights = tmp_path_factory.mktemp("weights")
    write_tiny_weights(weights, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        files = WeightFiles((weights,))
        with open_model(files, Settings(executor="onnxruntime", text_cache=False)) as opened:
            yield opened


def job(clips: Path, face: bool = False, **changes: Any) -> Job:
    """Faces of 512x512 take most of a job's time on the CPU."""
    inputs = Inputs.from_folder(clips, changes.get("mode", "animate"))
    settings = {"window": PLAN.frames, "steps": 2, "seed": 7} | changes
    return Job(inputs if face else replace(inputs, face=None), **settings)


def frames(model: OpenModel, job: Job, **more: Any) -> Array:
    return np.concatenate(list(model.pieces(job, **more)), axis=1)


def test_a_job_goes_on_between_two_windows_with_the_same_bits(model: OpenModel, clips: Path) -> None:
    task = job(clips, overlap=9)  # 13 frames, then 4 new ones in each of two windows
    states: list[WindowState] = []
    whole = frames(model, task, keep=states.append)
    assert whole.shape[1] == FRAMES and [state.done for state in states] == [1, 2, 3]
    assert states[0].latent.shape == (16, PLAN.slots, PLAN.latent_height, PLAN.latent_width)
    for state, start in zip(states[:2], (13, 17), strict=True):
        np.testing.assert_array_equal(frames(model, task, begin_from=state), whole[:, start:])
    assert not list(model.pieces(task, begin_from=states[-1]))
