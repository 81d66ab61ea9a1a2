"""The messages between ComfyUI and the process that computes, pickled one after another on its pipes."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trt_wan.comfyui.shared_frames import Frames


@dataclass(frozen=True)
class ModelChoice:
    """The arguments of `AnimatePipeline.from_pretrained`, and the LoRAs."""

    folders: tuple[Path, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # by part
    random: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of Settings
    preset: str = ""  # whose LoRAs are found in `folders`; empty: none
    loras: tuple[tuple[Path, float], ...] = ()  # files and strengths


# Requests


@dataclass(frozen=True)
class Open:
    """Answered by None."""

    model: ModelChoice


@dataclass(frozen=True)
class Animate:
    """`media` and `settings` are arguments of `AnimatePipeline.__call__`. Answered by Frames."""

    model: ModelChoice
    media: Mapping[str, Frames]
    settings: Mapping[str, Any]
    colour: str | None  # the method of a colour match


@dataclass(frozen=True)
class Preprocess:
    """`media` has image and driving_video, `options` are those of api/preparing.py. Answered by Frames by
    name: pose_video, face_video, and in the mode replace background_video and mask_video.
    """

    media: Mapping[str, Frames]
    mode: str
    size: tuple[int, int]  # width, height
    rate: float  # frames per second of driving_video
    options: Mapping[str, Any]
    person: int | None
    point: tuple[float, float] | None
    grow: int | None


@dataclass(frozen=True)
class Build:
    """Answered by a text."""

    name: str  # the model's
    size: tuple[int, int]  # width, height
    window: int  # frames
    precision: str | None


Request = Open | Animate | Preprocess | Build


@dataclass(frozen=True)
class Stop:
    """The running request ends with Failed, at its next event."""


@dataclass(frozen=True)
class Taken:
    """The frames of the last answer are copied."""


# Answers, after the events of the work


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    """The fields of a TrtWanError."""

    code: str
    message: str
    hint: str


def write(message: object, pipe: BinaryIO) -> None:
    pickle.dump(message, pipe)
    pipe.flush()


def read(pipe: BinaryIO) -> Any:
    """Raises EOFError when the other process has ended."""
    try:
        return pickle.load(pipe)
    except pickle.UnpicklingError as error:  # it was killed while it wrote
        raise EOFError from error
