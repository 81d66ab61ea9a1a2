"""`trt-wan preprocess` and `run REF CLIP` as users run them, with made-up people instead of networks."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import click
import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from made_clips import SIZE, FakePeople, FakeSegmenter, textured, write_clip, write_reference

import trt_wan.cli.missing
import trt_wan.preprocess.stages
from trt_wan.cli.main import cli
from trt_wan.cli.preprocess import preprocess as preprocess_command
from trt_wan.engines.config import TINY
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import graphs_folder
from trt_wan.errors import GraphError, Stopped
from trt_wan.install import install_command
from trt_wan.preprocess.clips.keypoints import FoundPeople, write_keypoints
from trt_wan.preprocess.clips.sizes import Fit
from trt_wan.preprocess.people.person import NOBODY, PersonFrame
from trt_wan.preprocess.pictures.masks import Compat, Mask
from trt_wan.preprocess.retarget.rules import RetargetRule
from trt_wan.preprocess.stages import (
    BoxSegmenter,
    Executor,
    Networks,
    SegmenterName,
    Stages,
    open_stages,
)
from trt_wan.runtime.job import Mode
from trt_wan.runtime.opening.model import OpenModel
from trt_wan.runtime.video.reader import Clip, Picture
from trt_wan.runtime.weights.tiny import write_tiny_weights

ROOT = Path(__file__).parents[1]
ALL = {
    "keypoints.json",
    "preview.mp4",
    "src_bg.mp4",
    "src_face.mp4",
    "src_mask.mp4",
    "src_pose.mp4",
    "src_ref.png",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with a character, 64x48 or a multiple of it, and a clip of 15 frames."""
    monkeypatch.chdir(tmp_path)
    write_reference(tmp_path / "character.png", (128, 96))
    write_clip(tmp_path / "dance.mp4", 15, codec="libx264", sound=True)
    return tmp_path


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Networks]:
    """No networks; what was asked for is kept."""
    asked: list[Networks] = []

    def opened(
        networks: Networks, mode: Mode, compat: object, *, needs_people: bool, **options: object
    ) -> Stages:
        networks.require_used(mode, needs_people)
        asked.append(networks)
        return Stages(FakePeople(), FakeSegmenter())

    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", opened)
    return asked


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def refused(result: Result, exit_code: int, code: str) -> tuple[str, str]:
    assert result.exit_code == exit_code, result.output
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert error["code"] == code and error["message"].endswith((".", ")")) and error["hint"], error
    return error["message"], error["hint"]


PREPARE = ("preprocess", "character.png", "dance.mp4", "-o", "out", "--size", "64x48")


# --- preprocess ------------------------------------------------------------------------------------------


def test_preprocess_says_the_folder_and_nothing_else_on_stdout(folder: Path, fakes: list[Networks]) -> None:
    result = invoke(*PREPARE, "--mode", "replace")
    assert (result.exit_code, result.stdout) == (0, "out\n"), result.output
    assert {path.name for path in (folder / "out").iterdir()} == ALL
    assert "People are found by a made-up source." in result.stderr
    assert "writing the clips, frame 15 of 15" in result.stderr
    with Clip(folder / "out" / "src_pose.mp4") as pose:
        assert (pose.frames, pose.rate, pose.has_sound) == (15, Fraction(12), True)


def test_preprocess_in_json(folder: Path, fakes: list[Networks]) -> None:
    result = invoke(*PREPARE, "--json")
    envelope = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and envelope["ok"] and envelope["data"]["result"] == "out"
    assert {Path(file).name for file in envelope["data"]["files"]} == ALL - {"src_bg.mp4", "src_mask.mp4"}
    assert envelope["data"]["seconds"] > 0


def test_what_is_there_is_kept_without_y(folder: Path, fakes: list[Networks]) -> None:
    assert invoke(*PREPARE).exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    message, hint = refused(invoke(*PREPARE, "--json"), 1, "output_unwritable")
    assert "already" in message and "--inputs out" in hint
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before
    assert invoke(*PREPARE, "-y", "--mode", "replace").exit_code == 0
    assert {path.name for path in (folder / "out").iterdir()} == ALL


