"""The kinds of video file that can be written, by the ending of the name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    muxer: str  # ffmpeg's name
    codecs: tuple[str, ...]  # rows of encoder.py's CODECS; the first is the default
    sound: str  # encoder of sound that cannot be copied
    copied: frozenset[str]  # sound that common players accept in it
    is_gif: bool = False  # the working file is an mp4, of which the GIF is made in the end (gif.py)


COPIED = frozenset({"aac", "ac3", "alac", "eac3", "mp3"})
KINDS = {
    ".mp4": Kind("mp4", ("h264", "hevc", "av1"), "aac", COPIED | {"opus"}),
    ".mov": Kind("mov", ("h264", "hevc", "prores"), "aac", COPIED),
    ".mkv": Kind("matroska", ("h264", "hevc", "av1"), "aac", COPIED | {"flac", "opus", "vorbis"}),
    ".webm": Kind("webm", ("vp9", "av1"), "libopus", frozenset({"opus", "vorbis"})),
    ".gif": Kind("mp4", ("h264",), "aac", frozenset(), is_gif=True),
}
