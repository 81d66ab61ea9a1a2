"""Lengths and sync of written videos, as other programs read them: a table, made by hand.

    python tests/lengths.py table lengths.txt       # every rate and length, PyAV, ffmpeg, OpenCV
    python tests/lengths.py counts lengths.txt      # every length, 1 to 400
    python tests/lengths.py runs lengths.txt        # by `trt-wan run` with the tiny model
    python tests/lengths.py browser out.mp4 9 25    # duration and frames in a headless Chromium

`measured` and `faults` are what test_video.py uses for a few of them. Pictures are flat greys that tell their
number; the sound clicks 10 ms after every tenth of a second.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import cv2
import imageio_ffmpeg
import numpy as np
from tiny_job import BUILD, PLAN, TRT_WAN, as_argv, write_clip, write_reference

from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.video.writer import DEFAULT_QUALITY, VideoWriter
from trt_wan.runtime.weights.tiny import write_tiny_weights

WIDTH, HEIGHT = 96, 64
CLICKS, FIRST_CLICK = 0.1, 0.01  # seconds
RATES = [Fraction(r) for r in ("12", "16", "24000/1001", "25", "30000/1001", "30", "50", "60000/1001")]
COUNTS = (*range(1, 41), 97, 231, 400)
MS = 0.001  # Matroska's clock


def grey(number: int) -> int:
    return 20 + number * 53 % 211


def make_sound(
    path: Path, seconds: float, codec: str = "aac", start: float = 0.0, rate: int = 48_000
) -> Path:
    """Clicks of 3 ms. The track begins at `start`, below 0 before the picture; a flat picture is the zero."""
    t = np.arange(int((seconds - start) * rate)) / rate + start
    wave = 0.8 * ((t - FIRST_CLICK) % CLICKS < 0.003) * (t > FIRST_CLICK / 2) * np.sin(2 * np.pi * 3000 * t)
    late = max(-start, 0.0)  # of the picture: no file's times begin below 0
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream(codec, rate=rate)
        audio.codec_context.layout = "mono"
        for k in range(max(1, int(seconds * 25))):
            picture = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = k + round(late * 25), Fraction(1, 25)
            container.mux(video.encode(picture.reformat(format="yuv420p")))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = (
            rate,
            round((start + late) * rate),
            Fraction(1, rate),
        )
        container.mux([*audio.encode(samples), *audio.encode(None)])
    return path


def write(
    path: Path,
    count: int,
    rate: Fraction,
    sound: Path | None,
    settle: Sequence[int] = (),
    finish: bool = True,
    quality: Quality = DEFAULT_QUALITY,
    sound_start: Fraction = Fraction(0),
) -> Path:
    """`settle`: the numbers of frames after which a window ends. Without `finish` the path of the partial
    file, as a killed process leaves it.
    """
    options: Any = {"quality": quality, "sound_start": sound_start}
    with VideoWriter(path, WIDTH, HEIGHT, rate, sound, overwrite=True, **options) as writer:
        for number in range(count):
            writer.write(np.full((HEIGHT, WIDTH, 3), grey(number), np.uint8))
            if number + 1 in settle:
                writer.settle()
        if finish:
            return writer.finish()
        writer.wait()
        return Path(shutil.copy(writer.partial, path.with_name(f"killed{path.suffix}")))


@dataclass(frozen=True)
class Measured:
    """Times in seconds, of the first picture unless they say otherwise; None where there is no sound."""

    start: float
    duration: float  # of the container
    frames: dict[str, int]  # by program
    rate: dict[str, float]
    in_order: bool
    sound_start: float | None
    sound_end: float | None
    by_time: float | None  # largest error of a click, by time stamps
    back_to_back: float | None  # the same, samples counted from the first one's time on


def measured(path: Path, clicks_from: float = 0.0) -> Measured:
    """`clicks_from`: seconds of the source that were cut off before the sound."""
    frames, rates = {}, {}
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        greys, times = [], []
        for frame in container.decode(video):
            greys.append(round(float(frame.to_ndarray(format="gray").mean())))
            times.append(float(frame.time or 0))
        frames["PyAV"], rates["PyAV"] = len(greys), float(video.average_rate or 0)
        duration = (container.duration or 0) / av.time_base
        in_order = all(abs(seen - grey(k)) <= 3 for k, seen in enumerate(greys))
    with av.open(str(path)) as container:
        sound = _heard(container, clicks_from) if container.streams.audio else (None, None, None, None)
    reader = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    rates["OpenCV"], frames["OpenCV"] = reader.get(cv2.CAP_PROP_FPS), 0
    while reader.read()[0]:
        frames["OpenCV"] += 1
    # At a constant rate ffmpeg fills holes with repeats.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-fps_mode", "cfr"]
    done = subprocess.run([*command, "-f", "framecrc", "-"], capture_output=True, text=True, check=True)
    frames["ffmpeg"] = len(re.findall(r"^0,", done.stdout, re.MULTILINE))
    return Measured(times[0], duration, frames, rates, in_order, *sound)


def _heard(container: Any, clicks_from: float) -> tuple[float | None, float, float | None, float | None]:
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=48_000)
    start, end, count = None, 0.0, 0
    stamped, counted = [], []
    for decoded in itertools.chain(container.decode(audio=0), [None]):
        for frame in resampler.resample(decoded):
            here = float(frame.time or 0)
            start = here if start is None else start
            loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2) / 48_000
            stamped += list(here + loud)
            counted += list(count / 48_000 + loud)
            count += frame.samples
            end = here + frame.samples / 48_000
    in_a_row = [(start or 0) + t for t in counted]
    return start, end, _error(stamped, clicks_from), _error(in_a_row, clicks_from)


def _error(loud: list[float], clicks_from: float) -> float | None:
    """The largest distance of a click's first sample from the time it should have."""
    clicks = [t for before, t in zip([-1.0, *loud], loud, strict=False) if t - before > CLICKS / 2]
    errors = [abs((t + clicks_from - FIRST_CLICK + CLICKS / 2) % CLICKS - CLICKS / 2) for t in clicks]
    return max(errors, default=None)


