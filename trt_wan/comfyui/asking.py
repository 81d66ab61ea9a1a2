"""Shared by all nodes: they pass the computation on to another process, show its progress, and end with
ComfyUI's interrupt or with the sentence that the command line would print.
"""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from trt_wan.comfyui.messages import Animate, ModelChoice, Open, Request
from trt_wan.comfyui.process import Process
from trt_wan.errors import Stopped, TrtWanError
from trt_wan.runtime.events import (
    CandidateReady,
    EngineReady,
    EngineStep,
    Event,
    GraphExported,
    Note,
    StageProgress,
    StepDone,
)
from trt_wan.runtime.presets import PRESETS, Recipe

CATEGORY = "TrtWan"
MOST_SIZE = 16384  # pixels, as in ComfyUI's own nodes
MODEL = Process()
TrtWanModel = io.Custom("TRTWAN_MODEL")


class NodeFailed(Exception):
    """The sentence and the hint of a TrtWanError, as ComfyUI shows them."""


class ChosenModel:
    """The value of a TRTWAN_MODEL socket. ComfyUI holds it while a node may need it; when the last one that
    used the process is dropped, also by "free model and node cache", the process ends.
    """

    def __init__(self, choice: ModelChoice, preset: str) -> None:
        self.choice = choice
        self.recipe = PRESETS[preset].recipe if preset in PRESETS else Recipe()
        self.token = object()
        weakref.finalize(self, _release, self.token)

    @property
    def name(self) -> str:
        return self.choice.random or "14b"

    def ask(self, request: Open | Animate, *counted: type) -> Any:
        vram = self.choice.settings.get("vram")
        make_room(1e30 if vram is None else vram * 1e9)
        return ask(MODEL, request, *counted, holder=self.token)


def _release(token: object) -> None:
    if MODEL.holder is token:
        MODEL.close()


def make_room(size: float) -> None:
    """Moves ComfyUI's models from the GPU until `size` bytes are free, or all of them."""
    comfy.model_management.free_memory(size, comfy.model_management.get_torch_device())
    comfy.model_management.soft_empty_cache()


def ask(process: Process, request: Request, *counted: type, holder: object = None) -> Any:
    """The answer of `process`. Events of the types `counted` move the progress bar."""
    bar = comfy.utils.ProgressBar(1)

    def progress(event: Event) -> None:
        if isinstance(event, Note):
            logging.info("trt-wan: %s", event.text)
        elif isinstance(event, counted):
            bar.update_absolute(*_counts(event))

    try:
        return process.ask(request, progress, comfy.model_management.processing_interrupted, holder)
    except Stopped:
        comfy.model_management.interrupt_current_processing(False)
        raise comfy.model_management.InterruptProcessingException() from None


def _counts(event: Event) -> tuple[int, int]:
    """How many parts are done, and of how many."""
    match event:
        case StepDone():
            return (event.window - 1) * event.steps + event.step, event.windows * event.steps
        case StageProgress():
            return event.done, event.total
        case EngineStep():  # 1000 parts of each engine
            part = 1000 * event.step // max(event.steps, 1)
            return 1000 * (event.number - 1) + part, 1000 * event.engines
        case EngineReady():
            return event.number, event.engines
        case GraphExported():
            return event.number, event.graphs
        case CandidateReady():
            return event.number, event.candidates
    raise AssertionError(f"{event} counts nothing")


@contextmanager
def told() -> Iterator[None]:
    try:
        yield
    except TrtWanError as error:
        raise NodeFailed("\n".join(filter(None, (error.message, error.hint)))) from None
