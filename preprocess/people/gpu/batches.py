"""A batch of frames through an engine: frames go up as uint8 and become its input, small results come back.

`engine` is a detector's or a pose network's, for at most as many frames as its batch has. A batch that is not
full is padded with its last frame. Nothing here waits for the GPU, unless all slots are in use.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trt_wan.preprocess.clips.streams import BATCH_PIXELS
from trt_wan.preprocess.onnx.memory import Flight
from trt_wan.preprocess.people.crops import Crop, taps
from trt_wan.preprocess.people.gpu.kernels import people_kernels
from trt_wan.preprocess.people.gpu.resampling_tables import crop_table, stretch_taps
from trt_wan.runtime.video.reader import Picture

if TYPE_CHECKING:
    from trt_wan.preprocess.onnx.engine import EngineRunner


def prepare(engine: "EngineRunner") -> None:
    """Compiles the kernels, half a second, before the first frame comes."""
    people_kernels(engine.gpu)


def detect(engine: "EngineRunner", frames: Sequence[Picture]) -> Flight:
    """Returns the flight of the engine's first output, for the whole batch."""
    slot, kernels = engine.slot(), people_kernels(engine.gpu)
    address, shape, kind = slot.parts[engine.input]
    n, _, height, width = shape
    sizes = list(dict.fromkeys((frame.shape[1], frame.shape[0]) for frame in frames))
    tables = [table for size in sizes for table in stretch_taps(*size, width, height)]
    sent = slot.send([*map(_checked, frames), *tables])
    for i in range(n):
        k = min(i, len(frames) - 1)
        size = (frames[k].shape[1], frames[k].shape[0])
        columns = len(frames) + 2 * sizes.index(size)
        out = address + i * 3 * height * width * kind.itemsize
        kernels.stretch(kind, sent[k], size[0], (sent[columns], sent[columns + 1]), out, (width, height))
    engine.compute(slot)
    return slot.fetch([slot.parts[engine.outputs[0]]], engine.settle)


def estimate(engine: "EngineRunner", frames: Sequence[Picture], crops: Sequence[Crop], bgr: bool) -> Flight:
    """Returns the flight of the peaks, float32 [frames, joints, 3], as heatmaps.peaks gives them. The score
    is NaN if a heat map is not finite.
    """
    slot, kernels = engine.slot(), people_kernels(engine.gpu)
    address, shape, kind = slot.parts[engine.input]
    n, _, height, width = shape
    tables = []
    for frame, crop in zip(frames, crops, strict=True):
        tables.append(crop_table(taps(crop.x0, crop.x1, width, frame.shape[1])))
        tables.append(crop_table(taps(crop.y0, crop.y1, height, frame.shape[0])))
    sent = slot.send([*map(_checked, frames), *tables])
    for i in range(n):
        k = min(i, len(frames) - 1)
        columns = len(frames) + 2 * k
        out = address + i * 3 * height * width * kind.itemsize
        pair = (sent[columns], sent[columns + 1])
        kernels.crop(kind, sent[k], frames[k].shape[1], pair, out, (width, height), bgr)
    engine.compute(slot)
    maps, (_, joints, map_height, map_width), map_kind = slot.parts[engine.outputs[0]]
    found = (len(frames), joints, 3)
    peaks = slot.room(n * joints * 3 * 4)
    kernels.decode(map_kind, maps, len(frames) * joints, map_width, map_height, peaks)
    return slot.fetch([(peaks, found, np.dtype(np.float32))], engine.settle)


def pieces(frames: Sequence[Picture], most: int) -> Iterator[Sequence[Picture]]:
    """The frames in groups of at most `most` frames and BATCH_PIXELS, which limits their memory."""
    begin, pixels = 0, 0
    for k, frame in enumerate(frames):
        size = frame.shape[0] * frame.shape[1]
        if k > begin and (k - begin == most or pixels + size > BATCH_PIXELS):
            yield frames[begin:k]
            begin, pixels = k, 0
        pixels += size
    if begin < len(frames):
        yield frames[begin:]


def _checked(frame: Picture) -> Picture:
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3, (frame.dtype, frame.shape)
    return frame
