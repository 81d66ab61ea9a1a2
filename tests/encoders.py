"""Encoders of parts of videos that are slow or fail, for tests."""

from collections.abc import Callable
from typing import Any

import pytest
from av.video.frame import VideoFrame

from trt_wan.runtime.video import writer as module
from trt_wan.runtime.video.part import Part
from trt_wan.runtime.video.working_file import WorkingFile

# Called before an encoder gets a picture: the number of the part, and of the picture; None: its last packets.
Act = Callable[[int, int | None], None]


class Acting:
    def __init__(self, encoder: Any, part: int, act: Act) -> None:
        self.encoder, self.part, self.act = encoder, part, act

    def encode(self, picture: VideoFrame | None) -> Any:
        self.act(self.part, None if picture is None else picture.pts)
        return self.encoder.encode(picture)


def on_encode(monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
    parts = 0

    def make(file: WorkingFile, open: Callable[[], Any], *arguments: Any) -> Part:
        nonlocal parts
        number, parts = parts, parts + 1

        def opened() -> Any:
            return Acting(open(), number, act)

        return Part(file, opened, *arguments)

    monkeypatch.setattr(module, "Part", make)