def test_options_reach_the_job(folder: Path, fakes: list[Networks], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    monkeypatch.setattr(
        "trt_wan.preprocess.preprocess.preprocess", lambda job, *_: jobs.append(job) or folder
    )
    options = (
        "--rate 24000/1001 --box 1,2,30.5,40 --mode replace --grow 4 --block 48 --fill --fit pad --no-head"
    )
    cut_out(folder / "cut.png")
    options += " --segmenter box --face-padding 7 --mask-paint cut.png"
    assert invoke(*PREPARE, *options.split()).exit_code == 0
    (job,) = jobs
    assert (job.rate, job.size, job.fit) == (Fraction(24000, 1001), (64, 48), "pad")
    assert (job.choice.box.x0, job.choice.box.y1) == (1, 40) and job.choice.number is None
    assert (job.mask.grow, job.mask.block, job.mask.fill) == (4, 48, True)
    assert (job.head, job.hands, job.face, job.face_padding) == (False, True, True, 7)
    assert fakes[0].segmenter == "box" and job.mask_paint == Path("cut.png")
    assert (
        invoke(*PREPARE, "--point", "3,4.5", "--retarget", "official", "--compat", "official").exit_code == 0
    )
    assert (jobs[1].choice.point, jobs[1].retarget, jobs[1].compat) == ((3, 4.5), "official", "official")


def notes(result: Result) -> dict[str, dict[str, Any]]:
    """The data of a --json command's notes by code, but for the files of weights; each code is there once."""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    said = [
        event
        for event in events
        if event.get("event") == "Note" and event["code"] not in ("", "weights_file")
    ]
    assert len({note["code"] for note in said}) == len(said), said
    return {note["code"]: note["data"] for note in said}


def cut_out(path: Path) -> None:
    """A character on a transparent ground, with a colour hidden under it."""
    drawing = np.full((96, 128, 4), (10, 200, 90, 0), np.uint8)
    drawing[20:60, 40:80] = (60, 70, 80, 255)
    cv2.imwrite(str(path), drawing)


def test_a_cut_out_reference(folder: Path, fakes: list[Networks]) -> None:
    cut_out(folder / "character.png")
    result = invoke(*PREPARE, "--reference-background", "#102030", "--json")
    assert notes(result)["transparent"]["background"] == "#102030"
    made = cv2.cvtColor(cv2.imread("out/src_ref.png", cv2.IMREAD_UNCHANGED), cv2.COLOR_BGR2RGB)
    assert (made[0, 0] == (16, 32, 48)).all() and (made[30, 50] == (80, 70, 60)).all()
    outline = cv2.imread("out/src_ref_mask.png", cv2.IMREAD_UNCHANGED)
    assert outline.shape == (96, 128) and outline.sum() == 255 * 40 * 40 and outline[30, 50] == 255
    write_reference(folder / "character.png", (128, 96))
    again = invoke(*PREPARE, "-y", "--json")
    assert again.exit_code == 0 and "transparent" not in notes(again)
    assert not (folder / "out" / "src_ref_mask.png").exists()
    assert (folder / "out" / "src_ref.png").read_bytes() == (folder / "character.png").read_bytes()
    refused(invoke(*PREPARE, "-y", "--reference-background", "hwite", "--json"), 2, "usage")


@pytest.mark.parametrize("given", ["dance", "dance/frame_%03d.png"])
@pytest.mark.parametrize(("options", "rate"), [((), 30), (("--rate", "8"), 8), (("--compat", "kijai"), 16)])
def test_numbered_pictures_as_a_clip(
    folder: Path, fakes: list[Networks], given: str, options: tuple[str, ...], rate: int
) -> None:
    """Every picture is used once, at the rate that is asked for."""
    (folder / "dance").mkdir()
    for k in range(7):
        cv2.imwrite(f"dance/frame_{k:03d}.png", textured((320, 180), k))
    arguments = ("preprocess", "character.png", given, "-o", "out", "--size", "64x48")
    result = invoke(*arguments, *options, "--json")
    assert result.exit_code == 0, result.output
    assert notes(result)["pictures"]["rate"] == rate
    with Clip(folder / "out" / "src_pose.mp4") as pose:
        assert (pose.frames, pose.rate, pose.has_sound) == (7, rate, False)


def test_a_clip_from_stdin(folder: Path, fakes: list[Networks]) -> None:
    assert invoke(*PREPARE).exit_code == 0
    piped = [name if name != "dance.mp4" else "-" for name in PREPARE]
    piped[piped.index("out")] = "piped"
    result = CliRunner().invoke(cli, piped, input=(folder / "dance.mp4").read_bytes())
    assert result.exit_code == 0, result.output
    for name in ("src_pose.mp4", "keypoints.json"):
        assert (folder / "piped" / name).read_bytes() == (folder / "out" / name).read_bytes()
    both = ["-" if name in ("dance.mp4", "character.png") else name for name in PREPARE]
    message, _ = refused(invoke(*both, "-y", "--json"), 2, "usage")
    assert "one can be" in message


@dataclass(frozen=True)
class Refusal:
    exit_code: int
    code: str
    says: str
    fix: str
    options: tuple[str, ...]


REFUSALS = {
    "size": Refusal(2, "usage", "'0x48' is not a size such as 832x480.", "--help", ("--size", "0x48")),
    "size too small": Refusal(1, "input_unusable", "too thin", "Crop", ("--size", "5x5")),
    "rate": Refusal(2, "usage", "'fast' is not a rate", "--help", ("--rate", "fast")),
    "rate 0": Refusal(2, "usage", "A rate of 0 makes no video", "16 or 30", ("--rate", "0")),
    "rate 1/0": Refusal(2, "usage", "'1/0' is not a rate", "--help", ("--rate", "1/0")),
    "point": Refusal(2, "usage", "'3' is not 2 pixel numbers", "--help", ("--point", "3")),
    "box": Refusal(2, "usage", "'1,2,3,nan' is not 4 pixel numbers", "--help", ("--box", "1,2,3,nan")),
    "person 0": Refusal(2, "usage", "0 is not in the range", "--help", ("--person", "0")),
    "person twice": Refusal(
        2, "usage", "three ways to choose the person", "Give one", ("--person", "1", "--point", "1,2")
    ),
    "block": Refusal(
        2, "usage", "A block of 20 pixels", "--block 16", ("--mode", "replace", "--block", "20")
    ),
    "block in animate": Refusal(
        2, "usage", "there is no mask, so --block", "--mode replace", ("--block", "32")
    ),
    "paint in animate": Refusal(
        2, "usage", "there is no mask, so --mask-paint", "--mode replace", ("--mask-paint", "character.png")
    ),
    "paint without holes": Refusal(
        *(1, "input_unusable", "character.png has no transparent pixels", "PNG"),
        ("--mode", "replace", "--mask-paint", "character.png"),
    ),
    "sam2 in animate": Refusal(
        2, "usage", "there is no mask, so --sam2", "--mode replace", ("--sam2", "x.pt")
    ),
    "official blocks": Refusal(
        2, "usage", "one rectangle", "--block", ("--mode", "replace", "--compat", "official", "--block", "32")
    ),
    "retarget in replace": Refusal(
        2, "usage", "nothing is retargeted", "--mode animate", ("--mode", "replace", "--retarget", "safe")
    ),
    "edited without retarget": Refusal(
        2, "usage", "read for retargeting only", "--retarget safe", ("--edited-driving", "character.png")
    ),
    "keypoints": Refusal(
        1, "input_unusable", "nowhere.json cannot be read", "keypoints.json", ("--keypoints", "nowhere.json")
    ),
    "rate of a thousand million": Refusal(
        2, "usage", "A rate of 999999999 makes no", "16", ("--rate", "9" * 9)
    ),
    "rate with an exponent": Refusal(2, "usage", "is not a rate", "--help", ("--rate", "1e99999999")),
    "rate nan": Refusal(2, "usage", "'nan' is not a rate", "--help", ("--rate", "nan")),
    "rate -5": Refusal(2, "usage", "A rate of -5 makes no video", "16 or 30", ("--rate", "-5")),
    "size of a wall": Refusal(
        2, "usage", "A video of 20000x20000 is too large", "832x480", ("--size", "20000x20000")
    ),
    "size of a line": Refusal(2, "usage", "8200x16 is too large", "832x480", ("--size", "8200x16")),
    "size of 5000 digits": Refusal(2, "usage", "is not a size", "--help", ("--size", "9" * 5000 + "x1")),
    "grow -5": Refusal(
        2, "usage", "cannot grow by -5 pixels", "--grow 0 to", ("--mode", "replace", "--grow", "-5")
    ),
    "grow 100000": Refusal(
        2, "usage", "grow by 100000", "--grow 512", ("--mode", "replace", "--grow", "100000")
    ),
    "grow in animate": Refusal(2, "usage", "there is no mask, so --grow", "--mode replace", ("--grow", "0")),
    "block -16": Refusal(
        2, "usage", "A block of -16 pixels", "--block 16", ("--mode", "replace", "--block", "-16")
    ),
    "block 16000": Refusal(
        2, "usage", "A block of 16000 pixels", "--block 512", ("--mode", "replace", "--block", "16000")
    ),
    "face padding -1": Refusal(2, "usage", "padding of -1", "--face-padding 0", ("--face-padding", "-1")),
    "face padding 100000": Refusal(
        2, "usage", "padding of 100000", "--face-padding 1024", ("--face-padding", "100000")
    ),
    "padding of no face": Refusal(
        2, "usage", "so --face-padding would do nothing", "--no-face", ("--face-padding", "9", "--no-face")
    ),
    "point outside": Refusal(
        2,
        "usage",
        "--point is outside of the clip's picture",
        "pixels",
        ("--point", "320,5"),
    ),
    "point nan": Refusal(2, "usage", "is not 2 pixel numbers", "--help", ("--point", "nan,5")),
    "box outside": Refusal(2, "usage", "--box is outside", "pixels of the clip", ("--box", "5,200,9,300")),
    "box from right to left": Refusal(
        2, "usage", "The box 50,10,20,90 is empty", "x0 < x1", ("--box", "50,10,20,90")
    ),
    "person with keypoints": Refusal(
        2, "usage", "so --person would do nothing", "--keypoints", ("--person", "1", "--keypoints", "k.json")
    ),
    "detector with keypoints": Refusal(
        2,
        "usage",
        "so --detector would do nothing",
        "--keypoints",
        ("--detector", "x.onnx", "--keypoints", "nobody.json"),
    ),
    "sam2 beside the box": Refusal(
        2,
        "usage",
        "so --sam2 would do nothing",
        "Leave out one",
        ("--mode", "replace", "--sam2", "x.pt", "--segmenter", "box"),
    ),
    "segmenter in animate": Refusal(
        2, "usage", "so --segmenter would do nothing", "--mode replace", ("--segmenter", "box")
    ),
    "executor of nothing": Refusal(
        2, "usage", "so --executor would do nothing", "--detector", ("--executor", "tensorrt")
    ),
    "unknown option": Refusal(2, "usage", "No such option", "--help", ("--sizes", "3")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_preprocess_refuses(folder: Path, fakes: list[Networks], name: str) -> None:
    write_keypoints(folder / "nobody.json", FoundPeople([NOBODY] * 15, SIZE, None, (64, 48)))
    case, before = REFUSALS[name], set(folder.iterdir())
    message, hint = refused(invoke(*PREPARE, "--json", *case.options), case.exit_code, case.code)
    assert case.says in message and case.fix in hint, (message, hint)
    assert set(folder.iterdir()) == before


# --- What is used ----------------------------------------------------------------------------------------


def clean(folder: Path, *options: str, exit_code: int, code: str) -> tuple[str, str]:
    """A refusal that leaves nothing, by the real stages."""
    before = set(folder.iterdir())
    told = refused(invoke(*PREPARE, "--json", *options), exit_code, code)
    assert set(folder.iterdir()) == before
    return told


@pytest.fixture
def no_mediapipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_wan.preprocess.stages, "_has_mediapipe", lambda: False)


def test_nothing_to_find_people_with(folder: Path, no_mediapipe: None) -> None:
    message, hint = clean(folder, exit_code=2, code="usage")
    assert message.startswith("There is nothing to find people with")
    assert hint == f"Give the two ONNX files, or install MediaPipe:\n{install_command('mediapipe')}"


@pytest.mark.parametrize("option", ["--detector", "--pose"])
def test_a_detector_or_a_pose_network_alone(folder: Path, option: str) -> None:
    message, _ = clean(folder, option, "x.onnx", exit_code=2, code="usage")
    assert f"{'--pose' if option == '--detector' else '--detector'} is not given" in message


def test_a_wrong_onnx_file(folder: Path) -> None:
    """Text, an empty file, a missing one, a cut one; as detector and as pose network."""
    (folder / "text.onnx").write_text("no network " * 99)
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "noise.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("text.onnx", "empty.onnx", "noise.onnx", "nowhere.onnx", "character.png"):
        message, _ = clean(folder, "--detector", name, "--pose", name, exit_code=1, code="weights_unusable")
        assert name in message


def test_nothing_to_make_masks_with(folder: Path, no_mediapipe: None) -> None:
    write_keypoints(folder / "k.json", FoundPeople([NOBODY] * 15, SIZE, None, (64, 48)))
    people = ("--keypoints", "k.json", "--mode", "replace")
    message, hint = clean(folder, *people, exit_code=2, code="usage")
    assert "nothing to make masks with" in message and "--segmenter box" in hint
    message, _ = clean(folder, *people, "--segmenter", "sam2", exit_code=2, code="usage")
    assert message == "SAM2 has no weights."
    (folder / "sam2.pt").write_text("no weights")
    message, _ = clean(folder, *people, "--sam2", "sam2.pt", exit_code=1, code="weights_unusable")
    assert "sam2.pt" in message


def test_keypoints_need_nobody_to_find_people(no_mediapipe: None) -> None:
    stages = open_stages(Networks(segmenter="box"), "replace", None, needs_people=False)
    assert stages.people is None and isinstance(stages.segmenter, BoxSegmenter)
    assert open_stages(Networks(), "animate", None, needs_people=False).segmenter is None


# --- run REF CLIP ----------------------------------------------------------------------------------------


@pytest.fixture
def place(folder: Path, tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    write_tiny_weights(folder / "weights", seed=5)
    return folder


RUN = ("run", "--weights", "weights", "-o", "out.mp4", "--window", "13", "--steps", "1", "--no-face")
RUN_CLIP = (*RUN, "character.png", "dance.mp4", "--size", "64x48")


def test_run_prepares_on_its_own_and_again_with_inputs(place: Path, fakes: list[Networks]) -> None:
    result = invoke(*RUN_CLIP)
    assert (result.exit_code, result.stdout) == (0, "out.mp4\n"), result.output
    with Clip(place / "out.mp4") as clip:
        assert (clip.width, clip.height, clip.frames, clip.rate) == (64, 48, 15, Fraction(12))
        assert clip.has_sound
    made = {path.name for path in (place / "out.inputs").iterdir()}
    assert made == {"keypoints.json", "prepared.json", "preview.mp4", "src_pose.mp4", "src_ref.png"}
    first = (place / "out.mp4").read_bytes()
    again = invoke(*RUN[:-1], "--inputs", "out.inputs", "-y")
    assert again.exit_code == 0 and (place / "out.mp4").read_bytes() == first and len(fakes) == 1


def test_a_resumed_run_prepares_nothing_again(
    place: Path, fakes: list[Networks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second window. Clips of other options are not used for this run."""

    def stopping(model: OpenModel, job: Any, **options: Any) -> Any:
        for number, piece in enumerate(pieces(model, job, **options)):
            if number == 4:
                raise Stopped("Stopped.")
            yield piece

    pieces = OpenModel.pieces
    with monkeypatch.context() as patch:
        patch.setattr(OpenModel, "pieces", stopping)
        _, hint = refused(invoke(*RUN_CLIP, "--json"), 130, "interrupted")
    assert f"\n{shlex.join(('trt-wan', *RUN_CLIP, '--json', '--resume'))}\n" in hint
    other = invoke(*RUN_CLIP, "--person", "1", "--resume", "-y", "--json")
    message, hint = refused(other, 2, "usage")
    assert "out.inputs are of another picture or clip" in message and "Leave out --resume" in hint
    result = invoke(*RUN_CLIP, "--resume", "--json")
    assert result.exit_code == 0 and len(fakes) == 1, result.output
    assert {"prepared_before", "resumed"} <= set(notes(result))
    resumed = (place / "out.mp4").read_bytes()
    assert invoke(*RUN[:-1], "--inputs", "out.inputs", "-y").exit_code == 0
    assert (place / "out.mp4").read_bytes() == resumed


@pytest.mark.long
def test_run_says_each_note_once(place: Path, fakes: list[Networks]) -> None:
    """What is unusual about the given files while they are prepared, and about prepared ones in the job."""
    cut_out(place / "character.png")
    result = invoke(*RUN_CLIP, "--reference-background", "black", "--json")
    assert result.exit_code == 0, result.output
    assert set(notes(result)) == {"transparent", "untagged_colour"}
    mask = np.full((48, 64, 3), 90, np.uint8)
    mask[:24] = 255
    cv2.imwrite("out.inputs/src_mask.png", mask)
    cv2.imwrite("out.inputs/src_bg.png", mask)
    result = invoke(*RUN[:-1], "--inputs", "out.inputs", "-y", "--mode", "replace", "--paste-back", "--json")
    assert result.exit_code == 0, result.output
    said = notes(result)
    assert set(said) == {"repeated", "soft_mask"}
    assert (said["soft_mask"]["pixels"], said["soft_mask"]["threshold"]) == (13 * 24 * 64, 128)


def test_run_in_replace_mode(place: Path, fakes: list[Networks]) -> None:
    write_clip(place / "dance.mp4", 15, (128, 96), codec="libx264")
    assert invoke(*RUN_CLIP, "--mode", "replace", "--segmenter", "box").exit_code == 0
    made = {path.name for path in (place / "out.inputs").iterdir()}
    assert made == {*ALL, "prepared.json"} - {"src_face.mp4"}
    assert fakes[0].segmenter == "box" and fakes[0].executor == "auto"


def test_a_run_that_fails_later_says_where_the_clips_are(
    place: Path, fakes: list[Networks], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise GraphError("The graph is damaged.", command=("build",))

    monkeypatch.setattr(OpenModel, "pieces", fail)
    _, hint = refused(invoke(*RUN_CLIP, "--json"), 1, "graph_unusable")
    assert hint == "Run:\ntrt-wan build\nThe prepared clips can be used again: --inputs out.inputs"
    assert (place / "out.inputs" / "src_pose.mp4").exists() and not (place / "out.mp4").exists()


@pytest.mark.long
def test_run_makes_the_graphs_before_it_prepares(
    place: Path, fakes: list[Networks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exporting is replaced by copying the graphs of that size."""
    good = graphs_folder(TINY, Plan(64, 48, 13))
    monkeypatch.setenv("TRT_WAN_HOME", str(place / "home"))

    def copy(network: Any, model: object, plan: object, path: Path) -> None:
        shutil.copyfile(good / f"{network.name}.onnx", path)

    monkeypatch.setattr("trt_wan.build.graphs.export", copy)
    result = invoke(*RUN_CLIP, "--json")
    assert result.exit_code == 0, result.output
    *events, _ = (json.loads(line) for line in result.stdout.splitlines())
    kinds = [event["event"] for event in events]
    notes = [event["text"] for event in events if event["event"] == "Note"]
    graphs = len(list(good.glob("*.onnx")))
    counted = [(e["number"], e["graphs"]) for e in events if e["event"] == "GraphExported"]
    assert counted == [(number, graphs) for number in range(1, graphs + 1)]
    assert any("model tiny for 64x48, 13 frames per window, fp32, are exported first" in n for n in notes)
    last_graph = max(k for k, kind in enumerate(kinds) if kind == "GraphExported")
    assert last_graph < kinds.index("StageProgress"), "the graphs come before the clip is read"
    again = invoke(*RUN_CLIP, "--json", "-y")
    assert again.exit_code == 0 and "GraphExported" not in again.stdout


SQUARE = "The graphs of the model tiny for 48x48, 13 frames per window, fp32, are not built"
BUILD_SQUARE = "trt-wan build --model tiny --size 48x48 --window 13 --precision fp32"


def test_run_says_at_once_which_graphs_are_missing(place: Path, fakes: list[Networks]) -> None:
    """The size is that of the picture's shape, not the one that is asked for."""
    write_reference(place / "character.png", (100, 100))
    before = set(place.iterdir())
    message, hint = refused(invoke(*RUN_CLIP, "--no-build", "--json"), 1, "graph_unusable")
    assert message.startswith(SQUARE) and hint == f"Run:\n{BUILD_SQUARE}"
    assert not fakes and set(place.iterdir()) == before


@pytest.mark.parametrize("package", ["torch", "onnxscript"])
def test_without_torch_run_says_at_once_how_to_get_the_graphs(
    place: Path, fakes: list[Networks], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        trt_wan.cli.missing, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    write_reference(place / "character.png", (100, 100))
    before = set(place.iterdir())
    message, hint = refused(invoke(*RUN_CLIP, "--json"), 1, "graph_unusable")
    assert message.startswith(SQUARE)
    assert message.endswith(f"The packages that export them are not installed: {package}.")
    assert hint.splitlines()[1:] == [install_command("build"), BUILD_SQUARE]
    assert not fakes and set(place.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "says"),
    [
        (RUN, 2, "usage", "There is nothing to make a video from."),
        ((*RUN, "character.png"), 2, "usage", "There is nothing to make a video from."),
        ((*RUN, "character.png", "nowhere.mp4"), 2, "usage", "'nowhere.mp4' does not exist"),
        ((*RUN, "--inputs", "x"), 2, "usage", "so --no-face would do nothing"),
        ((*RUN_CLIP[:-2], "--inputs", "x"), 2, "usage", "so REFERENCE and CLIP would do nothing"),
        ((*RUN[:-1], "--inputs", "x", "--person", "1"), 2, "usage", "so --person would do nothing"),
        ((*RUN_CLIP, "--overlap", "2"), 2, "usage", "An overlap of 2 frames"),
        ((*RUN_CLIP, "-o", "out.avi"), 2, "usage", "ends in .avi"),
        ((*RUN_CLIP, "-o", "nowhere/out.mp4"), 1, "output_unwritable", "There is no folder nowhere"),
        (("run", *RUN_CLIP[3:]), 2, "usage", "There are no weights."),
        ((*RUN_CLIP, "--weights", "nowhere"), 1, "weights_unusable", "weights folder nowhere"),
        ((*RUN_CLIP, "--vae", "dance.mp4"), 1, "weights_unusable", "dance.mp4"),
        ((*RUN_CLIP, "--tokenizer", "dance.mp4"), 1, "weights_unusable", "The tokenizer dance.mp4"),
        ((*RUN_CLIP, "--random-weights", "tiny"), 2, "usage", "and the files exclude each other"),
        ((*RUN_CLIP, "--audio", "character.png"), 1, "input_unusable", "character.png has no sound."),
        ((*RUN_CLIP, "--size", "8192x8192"), 2, "usage", "is too large: a side has at most"),
        ((*RUN_CLIP, "--size", "832x480", "--window", "1025"), 1, "memory_short", "needs about"),
        ((*RUN_CLIP, "--tier", "fast"), 2, "usage", "and --tier is for a GPU."),
        ((*RUN_CLIP, "--vram", "12"), 2, "usage", "and --vram is for a GPU."),
        ((*RUN_CLIP, "--flavour", "tensorrt"), 2, "usage", "and --flavour is for a GPU."),
        ((*RUN_CLIP, "--segment", "ffn=native"), 2, "usage", "and --segment is for a GPU."),
        ((*RUN_CLIP, "--vram", "nan"), 2, "usage", "nan GB of GPU memory"),
        ((*RUN_CLIP, "--vram", "0"), 2, "usage", "0.0 GB of GPU memory"),
        ((*RUN_CLIP, "--precision", "fp8"), 2, "usage", "runs fp32, not fp8"),
    ],
)
def test_run_refuses_before_it_prepares(
    place: Path, fakes: list[Networks], arguments: tuple[str, ...], exit_code: int, code: str, says: str
) -> None:
    before = set(place.iterdir())
    message, _ = refused(invoke(*arguments, "--json"), exit_code, code)
    assert says in message and not fakes and set(place.iterdir()) == before


def test_an_output_that_exists_stays_and_nothing_is_prepared(place: Path, fakes: list[Networks]) -> None:
    (place / "out.mp4").write_bytes(b"precious")
    message, _ = refused(invoke(*RUN_CLIP, "--json"), 1, "output_unwritable")
    assert message == "out.mp4 exists already." and not fakes
    assert (place / "out.mp4").read_bytes() == b"precious" and not (place / "out.inputs").exists()


# --- In a process of its own -----------------------------------------------------------------------------

# `trt-wan …` with made-up people, slowly: python -c SLOW …
SLOW = """
import sys, time
sys.path.insert(0, "{tests}")
import trt_wan.preprocess.stages as stages
from made_clips import FakePeople, FakeSegmenter

class Slow(FakePeople):
    def follow(self, frames, choice, progress):
        for person in super().follow(frames, choice, progress):
            time.sleep(0.2)
            yield person

stages.open_stages = lambda *a, **o: stages.Stages(Slow(), FakeSegmenter())
from trt_wan.__main__ import main
main()
"""


def started() -> "subprocess.Popen[str]":
    """A slow preparation that has begun."""
    code = SLOW.format(tests=ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *PREPARE], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    assert any("frame 3 of 15" in line for line in process.stderr)
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(folder: Path, stop: signal.Signals) -> None:
    process = started()
    assert process.stderr is not None
    process.send_signal(stop)
    told = process.stderr.read()
    assert process.wait(timeout=20) == 130 and "Stopped at once." in told and "Traceback" not in told
    assert {path.name for path in folder.iterdir()} == {"character.png", "dance.mp4"}


def test_a_second_preparation_of_a_folder_is_refused_and_a_killed_ones_rest_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: object, **options: object) -> Stages:
        return Stages(FakePeople(), FakeSegmenter())

    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", opened)
    process = started()
    (folder / "link").symlink_to("out")
    for name in ("out", "link"):
        message, _ = refused(invoke(*PREPARE, "-o", name, "--json"), 1, "output_unwritable")
        assert message == f"Another run is writing {name}."
    process.kill()
    process.communicate()
    assert [path.name[:8] for path in (folder / "out").iterdir()] == [".making-"]
    assert invoke(*PREPARE).exit_code == 0
    assert {path.name for path in folder.iterdir()} == {"character.png", "dance.mp4", "link", "out"}
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


def test_a_folder_whose_clips_are_inputs_is_refused(folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    (out / "src_pose.mp4").symlink_to(folder / "dance.mp4")
    shutil.copy(folder / "character.png", out / "src_ref.png")
    (out / "keypoints.json").write_text("{}")
    for reference, clip, options in (
        ("character.png", "dance.mp4", ()),
        ("out/src_ref.png", "out/../dance.mp4", ()),
        ("character.png", "out/src_pose.mp4", ("--keypoints", "out/keypoints.json")),
    ):
        result = invoke("preprocess", reference, clip, "-o", "out", "-y", "--json", *options)
        assert "is an input of this job" in refused(result, 2, "usage")[0]
    (out / "src_pose.mp4").unlink()
    arguments = (*PREPARE, "-y", "--keypoints", "out/keypoints.json", "--json")
    assert "out/keypoints.json is an input" in refused(invoke(*arguments), 2, "usage")[0]
    assert (out / "keypoints.json").read_text() == "{}"


def test_the_choices_are_those_of_the_types() -> None:
    """They are typed out, because importing the types would make --help slow."""
    choices = {
        str(option.name): set(option.type.choices)
        for option in preprocess_command.params
        if isinstance(option.type, click.Choice)
    }
    assert choices == {
        "mode": set(get_args(Mode)),
        "fit": {"area", *get_args(Fit)},
        "retarget": {"off", *get_args(RetargetRule)},
        "segmenter": set(get_args(SegmenterName)),
        "compat": set(get_args(Compat)),
        "executor": set(get_args(Executor)),
    }


def test_run_pastes_back_the_clips_own_pixels(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are random: far from the mask only paste-back makes the background."""

    class Corner(FakeSegmenter):
        def outlines(self, frames: Iterable[Picture], people: Sequence[PersonFrame]) -> Iterator[Mask]:
            for frame in frames:
                mask = np.zeros(frame.shape[:2], bool)
                mask[:16, :16] = True
                yield mask

    stages = Stages(FakePeople(), Corner())
    monkeypatch.setattr(trt_wan.preprocess.stages, "open_stages", lambda *_, **options: stages)
    write_clip(place / "dance.mp4", 15, (128, 96), codec="libx264")
    arguments = (*RUN_CLIP, "--mode", "replace", "--grow", "0", "--block", "16", "--paste-back")
    assert invoke(*arguments).exit_code == 0
    with Clip(place / "out.mp4") as out, Clip(place / "out.inputs" / "src_bg.mp4") as background:
        for k in range(15):
            difference = abs(out.window([k])[0].astype(int) - background.window([k])[0])
            assert difference[:, 34:].mean() < 6 < 30 < difference[:16, :16].mean()
    message, _ = refused(invoke(*RUN_CLIP, "--paste-back", "-y", "--json"), 2, "usage")
    assert message == "In the mode animate there is nothing to paste back."