def faults(found: Measured, count: int, rate: Fraction, exact: bool = True, greys: bool = True) -> list[str]:
    """`exact` is False for Matroska, which counts milliseconds; `greys`: pictures are those of `write`."""
    length, slack = float(count / rate), 2e-6 if exact else MS
    wrong = [] if found.start == 0 else [f"the picture starts at {found.start}"]
    wrong += [f"{n} frames in {name}" for name, n in found.frames.items() if n != count]
    wrong += [] if found.in_order or not greys else ["wrong pictures"]
    if abs(found.duration - length) > slack:
        wrong.append(f"duration {found.duration} for {length}")
    if exact or count > 2:
        wrong += [f"{r} fps in {name}" for name, r in found.rate.items() if abs(r / float(rate) - 1) > 1e-4]
    for name, error in (("time stamps", found.by_time), ("back to back", found.back_to_back)):
        if error is not None and error > 0.002:
            wrong.append(f"sound {error * 1000:.0f} ms off by {name}")
    return wrong


def windows(count: int, window: int, overlap: int) -> list[int]:
    """The numbers of frames after which windows end."""
    return list(range(window, count, window - overlap))


def jobs(folder: Path) -> Iterator[tuple[int, Fraction, Path | None, str, int]]:
    """Frames, rate, sound, ending, overlap."""
    sound = make_sound(folder / "aac.mp4", 36)
    flac = make_sound(folder / "flac.mkv", 36, "flac", rate=44_100)
    late = make_sound(folder / "late.mp4", 36, start=0.5)
    few = (1, 2, 3, 9, 20, 40, 97)
    for rate, count, source in itertools.product(RATES, COUNTS, (None, sound)):
        yield count, rate, source, ".mp4", 1
    for suffix, rate, count, source in itertools.product(
        (".mov", ".mkv", ".webm"), RATES[2:5], few, (None, sound)
    ):
        yield count, rate, source, suffix, 1
    for rate, count, source, overlap in itertools.product(RATES[3:5], (*few, 231), (flac, late), (1, 5)):
        yield count, rate, source, ".mp4", overlap


