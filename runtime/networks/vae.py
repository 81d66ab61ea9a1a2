"""Frames to latents and back, chunk by chunk, the caches of one chunk fed to the next (model_spec.md 7.2).

Frames are float32 [3, F, H, W] in [-1, 1], latents float32 [latent channels, T, H/8, W/8], normalised, with
F = 4(T-1) + 1. Decoded frames are not clamped: a clamp would turn a NaN into a black pixel.

Where GPU memory is short the model has a tile (Plan.vae_tile). Then both halves of the picture are computed
one after the other, a segment of the clip at a time, and mixed where they overlap. The result differs a
little from one computed whole: a tile's borders are padded, and its attention sees that tile alone.

Several ranks compute a clip together where the model has a pipeline (parallel/vae_pipeline.py), with the bits
of one GPU. Elsewhere, and in tiles, rank 0 decodes alone.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from trt_wan.engines.shape import VaeTile
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.parallel.vae_parts import part_name
from trt_wan.runtime.parallel.vae_pipeline import SLOTS, VaePipeline

Read = Callable[[int, int], Array]  # frames [start, stop) of a clip, float32
Span = tuple[int, int]
Half = Literal["encode", "decode"]

# Latents of a segment, so that the host's memory does not grow with the clip. It holds the segment's frames,
# at most 0.9 GB at 1280x720, and between two segments the caches of both tiles, 4.8 GB there in bf16.
# Windows of 77 and 81 frames are one segment.
SEGMENT = 20


def encode(model: Model, frames: Array) -> Array:
    """The latents of a clip. F is 1, or 1 and a multiple of 4·vae_chunk."""
    return encode_read(model, lambda start, stop: frames[:, start:stop], frames.shape[1])


def encode_read(model: Model, read: Read, count: int, *, together: bool = False) -> Array:
    """`encode` of a clip of `count` frames that is read a chunk at a time, in order. With `together` all
    ranks encode it, each in some layers, and all get the latents; the last rank alone reads the clip.
    """
    step = 4 * model.plan.vae_chunk
    assert count % step == 1, f"{count} frames are not one and a multiple of {step}"
    pipeline = model.vae_pipeline if together and model.tile is None else None
    latents = list(_computed(model, "encode", read, _spans(count, step), pipeline))
    return np.concatenate([np.asarray(latent) for latent in latents], axis=1)


def decode(model: Model, latent: Array) -> Iterator[Array]:
    """The frames of a clip as they are ready: one, then 4·vae_chunk at a time. Ranks other than 0 have none.

    T is 1, or 1 and a multiple of vae_chunk. Where there is a pipeline, all ranks must iterate to the end.
    """
    pipeline = None if model.tile is not None else model.vae_pipeline
    if model.ranks.rank and pipeline is None:
        return
    step = model.plan.vae_chunk
    latent = np.asarray(latent)
    count = latent.shape[1]
    assert (count - 1) % step == 0, f"{count} latent frames are not one and a multiple of {step}"
    spans = _spans(count, step)
    since = time.perf_counter()
    chunks = _computed(model, "decode", lambda start, stop: latent[:, start:stop], spans, pipeline)
    yield from model.fetched(chunks)
    if model.ranks.rank:  # it waits for rank 0's frames next in any case
        model.executor.wait()
        model.ranks.watch("decode", time.perf_counter() - since)


def _spans(count: int, step: int) -> list[Span]:
    """The first alone, then `step` at a time."""
    return [(0, 1), *((start, start + step) for start in range(1, count, step))]


def _computed(
    model: Model, half: Half, read: Read, spans: Sequence[Span], pipeline: VaePipeline | None
) -> Iterator[Array]:
    if model.tile is not None:
        return _in_tiles(model, model.tile, half, read, spans)
    if pipeline is not None:
        return _in_parts(model, pipeline, half, read, spans)
    return _chunks(model, half, (read(*span) for span in spans), [])


def _chunks(model: Model, half: Half, chunks: Iterable[Array], caches: list[Array]) -> Iterator[Array]:
    """`caches` are of the chunk before, none before the first; in the end they are of the last one."""
    for chunk in chunks:
        result, *caches[:] = model.run(f"vae_{half}_{'next' if caches else 'first'}", chunk, *caches)
        yield result


def _in_parts(
    model: Model, pipeline: VaePipeline, half: Half, read: Read, spans: Sequence[Span]
) -> Iterator[Array]:
    """Computes this rank's layers. Yields frames on rank 0, latents on all."""
    caches: list[Array] = []
    coming: deque[tuple[int, tuple[int, ...]]] = deque()  # numbers and shapes of latents that rank 0 makes
    for k, span in enumerate(spans):
        name = f"vae_{half}_{'next' if k else 'first'}"
        given = [read(*span)] if pipeline.takes else []
        outputs = model.run(part_name(name), *given, *caches)
        if pipeline.makes:
            result, *caches = outputs
            del outputs
            yield result
            continue
        caches = list(outputs)
        if half == "encode":
            coming.append((pipeline.runs, model.networks[name].outputs[0].shape))
            if len(coming) == SLOTS:
                yield pipeline.latent(*coming.popleft())
    for run, shape in coming:
        yield pipeline.latent(run, shape)


def _in_tiles(model: Model, tile: VaeTile, half: Half, read: Read, spans: Sequence[Span]) -> Iterator[Array]:
    plan = model.plan
    axis = 3 if tile.width < plan.width else 2
    side, whole = (tile.width, plan.width) if axis == 3 else (tile.height, plan.height)
    given, made = (1, 8) if half == "encode" else (8, 1)  # pixels of a position
    rest: Any = (slice(None),) * (3 - axis)
    low, high = (..., slice(side // given), *rest), (..., slice(-side // given, None), *rest)
    low_caches: list[Array] = []
    high_caches: list[Array] = []
    segment = max(1, SEGMENT // plan.vae_chunk)
    for start, stop in pairwise([0, *range(1 + segment, len(spans), segment), len(spans)]):
        last = stop == len(spans)
        chunks = [read(*span) for span in spans[start:stop]]
        first = list(map(np.asarray, _chunks(model, half, (chunk[low] for chunk in chunks), low_caches)))
        _set_aside(low_caches, last)
        second = map(np.asarray, _chunks(model, half, (chunk[high] for chunk in chunks), high_caches))
        for other, one in zip(second, first, strict=True):  # in this order `second` comes to its end
            yield mixed(one, other, axis, whole // made)
        _set_aside(high_caches, last)


def _set_aside(caches: list[Array], last: bool) -> None:
    """Frees the device's memory. The host keeps the caches unless the segment is the last one."""
    caches[:] = [] if last else map(np.asarray, caches)


def mixed(one: Array, other: Array, axis: int, size: int) -> Array:
    """Two tiles, float32, as one array with `size` positions along an axis. In the middle half of their
    overlap the second takes over linearly. The quarter next to a cut is not used: there the zeros beyond it
    show (tests/test_vae_tiles.py: a seam over the whole overlap was off by 6 % of the deviation, the middle
    half is by 0.2 %).
    """
    overlap = one.shape[axis] + other.shape[axis] - size
    share = (2 * (np.arange(overlap) + 0.5) / overlap - 0.5).clip(0, 1).astype(np.float32)
    gain = share.reshape(-1, *(1,) * (one.ndim - 1 - axis))
    (before, out), (into, after) = np.split(one, [-overlap], axis), np.split(other, [overlap], axis)
    middle = np.add(out, np.multiply(gain, np.subtract(into, out)))
    return np.concatenate((before, middle, after), axis)
