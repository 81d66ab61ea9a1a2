"""What a preprocessing spends its time on, seen from around the functions that do it.

Each part counts the time spent in it but not in a part that it calls. Parts run on the thread that makes the
folder or beside it: only the first add up to a run's time.
"""

import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal
from unittest.mock import patch

# A generator counts each time it is asked for the next item; what begins something, and returns a function to
# wait for it, counts for both.
Kind = Literal["function", "generator", "begins"]


@dataclass(frozen=True)
class Part:
    name: str
    module: str  # in trt_wan.preprocess
    function: str
    kind: Kind = "function"


PARTS = (
    Part("decode", "video", "Clip.window"),
    Part("detect", "detect", "Detector.detecting", "begins"),
    Part("pose", "pose", "PoseEstimator.estimating", "begins"),
    Part("scale frames", "preprocess", "fit"),
    Part("SAM2", "stages", "Sam2Segmenter.outlines", "generator"),
    Part("shape masks", "masks", "MaskShape.of", "generator"),
    Part("crop faces", "face", "FaceCropper.crops", "generator"),
    Part("draw skeleton", "preprocess", "draw_skeleton"),
    Part("draw preview", "preprocess", "draw_preview"),
    Part("cut background", "preprocess", "cut_hole"),
    Part("encode", "artifacts", "ClipWriter.write"),
    Part("wait for frames and masks", "preprocess", "ahead", "generator"),
    Part("wait for a clip", "clip_set", "ClipSet.write"),
    Part("finish clips", "artifacts", "ClipWriter.finish"),
    Part("wait for the last frames", "clip_set", "ClipSet.finish"),
)


@dataclass
class PartClock:
    """`missing` names parts that the preprocessing no longer has."""

    missing: list[str] = field(default_factory=list)
    _own: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _beside: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: threading.local = field(default_factory=threading.local)
    _thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def watching(self) -> Iterator["PartClock"]:
        with ExitStack() as patches:
            for part in PARTS:
                target = f"trt_wan.preprocess.{part.module}"
                owner: Any = importlib.import_module(target)
                *outer, name = part.function.split(".")
                for inner in outer:
                    owner = getattr(owner, inner, None)
                function = getattr(owner, name, None)
                if function is None:
                    self.missing.append(part.name)
                    continue
                around = {
                    "function": self._around,
                    "generator": self._around_items,
                    "begins": self._around_both,
                }
                patches.enter_context(patch.object(owner, name, around[part.kind](part.name, function)))
            yield self

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by part since the last time, on the watched thread and beside it."""
        with self._lock:
            found = dict(self._own), dict(self._beside)
            self._own.clear()
            self._beside.clear()
        return found

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        stack: list[list[Any]] = self._running.__dict__.setdefault("stack", [])
        start = time.perf_counter()
        stack.append([name, 0.0])
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            _, within = stack.pop()
            if stack:
                stack[-1][1] += whole
            with self._lock:
                here = threading.get_ident() == self._thread
                (self._own if here else self._beside)[name] += whole - within

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.inside(name):
                return function(*arguments, **options)

        return watched

    def _around_both(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        begin = self._around(name, function)

        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            return self._around(name, begin(*arguments, **options))

        return watched

    def _around_items(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
            items = iter(function(*arguments, **options))
            while True:
                with self.inside(name):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item

        return watched
