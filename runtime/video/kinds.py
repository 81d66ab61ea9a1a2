"""The kinds of video file that can be written, by the ending of the name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    muxer: str  # of ffmpeg
    video: str  # encoder of the pictures
    sound: str  # encoder of sound that cannot be copied
    copied: frozenset[str]  # sound that common players accept in it


KINDS = {
    ".mp4": Kind("mp4", "libx264", "aac", frozenset({"aac", "ac3", "alac", "eac3", "mp3", "opus"})),
    ".mov": Kind("mov", "libx264", "aac", frozenset({"aac", "ac3", "alac", "eac3", "mp3"})),
    ".mkv": Kind(
        "matroska",
        "libx264",
        "aac",
        frozenset({"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus", "vorbis"}),
    ),
    ".webm": Kind("webm", "libvpx-vp9", "libopus", frozenset({"opus", "vorbis"})),
}
