"""Clips that no file has, on several ranks: rank 0 has the frames of a live source, and gives them to the
others window by window.
"""

from dataclasses import replace

import numpy as np

from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.video.arriving import ArrivingClip
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.video.stills import AnyClip

NAMES = ("pose", "face", "background", "mask")


def empty_copy(clips: Clips, history: int) -> Clips:
    """Live clips without frames, for the other ranks. `history` are the frames that a window reads."""

    def empty(clip: AnyClip | None) -> ArrivingClip | None:
        return None if clip is None else ArrivingClip(clip.path, clip.width, clip.height, clip.rate, history)

    pose, face, background, mask = (empty(getattr(clips, name)) for name in NAMES)
    return replace(clips, pose=pose, face=face, background=background, mask=mask, coming=None)


def giving(clips: Clips, ranks: Ranks) -> Clips:
    """The live clips of rank 0. All frames that come go to the others too."""
    given, came = 0, clips.coming
    assert came is not None, "clips of files: each rank opens them"

    def coming(wanted: int) -> int:
        nonlocal given
        count = came(wanted)
        new = range(given, count)
        ranks.of_first([np.array(count), *(clip.window(new) for clip in _clips(clips))])
        given = count
        return count

    return replace(clips, coming=coming)


def taking(clips: Clips, ranks: Ranks) -> Clips:
    """`empty_copy` on another rank, filled by `giving`."""

    def coming(wanted: int) -> int:
        count, *pictures = ranks.of_first([])
        for clip, new in zip(_clips(clips), pictures, strict=True):
            assert isinstance(clip, ArrivingClip), "made by empty_copy"
            for picture in new:
                clip.add(picture)
        return int(count)

    return replace(clips, coming=coming)


def _clips(clips: Clips) -> list[AnyClip]:
    return [clip for name in NAMES if (clip := getattr(clips, name)) is not None]
