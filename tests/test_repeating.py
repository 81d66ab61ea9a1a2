"""`run --from` repeats a video byte for byte from the record in it, and names what differs. A real run of the
tiny model each.
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
from click.testing import CliRunner, Result
from tiny_job import PLAN, prepare, read_frames, write_clip, write_sound

from trt_wan.cli.main import cli
from trt_wan.errors import LONGEST_MESSAGE, OutputError
from trt_wan.runtime.kept import made
from trt_wan.runtime.kept.identity import LARGE, identity, is_same
from trt_wan.runtime.kept.record import read_record
from trt_wan.runtime.kept.windows import ANEW
from trt_wan.runtime.opening.model import Basis
from trt_wan.runtime.weights.tiny import write_tiny_weights

OPTIONS = ("--window", str(PLAN.frames), "--steps", "2", "--seed", "3", "--sampler", "euler")


@dataclass(frozen=True)
class Made:
    folder: Path
    video: Path
    bytes: bytes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path) -> Made:
    folder = tmp_path_factory.mktemp("made")
    write_tiny_weights(folder / "weights", seed=5)
    prepare(folder / "all", write_sound(folder / "tone.m4a", 1))
    (folder / "out.inputs").mkdir()
    for name in ("src_ref.png", "src_pose.mp4"):
        shutil.copy(folder / "all" / name, folder / "out.inputs" / name)
    video = folder / "out.mp4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        inputs = ("--inputs", str(folder / "out.inputs"), "--weights", str(folder / "weights"))
        result = invoke("run", *inputs, "-o", str(video), *OPTIONS)
    assert result.exit_code == 0, result.output
    return Made(folder, video, video.read_bytes())


@pytest.fixture(autouse=True)
def home(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))


@pytest.fixture
def copied(finished: Made, tmp_path: Path) -> Path:
    """The video and its clips without the .json, in another folder."""
    shutil.copytree(finished.folder / "out.inputs", tmp_path / "out.inputs")
    return Path(shutil.copy(finished.video, tmp_path / "out.mp4"))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def again(video: Path, *options: str) -> tuple[Result, Path]:
    output = video.with_name("again.mp4")
    return invoke("run", "--from", str(video), "-o", str(output), "--json", *options), output


def error_of(result: Result) -> Any:
    return json.loads(result.stdout.splitlines()[-1])["error"]


def notes(result: Result, code: str) -> Sequence[str]:
    events = map(json.loads, result.stdout.splitlines())
    return [event["text"] for event in events if event.get("code") == code]


def test_a_video_is_repeated_byte_for_byte(finished: Made) -> None:
    """By the paths in its .json."""
    result, output = again(finished.video, "--no-sidecar")
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == finished.bytes and not output.with_suffix(".json").exists()
    assert not notes(result, "not_repeated") and not notes(result, "other_versions")
    output.unlink()


def test_options_of_every_kind_are_repeated(finished: Made, tmp_path: Path) -> None:
    """Those whose meaning depends on being given too: --window with --context."""
    video = tmp_path / "long.mp4"
    inputs = ("--inputs", str(finished.folder / "out.inputs"), "--weights", str(finished.folder / "weights"))
    window = ("--window", str(PLAN.frames + 4), "--context", "static_standard", "--context-overlap", "4")
    windows = (*window, "--context-frames", str(PLAN.frames), "--no-freenoise")
    steps = ("--steps", "2", "--sampler", "lcm", "--guidance", "2,1", "--pose-end", "50", "--seed", "4")
    options = (*windows, *steps, "--colour-match", "mkl:0.5", "--start", "1", "--crf", "30")
    first = invoke("run", *inputs, "-o", str(video), *options)
    assert first.exit_code == 0, first.output
    result, output = again(video)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == video.read_bytes()


def test_the_metadata_names_files_without_folders(finished: Made) -> None:
    with av.open(str(finished.video)) as container:
        comment = container.metadata["comment"]
    assert str(finished.folder) not in comment and json.loads(comment)["job"]["seed"] == 3
    record = read_record(finished.video.with_suffix(".json"))
    assert record.job == json.loads(comment)["job"]
    assert record.paths["files"]["pose"] == [str(finished.folder / "out.inputs" / "src_pose.mp4")]
    assert record.files["pose"][0] == identity(finished.folder / "out.inputs" / "src_pose.mp4")
    assert {"transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "sound"} < set(record.files)
    assert len(read_frames(finished.video)) == record.video["frames"]


def test_a_shared_video_finds_its_files_beside_it_and_by_options(finished: Made, copied: Path) -> None:
    result, output = again(copied, "--weights", str(finished.folder / "weights"))
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == finished.bytes


def test_what_is_missing_or_another_file_is_named(finished: Made, copied: Path) -> None:
    weights = ("--weights", str(finished.folder / "weights"))
    write_clip(copied.parent / "out.inputs" / "src_pose.mp4", colour=(1, 200, 3))
    result, output = again(copied, *weights)
    assert result.exit_code == 2 and not output.exists()
    assert "would not repeat out.mp4: the pose src_pose.mp4 has other content" in error_of(result)["message"]
    shutil.rmtree(copied.parent / "out.inputs")
    result, _ = again(copied, *weights)
    assert result.exit_code == 2 and "Not found: out.inputs (--inputs)" in error_of(result)["message"]


def test_options_that_are_given_win_and_are_told(
    finished: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "__version__", "99")
    output = tmp_path / "other.mp4"
    result = invoke(
        "run", "--from", str(finished.video), "-o", str(output), "--json", "--seed", "4", "--steps", "1"
    )
    assert result.exit_code == 0, result.output
    assert "seed 3 (now 4); steps 2 (now 1)" in notes(result, "not_repeated")[0]
    assert "(now 99)" in notes(result, "other_versions")[0]
    record = read_record(output)
    assert (record.job["sampler"], record.job["seed"], record.options["sampler"]) == ("euler", 4, "euler")


@pytest.mark.parametrize(
    "name", ["tone.m4a", "all/src_pose.mp4", "weights/tokenizer.json", "all/src_ref.png"]
)
def test_a_file_without_a_record_is_refused(finished: Made, name: str) -> None:
    result, _ = again(finished.folder / name)
    assert result.exit_code == 2, result.output
    assert "no record of a run" in error_of(result)["message"]


def test_large_weights_are_known_by_samples(tmp_path: Path) -> None:
    """A change of the header, the middle or the end is seen; a copy under another name is the same file."""
    path, size = tmp_path / "a.safetensors", LARGE + 12345
    with path.open("wb") as file:
        file.truncate(size)
    first = identity(path, weights=True)
    copy = Path(shutil.copy(path, tmp_path / "b.safetensors"))
    assert is_same(first, identity(copy, weights=True)) and "sampled_sha256" in first
    assert not is_same(first, identity(copy)), "a hash of the whole is another thing"
    for place in (100, size // 2, size - 1):
        with copy.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert not is_same(first, identity(copy, weights=True))
        with copy.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")


def test_a_window_is_rendered_again_and_again(finished: Made, tmp_path: Path) -> None:
    """The record has every window's seed and the file that it went into; the whole video's seed stays."""
    new, old = tmp_path / "new.mp4", read_frames(finished.video)
    result = invoke("run", "--from", str(finished.video), "--redo", "2", "-o", str(new), "--json")
    assert result.exit_code == 0, result.output
    assert "window 2, frames 13 to 19, from seed 4." in notes(result, "redo")[0], "the next after 3"
    frames, record = read_frames(new), read_record(new)
    assert (frames[:13] == old[:13]).all() and not (frames[13:] == old[13:]).all(axis=(1, 2, 3)).any()
    step = {"seeds": {"2": 4}, "of": dict(identity(finished.video))}
    assert record.video["redone"] == [step] and (record.job["seed"], record.options["seed"]) == (3, 3)
    kept = new.read_bytes()

    refused, again = invoke("run", "--from", str(new), "-o", str(tmp_path / "no.mp4"), "--json"), None
    assert (
        refused.exit_code == 2
        and "rendered again (2): one run cannot repeat it" in error_of(refused)["message"]
    )
    for line in error_of(refused)["hint"].splitlines()[1:]:
        command = shlex.split(line)
        again = Path(command[-1] if Path(command[-1]).is_absolute() else tmp_path / command[-1])
        result = invoke(*(str(tmp_path / word) if word.endswith(".mp4") else word for word in command[1:]))
        assert result.exit_code == 0, result.output
    assert again is not None and (read_frames(again) == frames).all()
    assert read_record(again).video["redone"][0]["seeds"] == {"2": 4}

    result = invoke("run", "--from", str(new), "--redo", "1", "--redo", "2", "--seed", "8", "-y", "--json")
    assert result.exit_code == 0, result.output
    assert not (read_frames(new) == frames).all(axis=(1, 2, 3)).any()
    record = read_record(new)
    assert record.video["redone"] == [
        step,
        {"seeds": {"1": 8, "2": 8}, "of": {**identity_of(kept), "name": "new.mp4"}},
    ]
    assert record.paths and (record.job["seed"], record.options["seed"]) == (3, 3), (
        "the .json beside it is new too"
    )


def identity_of(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--redo", "3"), 2, "no window 3: the video has windows 1 to 2"),
        (("--redo", "1,0"), 2, "no window 0: the video has windows 1 to 2"),
        (("--redo", "-1"), 2, "'-1' is not the number of a window"),
        (("--redo", "1", "--steps", "1"), 2, "nothing else of out.mp4: steps 2 (now 1)"),
        (("--redo", "1", "--resume"), 2, "--resume would do nothing with --redo"),
        (("--redo", "1", "--frames", "pictures"), 2, "--frames would do nothing with --redo"),
        (("--redo", "1", "-o", "out.mkv"), 2, "kind .mp4 (now .mkv)"),
    ],
)
def test_what_cannot_be_rendered_again_is_refused(
    finished: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat() for path in finished.folder.iterdir()}
    output = () if "-o" in options else ("-o", "new.mp4")
    result = invoke("run", "--from", str(finished.video), *output, *options, "--json")
    assert result.exit_code == code and says in error_of(result)["message"], result.output
    assert (
        not list(tmp_path.iterdir()) and {path: path.stat() for path in finished.folder.iterdir()} == before
    )


def test_a_window_of_other_clips_is_refused(finished: Made, copied: Path) -> None:
    write_clip(copied.parent / "out.inputs" / "src_pose.mp4", colour=(1, 200, 3))
    result, output = again(copied, "--weights", str(finished.folder / "weights"), "--redo", "1")
    assert result.exit_code == 2 and not output.exists()
    assert "nothing else of out.mp4: the pose src_pose.mp4 has other content" in error_of(result)["message"]


def test_redo_asks_for_a_video_and_leave_to_replace_it(finished: Made, tmp_path: Path) -> None:
    video = str(finished.video)
    result = invoke("run", "--from", video, "--redo", "1", "--json")
    assert result.exit_code == 1 and "out.mp4 exists already" in error_of(result)["message"]
    record = str(finished.video.with_suffix(".json"))
    result = invoke("run", "--from", record, "--redo", "1", "-o", str(tmp_path / "a.mp4"), "--json")
    assert result.exit_code == 2 and "is the record of a video" in error_of(result)["message"]
    result = invoke("run", "a.png", "a.mp4", "--redo", "1", "-o", str(tmp_path / "a.mp4"), "--json")
    assert result.exit_code == 2 and finished.video.read_bytes() == finished.bytes


def test_a_forecast_of_windows_that_are_rendered_again(finished: Made) -> None:
    options = ("--redo", "1", "--seed", "6", "-o", "new.mp4", "--dry-run", "--json")
    result = invoke("run", "--from", str(finished.video), *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])["data"]
    assert told["redo"] == [{"window": 1, "frames": [0, 13], "seed": 6, "tied": 1}]
    assert (told["evaluations"], told["windows"]) == (2, 2)


GIVEN = (
    "--nag-prompt worse --nag-scale 3",
    "--clip-tiles 2",
    "--clip-image-2 {all}/src_ref.png --clip-strength 0.3",
    "--colour-match mkl",
    f"--context static_standard --context-frames {PLAN.frames} --context-overlap 4",
    "--start 1 --end 0.5",
    "--start-frame {all}/src_ref.png",
    "--mode replace --inputs {all} --paste-back",
    "--inputs {all} --reference-background grey",
    "--compat kijai",
    "--sigmas 1,0.5",
    "--audio {all}/src_pose.mp4 --codec hevc",
    "--guidance 5,1 --negative-prompt worse --cfg-zero-star",
    "--random-weights tiny",
)


@pytest.mark.parametrize("options", GIVEN)
def test_whatever_a_given_option_changes_was_asked_for(
    finished: Made, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a setting has another name than its option, and where options exclude each other."""
    monkeypatch.setattr(Basis, "open", raises(RuntimeError("opened")))
    given = options.format(all=finished.folder / "all").split()
    result, _ = again(finished.video, *given)
    assert "opened" in error_of(result)["message"], error_of(result)
    assert notes(result, "not_repeated")


