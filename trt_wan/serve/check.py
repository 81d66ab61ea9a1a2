"""Looks into one upload, in a separate process: `python -m trt_wan.serve.check`.

stdin has one line of JSON: `path`, `out` (a folder, for the clips in a .zip) and the limits. stdout gets the
facts or the error. Everything is decoded here once, with limits of time and memory: a file that breaks a
decoder breaks this process alone.
"""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trt_wan.errors import InputError, TrtWanError, shown

# By their first bytes: ffmpeg would also open playlists, which name other files.
PICTURES = ((b"\x89PNG\r\n\x1a\n", ".png"), (b"\xff\xd8\xff", ".jpg"))
CLIPS = ((b"\x1a\x45\xdf\xa3", ".mkv"), (b"GIF87a", ".gif"), (b"GIF89a", ".gif"))
FORMATS = {".mp4": "mov", ".mkv": "matroska", ".gif": "gif", ".avi": "avi"}  # ffmpeg's names
PREPARED = ("src_ref", "src_pose", "src_face", "src_bg", "src_mask", "preview", "keypoints", "prepared")
KINDS_INSIDE = (".png", ".mp4", ".json")
STEP = 1 << 20
CPUS = 4


def suffix_of(head: bytes) -> tuple[str, str]:
    """The kind of a file, and the suffix that its first 16 bytes stand for. Raises InputError."""
    if head.startswith(b"PK\x03\x04"):
        return "prepared", ".zip"
    for magic, suffix in PICTURES:
        if head.startswith(magic):
            return "picture", suffix
    for magic, suffix in CLIPS:
        if head.startswith(magic):
            return "clip", suffix
    if head[4:8] == b"ftyp":
        return "clip", ".mp4"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP", b"WAVE"):
        inside = {b"AVI ": ("clip", ".avi"), b"WEBP": ("picture", ".webp"), b"WAVE": ("sound", ".wav")}
        return inside[head[8:12]]
    if head[:3] == b"ID3" or head[:2] in (b"\xff\xfb", b"\xff\xf3") or head[:4] in (b"OggS", b"fLaC"):
        return "sound", ".mp3" if head[:1] in (b"I", b"\xff") else ".ogg" if head[:1] == b"O" else ".flac"
    if head.lstrip()[:1] == b"{":
        return "keypoints", ".json"
    raise InputError(
        "The upload is no PNG, JPEG or WebP, no mp4, mov, mkv, webm, avi or GIF, and no .zip of clips.",
        "Convert it first.",
    )


def check(path: Path, out: Path, limits: dict[str, Any]) -> dict[str, Any]:
    """The facts about an upload. Raises TrtWanError."""
    with path.open("rb") as file:
        kind, suffix = suffix_of(file.read(16))
    facts: dict[str, Any] = {"kind": kind, "suffix": suffix, "bytes": path.stat().st_size}
    if kind == "picture":
        return facts | _picture(path, limits)
    if kind == "clip":
        return facts | _clip(path, suffix, limits)
    if kind == "prepared":
        return facts | _prepared(path, out, limits)
    if kind == "sound":
        return facts | {"has_sound": True}
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError("The file of keypoints is not JSON.", "Give a keypoints.json of trt-wan.") from error
    return facts


def _picture(path: Path, limits: dict[str, Any]) -> dict[str, Any]:
    from trt_wan.runtime.video.pictures import read_transparent

    pixels = read_transparent(path).pixels
    _require_pixels(pixels.shape[1], pixels.shape[0], limits["clip_pixels"])
    return {"width": pixels.shape[1], "height": pixels.shape[0]}


def _clip(path: Path, suffix: str, limits: dict[str, Any]) -> dict[str, Any]:
    from trt_wan.runtime.video.reader import Clip

    _require_format(path, suffix)
    _require_few(path, limits["frames"])
    with Clip(path) as clip:
        _require_pixels(clip.width, clip.height, limits["clip_pixels"])
        for index in range(clip.frames):
            clip.window([index])
        facts = {"width": clip.width, "height": clip.height, "frames": clip.frames}
        return facts | {"fps": float(clip.rate), "has_sound": clip.has_sound}


def _require_format(path: Path, suffix: str) -> None:
    """Raises InputError for a file that ffmpeg takes for something else, such as a list of other files."""
    from trt_wan.runtime.video.container import open_container

    with open_container(path) as container:
        if FORMATS[suffix] not in container.format.name.split(","):
            raise InputError("The clip is not what its first bytes say.", "Encode it again.")