TITLE = (
    "frames     rate  sound     file   overlap  start  duration-n/fps us  PyAV ffmpeg OpenCV"
    "  sound start ms  end ms  clicks: by time ms  in a row ms"
)


def row(case: tuple[int, Fraction, Path | None, str, int], found: Measured, wrong: list[str]) -> str:
    count, rate, source, suffix, overlap = case
    times = (found.sound_start, found.sound_end, found.by_time, found.back_to_back)
    in_ms = [f"{'-' if t is None else f'{t * 1000:.1f}':>10}" for t in times]
    numbers = [f"{found.frames[program]:6}" for program in ("PyAV", "ffmpeg", "OpenCV")]
    off = (found.duration - float(count / rate)) * 1e6
    start = f"{count:6} {float(rate):8.3f}  {source.name if source else '-':9} {suffix:7} {overlap}"
    return " ".join((start, f"{found.start:10.3f} {off:10.1f}    ", *numbers, *in_ms, "; ".join(wrong)))


def table() -> Iterator[str]:
    """By the writer alone, with windows of 13 or 77 frames."""
    yield TITLE
    made = bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count, rate, source, suffix, overlap in jobs(folder):
            ends = windows(count, 77 if count > 77 else 13, overlap)
            found = measured(write(folder / f"out{suffix}", count, rate, source, ends))
            wrong = faults(found, count, rate, suffix in (".mp4", ".mov"))
            made, bad = made + 1, bad + bool(wrong)
            yield row((count, rate, source, suffix, overlap), found, wrong)
    yield f"{made} files, {bad} with a fault"


# Endings and codecs that `counts` takes in turn; OpenCV has no AV1.
KINDS = [
    (".mp4", None),
    (".mkv", None),
    (".mp4", "hevc"),
    (".webm", None),
    (".mov", "prores"),
    (".mp4", "av1"),
]
STARTS = [Fraction(0), Fraction(1, 3), Fraction(5, 2)]  # seconds that --start cuts off


