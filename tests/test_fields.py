"""Values of wrong types in the Python API: a UsageError that names the field, or the natural conversion."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trt_wan.errors import UsageError
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.settings import Settings, WeightFiles

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), None)


@pytest.mark.parametrize(
    ("kind", "field", "value", "says"),
    [
        (Job, "steps", 4.0, "Job.steps is 4.0, which is not a whole number."),
        (Job, "steps", None, "Job.steps is None, which is not a whole number."),
        (Job, "steps", "4", "Job.steps is '4', which is not a whole number."),
        (Job, "steps", True, "Job.steps is True, which is not a whole number."),
        (Job, "window", np.array([77, 81]), "Job.window is array([77, 81])"),
        (Job, "seed", 1.5, "Job.seed is 1.5"),
        (Job, "guidance", "high", "is 'high', which is not a number or a list of numbers."),
        (Job, "guidance", [2, "high"], "is [2, 'high'], which is not a number or a list of numbers."),
        (Job, "guidance", None, "which is not a number or a list of numbers."),
        (Job, "shift", 10**400, "which is not a number."),
        (Job, "shift", [5], "Job.shift is [5], which is not a number."),
        (Job, "pose_strength", None, "Job.pose_strength is None, which is not a number."),
        (Job, "prompt", None, "Job.prompt is None, which is not a string."),
        (Job, "prompt", b"a dancer", "Job.prompt is b'a dancer', which is not a string."),
        (Job, "mode", "animated", "Job.mode is 'animated', which is not one of 'animate', 'replace'."),
        (Job, "mode", ["animate"], "which is not one of 'animate', 'replace'."),
        (Job, "inputs", "prepared", "Job.inputs is 'prepared', which is not of the class Inputs."),
        (Job, "inputs", None, "Job.inputs is None"),
        (Inputs, "reference", None, "Inputs.reference is None, which is not a path."),
        (Inputs, "reference", 3, "Inputs.reference is 3, which is not a path."),
        (Inputs, "face", 3.0, "Inputs.face is 3.0, which is not a path or None."),
        (Settings, "executor", "cuda", "which is not one of 'auto', 'onnxruntime', 'tensorrt'."),
        (Settings, "precision", "fp16", "Settings.precision is 'fp16'"),
        (Settings, "tier", None, "Settings.tier is None, which is not one of 'exact', 'fast', 'turbo'."),
        (Settings, "vram", "12", "Settings.vram is '12', which is not a number or None."),
        (Settings, "segments", "attention=cudnn", "which is not a dict."),
        (Settings, "segments", {"attention": 3}, "which is not a dict."),
        (Settings, "text_cache", "no", "Settings.text_cache is 'no', which is not True or False."),
        (
            WeightFiles,
            "folders",
            "models",
            "WeightFiles.folders is 'models', which is not a list of paths.",
        ),
        (WeightFiles, "folders", Path("models"), "which is not a list of paths."),
        (WeightFiles, "folders", [None], "which is not a list of paths."),
        (WeightFiles, "files", {"unet": Path("a")}, "which is not a dict."),
        (WeightFiles, "tokenizer", 1, "WeightFiles.tokenizer is 1, which is not a path or None."),
        (WeightFiles, "random", 14, "WeightFiles.random is 14, which is not a string or None."),
    ],
)
def test_a_value_of_another_type_names_its_field(kind: Any, field: str, value: Any, says: str) -> None:
    given = {
        Job: {"inputs": INPUTS},
        Inputs: {"reference": Path("a.png"), "pose": Path("b.mp4"), "face": None},
        Settings: {},
        WeightFiles: {"folders": (Path("models"),)},
    }[kind]
    with pytest.raises(UsageError) as caught:
        kind(**{**given, field: value})
    assert says in caught.value.message and f"for {field}." in caught.value.hint


def test_natural_conversions() -> None:
    inputs = Inputs("ref.png", "pose.mp4", Path("face.mp4"))  # type: ignore[arg-type]
    assert inputs == Inputs(Path("ref.png"), Path("pose.mp4"), Path("face.mp4"))
    job = Job(INPUTS, guidance=2, steps=np.int64(4), shift=np.float32(3))
    assert (job.guidance, job.steps, job.shift) == (2.0, 4, 3.0)
    assert type(job.guidance) is float and type(job.steps) is int and type(job.shift) is float
    files = WeightFiles(["a", Path("b")], {"vae": "vae.safetensors"}, "tokenizer.json")  # type: ignore[arg-type]
    assert files == WeightFiles(
        (Path("a"), Path("b")), {"vae": Path("vae.safetensors")}, Path("tokenizer.json")
    )
    assert Settings(vram=12).vram == 12.0


def test_random_weights_exclude_files() -> None:
    for files in ({"folders": (Path("models"),)}, {"files": {"vae": Path("v")}}, {"tokenizer": Path("t")}):
        with pytest.raises(UsageError, match="random weights of tiny and the files exclude each other"):
            WeightFiles(random="tiny", **files)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no model '15b'"):
        WeightFiles(random="15b")


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance", 101.0), ("guidance", float("inf")), ("pose_strength", 11.0), ("face_strength", 1e30)],
)
def test_numbers_that_overflow_are_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field.replace('_', ' ')} of .* is not possible"):
        Job(INPUTS, **{field: value})  # type: ignore[arg-type]