def _require_kind(path: Path) -> None:
    """Raises InputError for a file in a .zip with another one's beginning: ffmpeg would open a list of files
    under any name.
    """
    with path.open("rb") as file, suppress(InputError):
        kind, suffix = suffix_of(file.read(16))
        if path.suffix == suffix or (path.suffix, kind) == (".png", "picture"):
            return
    raise InputError(f"{path.name} in the .zip is no {path.suffix[1:]}.", "Pack the prepared clips again.")


def _require_few(path: Path, most: int) -> None:
    """Raises InputError for a clip of more frames, before they are decoded."""
    from trt_wan.runtime.video.container import measure

    if (frames := len(measure(path).used)) > most:
        raise InputError(f"The clip has {frames} frames, and the server takes {most}.", "Cut it first.")


def _require_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise InputError(
            f"The picture is {width}x{height}, and the server takes {most} pixels.", "Make it smaller."
        )


def _prepared(path: Path, out: Path, limits: dict[str, Any]) -> dict[str, Any]:
    """Unpacks the known files of a .zip, from any of its folders, and reads all clips to their ends."""
    from trt_wan.runtime.job import Inputs
    from trt_wan.runtime.video.clips import frames_of, open_clips

    try:
        with zipfile.ZipFile(path) as archive:
            _unpack(archive, out, limits["upload"])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise InputError("The .zip cannot be read.", "Pack the prepared clips again.") from error
    files = sorted(file.name for file in out.iterdir())
    if "src_ref.png" not in files:
        raise InputError("The .zip has no src_ref.png.", "Pack all of the prepared files.")
    for name in files:
        _require_kind(out / name)
    modes = ["animate"]
    if any(name.startswith("src_bg") for name in files) and any(
        name.startswith("src_mask") for name in files
    ):
        modes.append("replace")
    for name in files:
        if name.endswith(".mp4"):
            _require_format(out / name, ".mp4")
            _require_few(out / name, limits["frames"])
    facts: dict[str, Any] = {}
    for mode in modes:
        with open_clips(Inputs.from_folder(out, mode), 1) as clips:  # type: ignore[arg-type]
            _require_pixels(clips.width, clips.height, limits["pixels"])
            opened = (clips.pose, clips.face, clips.background, clips.mask)
            for index in range(clips.frames):
                for clip in opened:
                    if clip is not None:
                        frames_of(clip, [index])
            sound = any(clip.has_sound for clip in (clips.pose, clips.face) if clip is not None)
            facts = {"width": clips.width, "height": clips.height, "frames": clips.frames}
            facts |= {"fps": float(clips.rate), "has_sound": sound}
    return facts | {"files": files, "modes": modes}


def _unpack(archive: zipfile.ZipFile, out: Path, most: int) -> None:
    """The known files, of at most so many bytes together."""
    left = most
    for entry in archive.infolist()[:1000]:
        name = entry.filename.replace("\\", "/").rpartition("/")[2]
        stem, suffix = os.path.splitext(name)
        if stem not in PREPARED or suffix not in KINDS_INSIDE:
            continue
        with archive.open(entry) as source, (out / name).open("xb") as target:
            while data := source.read(STEP):
                left -= len(data)
                if left < 0:
                    raise InputError(
                        f"The clips in the .zip are larger than {most / 1e6:g} MB.", "Pack fewer."
                    )
                target.write(data)


def answered(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"facts": look()}
    except TrtWanError as error:
        return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    except MemoryError:
        message = "The upload needs more memory than the server gives to one."
        return {"error": {"code": InputError.code, "message": message, "hint": "Make it smaller."}}


def _limit(memory: int, seconds: int, file: int) -> None:
    """Bytes and seconds of this process, and bytes of a file that it writes. Windows has no such limits:
    there only the parent's clock counts.
    """
    if sys.platform == "win32":
        return
    import resource

    if sys.platform == "linux":  # decoders start a thread per CPU, which all take memory
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    for kind, most in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file),
    ):
        resource.setrlimit(kind, (most, most))


def main() -> None:
    # Imported before the upload is there: the process waits for it.
    import trt_wan.runtime.job
    import trt_wan.runtime.video.clips  # noqa: F401

    line = sys.stdin.readline()
    if not line:
        return
    task = json.loads(line)
    limits = task["limits"]
    _limit(limits["memory"], limits["seconds"], limits["upload"])
    path = Path(task["path"])
    answer = answered(lambda: check(path, Path(task["out"]), limits))
    if "error" in answer:  # without the server's own folders
        answer["error"] = {
            key: text.replace(f"{task['out']}/", "").replace(str(path), shown(task["name"]))
            for key, text in answer["error"].items()
        }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