def counts(last: int = 400) -> Iterator[str]:
    """By the writer alone, with windows of 77 frames. Every list is of another length, so that all meet."""
    yield TITLE
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sounds = [None, make_sound(folder / "aac.mp4", 40), make_sound(folder / "late.mp4", 40, start=0.5)]
        sounds.append(make_sound(folder / "flac.mkv", 40, "flac", rate=44_100))
        sounds.append(make_sound(folder / "early.mkv", 40, start=-0.4))
        for count in range(1, last + 1):
            rate, source = RATES[count % len(RATES)], sounds[count % len(sounds)]
            (suffix, codec), start = KINDS[count % len(KINDS)], STARTS[count // 5 % len(STARTS)]
            case = (count, rate, source, suffix, 1)
            ends, quality = windows(count, 77, 1), Quality(codec)
            path = write(
                folder / f"out{suffix}", count, rate, source, ends, quality=quality, sound_start=start
            )
            found = measured(path, float(start))
            wrong = faults(found, count, rate, suffix in (".mp4", ".mov"))
            wrong = [fault for fault in wrong if codec != "av1" or "OpenCV" not in fault]
            bad += bool(wrong)
            yield row(case, found, [*wrong, f"{codec or ''} from {float(start):.2f} s"])
    yield f"{last} files, {bad} with a fault"


def runs() -> Iterator[str]:
    """By `trt-wan run` with the tiny model, windows of 13 frames; the last source has a variable rate."""
    yield TITLE
    made = bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_weights(folder / "weights", seed=0)
        subprocess.run(as_argv(BUILD), check=True, capture_output=True)
        sound, late = make_sound(folder / "aac.mp4", 4), make_sound(folder / "late.mp4", 4, start=0.5)
        cases = [
            (n, Fraction(25), sound, x, o) for n in (1, 2, 13, 40) for o in (1, 5) for x in (".mp4", ".webm")
        ]
        cases += [(20, Fraction(30000, 1001), late, x, o) for o in (1, 5) for x in (".mp4", ".mkv")]
        cases += [(20, Fraction(0), None, x, o) for o in (1, 5) for x in (".mp4", ".mkv")]
        for count, rate, source, suffix, overlap in cases:
            write_reference(folder / "src_ref.png")
            if rate:
                write_clip(folder / "src_pose.mp4", frames=count, rate=rate, sound=source)
            else:
                write_unevenly(folder / "src_pose.mp4", count)
            with Clip(folder / "src_pose.mp4") as clip:
                rate = clip.rate
            output = folder / f"out{suffix}"
            options = ["--inputs", folder, "--weights", folder / "weights", "-o", output, "-y", "-q"]
            options += ["--window", PLAN.frames, "--overlap", overlap, "--steps", 1]
            subprocess.run([*TRT_WAN, "run", *map(str, options)], check=True, capture_output=True)
            found = measured(output)
            wrong = faults(found, count, rate, suffix in (".mp4", ".mov"), greys=False)
            made, bad = made + 1, bad + bool(wrong)
            yield row((count, rate, source, suffix, overlap), found, wrong)
    yield f"{made} files, {bad} with a fault"


def write_unevenly(path: Path, count: int) -> None:
    """Pictures 20 to 80 ms apart."""
    gaps = np.random.default_rng(0).integers(20, 80, count)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = PLAN.width, PLAN.height, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        for pts in np.cumsum(gaps) - gaps[0]:
            black = np.zeros((PLAN.height, PLAN.width, 3), np.uint8)
            picture = av.VideoFrame.from_ndarray(black, format="rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = int(pts), Fraction(1, 1000)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))


PAGE = """<video id=v muted></video><script>
async function look() {
  const video = document.getElementById("v"), [count, rate] = [COUNT, RATE]
  video.src = URL.createObjectURL(await (await fetch("/video")).blob())
  await new Promise((done, failed) => {
    video.onloadeddata = done
    video.onerror = () => failed(video.error.message)
  })
  const times = new Set()
  for (let k = 0; k < count + 3; k++) {
    await new Promise(done => {
      video.requestVideoFrameCallback((now, data) => { times.add(data.mediaTime); done() })
      setTimeout(done, 1500)  // the picture is the one before
      video.currentTime = (k + 0.5) / rate
    })
  }
  return {duration: video.duration, times: [...times].sort((a, b) => a - b)}
}
look().then(seen => JSON.stringify(seen), error => JSON.stringify({error: String(error)}))
      .then(body => fetch("/seen", {method: "POST", body}))
</script>"""


def in_browser(path: Path, count: int, rate: Fraction) -> dict[str, Any]:
    """`duration`, and `times` of the frames that a headless Chromium shows when it seeks to each."""
    seen: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = PAGE.replace("COUNT", str(count)).replace("RATE", str(float(rate))).encode()
            body = path.read_bytes() if self.path == "/video" else page
            kind = "text/html"
            if self.path == "/video":
                kind = "video/webm" if path.suffix == ".webm" else "video/mp4"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install Chromium: apt-get install chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [browser, *options, f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not seen:
                server.handle_request()
        finally:
            process.terminate()
            process.wait()
            server.server_close()
    return seen[0]


def main(command: str, path: Path, *numbers: str) -> None:
    if command == "browser":
        count, rate = int(numbers[0]), Fraction(numbers[1])
        seen = in_browser(path, count, rate)
        print(f"{path.name}: {len(seen.get('times', ()))} frames, {float(count / rate)} s wanted; {seen}")
    else:
        with path.open("w") as file:
            for line in {"table": table, "counts": counts, "runs": runs}[command]():
                print(line, file=file, flush=True)
        print(line)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
