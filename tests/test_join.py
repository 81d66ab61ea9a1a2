"""Joined videos: every picture's own bits in order, exact times, the sound of each part at its place."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from lengths import MS, grey, make_sound, measured, write

from trt_wan.cli.main import cli
from trt_wan.errors import InputError, TrtWanError, UsageError
from trt_wan.runtime.video.encoder import Quality
from trt_wan.runtime.video.join import join_videos


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sound(tmp_path_factory.mktemp("sound") / "clicks.mp4", 12)


def packets(paths: Sequence[Path]) -> list[bytes]:
    found = []
    for path in paths:
        with av.open(str(path)) as container:
            found += [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return found


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        (".mp4", None, "24000/1001"),
        (".mp4", "hevc", "30000/1001"),
        (".mp4", "av1", "25"),
        (".mov", "prores", "30"),
    ]
    + [(".mkv", None, "30000/1001"), (".webm", None, "25"), (".mov", None, "16")],
)
@pytest.mark.parametrize("counts", [(25, 31), (1, 1), (97, 5, 40)])
def test_videos_become_one(
    tmp_path: Path, sound: Path, suffix: str, codec: str | None, rate: str, counts: tuple[int, ...]
) -> None:
    """Each part has the sound of its own time in one source, so that clicks come evenly in the whole."""
    per_second, parts, done = Fraction(rate), list[Path](), 0
    for k, count in enumerate(counts):
        start = done / per_second
        parts.append(tmp_path / f"{k}{suffix}")
        write(parts[-1], count, per_second, sound, quality=Quality(codec), sound_start=start)
        done += count
    whole = tmp_path / f"whole{suffix}"
    assert join_videos(parts, whole) == (done, per_second)
    assert packets([whole]) == packets(parts)
    found, exact = measured(whole), suffix in (".mp4", ".mov")
    frames = {name: n for name, n in found.frames.items() if codec != "av1" or name != "OpenCV"}
    assert set(frames.values()) == {done} and found.start == 0
    assert abs(found.duration - done / per_second) <= (2e-6 if exact else MS)
    for error in (found.by_time, found.back_to_back):
        assert error is None or error < 0.003
    assert done < 10 or found.by_time is not None
    with av.open(str(whole)) as container:
        seen = [float(frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]
    assert np.abs(np.array(seen) - [grey(k) for count in counts for k in range(count)]).max() <= 3
    assert {path.name for path in tmp_path.iterdir()} == {part.name for part in parts} | {whole.name}


def test_a_part_without_sound_is_silent(tmp_path: Path, sound: Path) -> None:
    parts = [tmp_path / "0.mp4", tmp_path / "1.mp4", tmp_path / "2.mp4"]
    for part, source in zip(parts, (None, sound, None), strict=True):
        write(part, 25, Fraction(25), source)
    join_videos(parts, tmp_path / "whole.mp4")
    found = measured(tmp_path / "whole.mp4")
    assert (
        found.by_time is not None and found.by_time < 0.003 and found.sound_end == pytest.approx(3, abs=0.03)
    )
    write(parts[1], 25, Fraction(25), None)
    join_videos(parts, tmp_path / "silent.mp4")
    assert measured(tmp_path / "silent.mp4").sound_end is None


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.mp4", 9, Fraction(25), None)
    others = {
        "other settings of the encoder and another rate": write(tmp_path / "b.mp4", 9, Fraction(24), None),
        "another codec": write(tmp_path / "c.mp4", 9, Fraction(25), None, quality=Quality("hevc")),
    }
    others["another codec and another pixel format"] = write(
        tmp_path / "d.mov", 9, Fraction(25), None, quality=Quality("prores")
    )
    for name, other in others.items():
        with pytest.raises(InputError, match=f"it has {name}"):
            join_videos([first, other], tmp_path / "whole.mp4")
    for output in ("whole.webm", "whole.gif", "a.mp4"):
        with pytest.raises(TrtWanError):
            join_videos([first, first], tmp_path / output)
    with pytest.raises(UsageError):
        join_videos([first, first], first, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_command(tmp_path: Path) -> None:
    first = str(write(tmp_path / "a.mp4", 9, Fraction(25), None))
    done = CliRunner().invoke(cli, ["join", first, first, "-o", str(tmp_path / "whole.mp4")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "whole.mp4"))
    assert measured(tmp_path / "whole.mp4").frames["PyAV"] == 18
