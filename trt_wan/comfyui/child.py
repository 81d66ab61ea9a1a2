"""The process that computes: `python -m trt_wan.comfyui.child FOLDER`.

stdin has requests and stdout answers (messages.py). FOLDER is for temporary files. When stdin ends, because
ComfyUI has ended, the folder is removed and the process ends at once.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import numpy as np

from trt_wan.api.media import picture_file, video_file
from trt_wan.api.pipeline import AnimatePipeline
from trt_wan.comfyui.messages import (
    Animate,
    Build,
    Done,
    Failed,
    ModelChoice,
    Open,
    Preprocess,
    Request,
    Stop,
    Taken,
    read,
    write,
)
from trt_wan.comfyui.shared_frames import Block, Frames, Pixels
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.engines.store.files import stamp
from trt_wan.errors import Stopped, TrtWanError
from trt_wan.runtime.colour import Colour
from trt_wan.runtime.events import Event
from trt_wan.runtime.job import Inputs, Lora, Mode
from trt_wan.runtime.preset_loras import find_loras
from trt_wan.runtime.presets import preset_named
from trt_wan.runtime.video.reader import Clip

Stamps = dict[Path, tuple[int, int]]
STILL = {"image", "background_video", "mask_video"}  # one frame is a picture here
WHITE = 128  # the least level of the person in a mask


class Child:
    """`answers` is the pipe to ComfyUI."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self.stopping = threading.Event()
        self.blocks = ExitStack()  # frames that ComfyUI has not copied yet
        self._pipe: AnimatePipeline | None = None
        self._opened: ModelChoice | None = None
        self._stamps: Stamps = {}

    def answer(self, request: Request) -> None:
        """Does the work and reports its outcome."""
        try:
            value = self._work(request)
        except TrtWanError as error:
            write(Failed(error.code, error.message, error.hint), self._answers)
        except Exception as error:
            traceback.print_exc()
            hint = "This is a mistake in trt-wan: please report it, with the lines in ComfyUI's log."
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, MemoryError):
                message, hint = f"The memory is full ({error}).", "Use a smaller size or window."
            write(Failed(TrtWanError.code, message, hint), self._answers)
        else:
            write(Done(value), self._answers)

    def progress(self, event: Event) -> None:
        if self.stopping.is_set():
            raise Stopped("The job was stopped.")
        write(event, self._answers)

    def _work(self, request: Request) -> Any:
        match request:
            case Open(model):
                self._pipeline(model, "animate")
                return None
            case Animate():
                return self._animate(request)
            case Preprocess():
                return self._preprocess(request)
            case Build():
                return self._build(request)

    def _pipeline(self, choice: ModelChoice, mode: Mode) -> AnimatePipeline:
        """The open model with its LoRAs; opened anew when another is chosen or a file has changed."""
        if self._pipe is not None and (
            _without_loras(choice) != self._opened or _stamps(self._pipe) != self._stamps
        ):
            self._pipe.close()
            self._pipe = None
        if self._pipe is None:
            files = cast(dict[Part, Path], dict(choice.files))
            self._pipe = AnimatePipeline.from_pretrained(
                choice.folders, files=files, random=choice.random, progress=self.progress, **choice.settings
            )
            self._opened, self._stamps = _without_loras(choice), _stamps(self._pipe)
        loras = tuple(Lora(file, strength) for file, strength in choice.loras)
        if choice.preset and choice.random is None:
            loras = find_loras(preset_named(choice.preset), mode, choice.folders, loras)
        self._pipe.set_loras(loras)
        return self._pipe

    def _animate(self, request: Animate) -> Frames:
        pipe = self._pipeline(request.model, request.settings["mode"])
        with tempfile.TemporaryDirectory() as folder:
            media: dict[str, Any] = {}
            for name, frames in request.media.items():
                pixels = frames.copied()
                still = name in STILL and len(pixels) == 1
                media[name] = picture_file(pixels[0], name, Path(folder)) if still else pixels
            colour = None if request.colour is None else Colour(request.colour)
            (pixels,) = pipe(**media, **request.settings, colour=colour, output_type="uint8").frames
        return self._shared(pixels)

    def _preprocess(self, request: Preprocess) -> dict[str, Frames]:
        from trt_wan.api.preparing import prepare
        from trt_wan.preprocess.people.choice import PersonChoice
        from trt_wan.preprocess.pictures.masks import MaskShape

        mode = cast(Mode, request.mode)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            reference = picture_file(request.media["image"].copied()[0], "image", folder)
            rate = Fraction(request.rate).limit_denominator(1001)
            clip = video_file(request.media["driving_video"].copied(), "driving_video", folder, rate)
            choice = PersonChoice(request.person, request.point)
            options = {**request.options, "choice": choice, "mask": MaskShape(grow=request.grow)}
            made = prepare(reference, clip, folder / "prepared", mode, request.size, options, self.progress)
            inputs = Inputs.from_folder(made, mode)
            clips = {
                "pose_video": inputs.pose,
                "face_video": inputs.face,
                "background_video": inputs.background,
                "mask_video": inputs.mask,
            }
            return {name: self._shared(_frames(name, path)) for name, path in clips.items() if path}

    def _build(self, request: Build) -> str:
        from trt_wan.cli.build import build_for

        precision = cast(Precision | None, request.precision)
        result, _ = build_for(EventReport(self), request.name, request.size, request.window, precision)
        return str(result)

    def _shared(self, pixels: Pixels) -> Frames:
        return self.blocks.enter_context(Block(pixels.shape, pixels)).frames


class EventReport:
    """`Report` (cli/report.py) of a command whose events alone are of interest."""

    def __init__(self, child: Child) -> None:
        self.progress = child.progress

    def done(self, result: object, data: dict[str, Any]) -> None:
        pass

    def failed(self, error: TrtWanError) -> None:
        pass


def _frames(name: str, path: Path) -> Pixels:
    """All frames of a prepared clip [T, H, W, 3]; of a mask [T, H, W], 0 or 255."""
    with Clip(path) as clip:
        frames = np.concatenate([clip.window([k]) for k in range(clip.frames)])
    if name == "mask_video":
        return ((frames[..., 0] >= WHITE) * 255).astype(frames.dtype)
    return frames


def _without_loras(choice: ModelChoice) -> ModelChoice:
    return ModelChoice(choice.folders, choice.files, choice.random, choice.settings)


def _stamps(pipe: AnimatePipeline) -> Stamps:
    return {file: stamp(file) for file in pipe.files}


def _read(child: Child, requests: SimpleQueue[Request | Taken], folder: Path) -> None:
    while True:
        try:
            message = read(sys.stdin.buffer)
        except EOFError:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        if isinstance(message, Stop):
            child.stopping.set()
        else:
            child.stopping.clear()
            requests.put(message)


def main() -> None:
    folder = Path(sys.argv[1])
    tempfile.tempdir = str(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for ComfyUI, whose end ends this
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print write into the log
    child = Child(answers)
    requests: SimpleQueue[Request | Taken] = SimpleQueue()
    threading.Thread(target=_read, args=(child, requests, folder), daemon=True).start()
    while True:
        request = requests.get()
        if isinstance(request, Taken):
            child.blocks.close()
            write(Done(None), answers)
        else:
            child.answer(request)


if __name__ == "__main__":
    main()