def test_without_guidance_what_belongs_to_it_goes(
    finished: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Basis, "open", raises(RuntimeError("opened")))
    record = json.loads(finished.video.with_suffix(".json").read_text())
    guided = {"guidance": "3", "negative_prompt": "worse", "cfg_zero_star": True}
    record["options"] |= guided
    record["job"] |= {**guided, "guidance": 3.0}
    video = tmp_path / "guided.json"
    video.write_text(json.dumps(record))
    result, _ = again(video, "--guidance", "1")
    assert "opened" in error_of(result)["message"], error_of(result)


@pytest.mark.parametrize(
    ("hint", "has_state", "can_go_on"),
    [("Free some space.", True, True), ("Free some space.", False, False), (ANEW, True, False)],
)
def test_an_error_names_the_command_that_goes_on_where_it_can(
    finished: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hint: str,
    has_state: bool,
    can_go_on: bool,
) -> None:
    """Not where nothing is kept, as on a full disk, and not where what is kept is damaged."""
    monkeypatch.setattr(Basis, "open", lambda *_, **__: nullcontext())
    monkeypatch.setattr("trt_wan.runtime.render.render", raises(OutputError("Failed.", hint)))
    state = tmp_path / "new.partial.mp4.state"
    state.mkdir()
    (state / ("state.json" if has_state else "windows-1.npz")).touch()
    output = ("-o", str(tmp_path / "new.mp4"), "--json")
    result = invoke("run", "--from", str(finished.video), *output, "--resume")
    assert ("Go on after" in error_of(result)["hint"]) is can_go_on


def raises(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("options", "steps", {"a": 1}),
        ("options", "seed", [1, 2]),
        ("options", "loras", "abc"),
        ("paths", "options", [1]),
        ("paths", "options", {"inputs": 5}),
        ("paths", "options", {"inputs": "a" * 5000}),
        ("job", "a\x1b[31m" * 900, 1),
        ("files", "pose", [{"name": "b\n" * 900}]),
    ],
)
def test_a_record_of_strange_values_is_refused(
    finished: Made, tmp_path: Path, part: str, name: str, value: object
) -> None:
    record = json.loads(finished.video.with_suffix(".json").read_text())
    record[part][name] = value
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    result, _ = again(changed)
    assert result.exit_code == 2, result.output
    assert re.search(
        "is no value of --|Not found: |would not repeat|has no record", message := error_of(result)["message"]
    )
    assert len(message) < LONGEST_MESSAGE and message.isprintable()
