"""The identity of a face: its alignment, landmarks, embedding, options, and whole jobs on the CPU."""

import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from tiny_job import TRT_WAN, prepare, read_frames, write_sound

from trt_wan.cli import run as run_module
from trt_wan.cli.main import cli
from trt_wan.engines.config import ANIMATE_14B
from trt_wan.engines.lynx import FacePlan, Lynx, LynxPlan, lynx_plans
from trt_wan.engines.shape import Plan
from trt_wan.errors import InputError, UsageError, WeightsError
from trt_wan.preprocess import stages
from trt_wan.preprocess.identity import face_landmarks, five_points
from trt_wan.preprocess.people.person import JOINTS, PersonFrame
from trt_wan.runtime.identity import ARCFACE, FACE_PROMPT, WIDER, FaceIdentity, aligned, similarity
from trt_wan.runtime.identity_embedder import face_embedding
from trt_wan.runtime.job import Inputs, Job, Load
from trt_wan.runtime.opening import model
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.residency import lynx_bytes
from trt_wan.runtime.pipeline import face_of
from trt_wan.runtime.video.reader import Picture

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), None)
POINTS = tuple(float(number) for number in WIDER.reshape(-1))


# --- Alignment -------------------------------------------------------------------------------------------


def test_the_wider_template_is_the_published_one() -> None:
    wanted = [
        (99.671, 121.114),
        (156.051, 120.802),
        (128.04, 153.179),
        (104.879, 186.185),
        (151.568, 185.927),
    ]
    np.testing.assert_allclose(WIDER, wanted, atol=6e-4)


@pytest.mark.parametrize(
    "degrees, scale, shift", [(0, 1, (0, 0)), (30, 2.5, (40, 12)), (-75, 0.7, (200, 90))]
)
def test_the_transform_undoes_a_similarity(degrees: float, scale: float, shift: tuple[float, float]) -> None:
    turn = scale * np.exp(1j * math.radians(degrees))
    moved = (ARCFACE[:, 0] + 1j * ARCFACE[:, 1]) * turn + complex(*shift)
    points = np.stack((moved.real, moved.imag), 1)
    transform = similarity(points, ARCFACE)
    np.testing.assert_allclose(points @ transform[:, :2].T + transform[:, 2], ARCFACE, atol=1e-6)
    assert math.isclose(np.linalg.det(transform[:, :2]), scale**-2, rel_tol=1e-6), "no reflection"


def test_the_transform_is_the_best_one() -> None:
    """Umeyama's solution, with a mean distance that no small change makes smaller."""
    points = WIDER + np.random.default_rng(0).normal(0, 8, (5, 2))
    best = similarity(points, ARCFACE)
    (x, y), (u, v) = (points - points.mean(0)).T, (ARCFACE - ARCFACE.mean(0)).T
    a, b = ((x * u + y * v).sum(), (x * v - y * u).sum()) / (x**2 + y**2).sum()
    np.testing.assert_allclose(best[:, :2], [[a, -b], [b, a]], atol=1e-9)


def dots(points: Any, side: int) -> Picture:
    """A black picture with a white dot of 7 px at each point."""
    picture = np.zeros((side, side, 3), np.uint8)
    for x, y in np.rint(points).astype(int):
        cv2.circle(picture, (int(x), int(y)), 3, (255, 255, 255), -1)
    return picture


@pytest.mark.parametrize("side, template", [(112, ARCFACE), (256, WIDER)])
def test_the_points_of_a_turned_face_come_to_their_places(side: int, template: Any) -> None:
    turn = 1.8 * np.exp(1j * 0.5)
    moved = (ARCFACE[:, 0] - 56 + 1j * (ARCFACE[:, 1] - 56)) * turn
    points = np.stack((moved.real, moved.imag), 1) + (260, 240)
    face = aligned(dots(points, 520), points, side)
    assert face.shape == (side, side, 3) and face.dtype == np.uint8
    bright = [face[round(y), round(x), 0] for x, y in template]
    assert min(bright) > 200 and face.mean() < 30


def test_a_face_that_is_aligned_stays(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    np.testing.assert_array_equal(aligned(picture, WIDER, 256), picture)


# --- Landmarks and embedding -----------------------------------------------------------------------------


def keypoints(face: Any) -> Any:
    """[133, 3] with 68 points of a face; all others unknown."""
    made = np.zeros((JOINTS, 3), np.float32)
    made[23:91] = face
    return made


def test_five_points_of_68(tmp_path: Path) -> None:
    face = np.ones((68, 3), np.float32)
    face[:, :2] = np.random.default_rng(2).uniform(0, 200, (68, 2))
    found = np.reshape(five_points(keypoints(face)) or (), (5, 2))
    np.testing.assert_allclose(found[0], face[[36, 37, 38, 39, 40, 41], :2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(found[1], face[[42, 43, 44, 45, 46, 47], :2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(found[2:], face[[30, 48, 54], :2], rtol=1e-6)
    cv2.imwrite(str(tmp_path / "face.png"), np.zeros((64, 64, 3), np.uint8))

    def people(points: Any) -> Any:
        return SimpleNamespace(follow=lambda frames, *_: [PersonFrame(None, points) for _ in frames])

    np.testing.assert_allclose(face_landmarks(tmp_path / "face.png", people(keypoints(face))), found.ravel())
    face[48, 2] = 0.1  # a corner of the mouth is not seen
    for points in (None, keypoints(face)):
        with pytest.raises(InputError, match=r"There is no face in .*face\.png"):
            face_landmarks(tmp_path / "face.png", people(points))


def embedder(path: Path, weights: Any, side: int = 112) -> Path:
    """A linear network of the mean of each channel."""
    nodes = [
        helper.make_node("ReduceMean", ["face"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("face", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, weights.shape[1]])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_embedding_is_of_bgr_and_has_length_1(tmp_path: Path) -> None:
    weights = np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
    face = np.zeros((112, 112, 3), np.uint8)
    face[..., 0] = 255  # red: 1, the others -1
    made = face_embedding(embedder(tmp_path / "net.onnx", weights), face)
    wanted = np.array([-1, -1, 1]) @ weights
    np.testing.assert_allclose(made, wanted / np.linalg.norm(wanted), atol=1e-6)
    for name, change, says in (
        ("short", weights[:, :128], "gives 128 numbers for a face, not 512"),
        ("zero", np.zeros_like(weights), "not finite, or all 0"),
        ("nan", np.full_like(weights, np.nan), "not finite, or all 0"),
    ):
        with pytest.raises(WeightsError, match=says):
            face_embedding(embedder(tmp_path / f"{name}.onnx", change), face)
    with pytest.raises(WeightsError, match="cannot be run as a face embedder"):
        face_embedding(embedder(tmp_path / "large.onnx", weights, 224), face)


# --- The job and its options -----------------------------------------------------------------------------


def test_an_identity_that_does_nothing_asks_for_nothing() -> None:
    picture = Path("face.png")
    plain = Job(INPUTS, steps=4)
    for off in (
        FaceIdentity(picture, ip_scale=0, ref_scale=0),
        FaceIdentity(picture, end=0),
        None,
    ):
        job = replace(plain, identity=off)
        assert job.acting_identity is None and job.load == plain.load
        assert job.encoded_texts == plain.texts and job.step_settings == plain.step_settings
    on = replace(plain, identity=FaceIdentity(picture, POINTS, end=25))
    assert on.acting_identity is on.identity and on.encoded_texts == (*plain.texts, FACE_PROMPT)
    assert [step.identity for step in on.step_settings] == [True, True, False, False]
    only_ip = replace(plain, identity=FaceIdentity(picture, POINTS, ref_scale=0))
    assert only_ip.encoded_texts == plain.texts


def order(*numbers: int) -> tuple[float, ...]:
    return tuple(WIDER[list(numbers)].reshape(-1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ip_scale": -1}, "An identity scale of -1"),
        ({"ref_scale": math.nan}, "An identity scale of nan"),
        ({"landmarks": (1.0,) * 8}, "has 8 numbers as landmarks"),
        ({"landmarks": (1.0,) * 10}, "all at one place"),
        ({"landmarks": (*POINTS[:9], math.inf)}, "The number inf of the landmarks is not finite"),
        ({"landmarks": (*POINTS[:9], math.nan)}, "The number nan of the landmarks is not finite"),
        ({"landmarks": (*POINTS[:9], 1e9)}, r"The number 1000000000\.0 of the landmarks is too large"),
        ({"landmarks": tuple(range(1, 11))}, "are on one line"),
        ({"landmarks": order(1, 0, 2, 4, 3)}, "in another order"),  # right ones first
        ({"landmarks": order(1, 0, 2, 3, 4)}, "in another order"),
        ({"landmarks": order(0, 1, 2, 4, 3)}, "in another order"),
        ({"landmarks": order(3, 4, 2, 0, 1)}, "in another order"),
        ({"landmarks": tuple((ARCFACE * (1, -1)).reshape(-1))}, "in another order"),  # a mirror's
    ],
)
def test_identities_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FaceIdentity(Path("face.png"), **settings)
    with pytest.raises(UsageError, match=r"the identity would never act.*") as caught:
        Job(INPUTS, identity=FaceIdentity(Path("face.png"), start=80), steps=4)
    assert "--identity-end 0" in caught.value.hint
    with pytest.raises(UsageError, match="has 0 numbers as landmarks"):
        _ = FaceIdentity(Path("face.png")).points


@pytest.mark.parametrize(
    "yaw, pitch", [(-90, 0), (90, 0), *itertools.product(range(-75, 76, 15), (-20, 0, 20))]
)
def test_turned_heads_are_faces(yaw: int, pitch: int) -> None:
    """Five points of a head in mm, x to the right, y down and z to the viewer; the picture is tilted too."""
    head = np.array([(-31.5, 0, -25), (31.5, 0, -25), (0, 38, 8), (-25, 70, -18), (25, 70, -18)])
    a, b, c = (math.radians(angle) for angle in (yaw, pitch, 130))
    around = [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]
    nod = [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]]
    tilt = [[math.cos(c), -math.sin(c)], [math.sin(c), math.cos(c)]]
    points = (head @ np.transpose(around) @ np.transpose(nod))[:, :2] @ np.transpose(tilt) * 0.7 + 300
    assert FaceIdentity(Path("face.png"), tuple(points.reshape(-1))).landmarks


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "face.png"), np.full((256, 256, 3), 90, np.uint8))
    return tmp_path / "face.png"


def chosen(*arguments: str) -> run_module.RunOptions:
    """The options of `run` with these arguments."""
    context = run_module.run.make_context("run", ["ref.png", "clip.mp4", "-o", "out.mp4", *arguments])
    with context:
        return run_module.refuse_impossible(context.params)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    cv2.imwrite(str(tmp_path / "ref.png"), np.full((64, 64, 3), 90, np.uint8))
    prepare(tmp_path / "in", write_sound(tmp_path / "tone.m4a", 1), frames=5)
    (tmp_path / "in/src_pose.mp4").rename(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_the_options(folder: Path, picture: Path) -> None:
    shared = ("--random-weights", "tiny")
    options = chosen(*shared, "--identity", str(picture), "--identity-landmarks", "aligned")
    assert options.identity == FaceIdentity(picture, POINTS)
    text = "1,2,30,2,15,20,5,30,25,30"
    more = ("--identity-ip-scale", "0.7", "--identity-ref-scale", "0.6", "--identity-end", "50")
    options = chosen(*shared, "--identity", str(picture), "--identity-landmarks", text, *more)
    points = tuple(float(number) for number in text.split(","))
    assert options.identity == FaceIdentity(picture, points, None, 0.7, 0.6, 0, 50)
    assert chosen(*shared).identity is None
    assert chosen(*shared, "--redo", "1", "--lynx", ".").lynx == (Path("."),), "a server's, for each job"
    cv2.imwrite("wide.png", np.zeros((100, 200, 3), np.uint8))
    for arguments, says in (
        (("--identity-ip-scale", "1"), "Without --identity --identity-ip-scale would do nothing"),
        (("--face-embedder", "wide.png"), "Without --identity --face-embedder would do nothing"),
        (("--lynx", "."), "Without --identity --lynx would do nothing"),
        (
            (
                "--identity",
                "wide.png",
                "--identity-landmarks",
                "5000,5000,5040,5000,5020,5020,5005,5040,5035,5040",
            ),
            "The landmark 5000,5000 is outside wide.png, which is 200x100",
        ),
        (
            ("--identity", "wide.png", "--identity-landmarks", "aligned"),
            "An aligned face is 112x112 or 256x256; wide.png is 200x100",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            chosen(*shared, *arguments)
        assert says in caught.value.message, caught.value.message
    done = CliRunner().invoke(
        cli, ["run", "a", "b", "-o", "c.mp4", "--identity", "ref.png", "--identity-landmarks", "1,2"]
    )
    assert done.exit_code == 2 and "is not x,y of five points" in done.output


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_cannot_work_is_refused_at_once(
    folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, dry: tuple[str, ...]
) -> None:
    monkeypatch.setattr(stages, "_has_mediapipe", lambda: False)
    monkeypatch.setattr(model, "open_basis", lambda *_: pytest.fail("weights are opened"))
    embedder(folder / "short.onnx", np.ones((3, 128), np.float32))
    embedder(folder / "large.onnx", np.ones((3, 512), np.float32), 224)

    def refused(*more: str) -> str:
        command = ["run", "ref.png", "clip.mp4", "-o", "out.mp4", "--random-weights", "tiny", *dry]
        done = CliRunner().invoke(cli, [*command, "--identity", str(picture), *more])
        assert done.exit_code in (1, 2), done.output
        return " ".join(done.output.split())

    told = refused()
    assert "nothing to find people with" in told
    assert "Name the face's points with --identity-landmarks X,Y,… or aligned." in told
    aligned = ("--identity-landmarks", "aligned", "--face-embedder")
    assert "cannot be run as a face embedder" in refused(*aligned, "ref.png")
    assert "gives 128 numbers for a face, not 512" in refused(*aligned, "short.onnx")
    assert "(it takes 1 x 3 x 224 x 224 of tensor(float))" in refused(*aligned, "large.onnx")


def test_landmarks_outside_are_refused_by_a_job(picture: Path) -> None:
    """Without the command line too."""
    points = tuple(number + 5000 for number in POINTS)
    job: Any = SimpleNamespace(acting_identity=FaceIdentity(picture, points), seed=0)
    opened: Any = SimpleNamespace(lynx=SimpleNamespace(adapters=Lynx(False, True)))
    with pytest.raises(UsageError, match="is outside"):
        face_of(job, opened)


def test_options_without_a_value_name_the_choices() -> None:
    done = CliRunner().invoke(cli, ["weights", "tiny", "models", "--lynx"])
    assert done.exit_code == 2 and "--lynx needs one of these behind it: full, lite." in done.output


# --- Plans and memory ------------------------------------------------------------------------------------


def test_shapes_and_commands() -> None:
    plan = Plan(832, 480, 77, "fp8")
    steps, face = lynx_plans(plan, Lynx(True, True, "lite"))
    assert isinstance(steps, LynxPlan) and isinstance(face, FacePlan)
    assert (steps.tokens, face.tokens, face.slots, face.precision) == (32760, 256, 1, "fp8")
    command = "build --model 14b --size 832x480 --window 77 --precision fp8 --lynx"
    assert " ".join(steps.build_command("14b")) == f"{command} lite"
    assert " ".join(face.build_command("14b")) == f"{command} full"
    assert lynx_plans(plan, Lynx(True, False)) == (LynxPlan(832, 480, 77, "fp8"),)


def test_memory_has_room_for_the_keys() -> None:
    """addons_spec.md 2.5: 210 MB of keys and values for the ref adapter, 32 tokens for the IP adapter."""
    plan, load = Plan(832, 480, 77, "fp8"), Load(4)
    none, ref, both = (
        activation_bytes(ANIMATE_14B, plan, replace(load, lynx=lynx))
        for lynx in (None, Lynx(False, True), Lynx(True, True))
    )
    keys = 40 * 2 * 256 * 5120 * 2
    assert keys <= ref - none <= keys + 60e6
    assert 26e6 <= both - ref <= 28e6
    assert lynx_bytes(ANIMATE_14B, plan, Lynx(True, True)) < 320e6, "weights while preparing"


# --- Whole jobs ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_jobs(folder: Path, picture: Path, tmp_path: Path, tiny_home: Path) -> None:
    """Through `trt-wan run`: off is off, each adapter acts, with guidance, context, --from, --redo."""
    (tmp_path / "clip.mp4").rename(tmp_path / "in/src_pose.mp4")
    prepare(tmp_path / "in", tmp_path / "tone.m4a", frames=20)
    net = embedder(
        tmp_path / "net.onnx", np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
    )
    subprocess.run([*TRT_WAN, "weights", "tiny", "models", "--lynx", "full"], check=True, capture_output=True)
    shutil.copytree(tiny_home, tmp_path / "home")
    environment = os.environ | {"TRT_WAN_HOME": str(tmp_path / "home")}

    def ran(name: str, *arguments: str, identity: bool = True) -> tuple[bytes, str]:
        face = ("--identity", str(picture), "--identity-landmarks", "aligned") if identity else ()
        command = [*TRT_WAN, "run", "--inputs", "in", "-o", f"{name}.mp4", "--window", "13", "--steps", "2"]
        command += ["--no-sidecar", "--weights", "models", *face, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return read_frames(tmp_path / f"{name}.mp4").tobytes(), done.stderr

    off, _ = ran("off", identity=False)
    scales = ("--identity-ip-scale", "--identity-ref-scale")
    assert ran("zero", scales[0], "0", scales[1], "0")[0] == off
    assert ran("never", "--identity-start", "0", "--identity-end", "0")[0] == off
    embedding = ("--face-embedder", str(net))
    both, told = ran("both", *embedding)
    assert "identity: the IP adapter (full, scale 1) and the ref adapter" in told
    ref, told = ran("ref")
    assert "no --face-embedder" in told
    ip, _ = ran("ip", *embedding, scales[1], "0")
    first, _ = ran("first", *embedding, "--identity-end", "10")
    assert len({off, both, ref, ip, first}) == 5
    guided, _ = ran("guided", *embedding, "--guidance", "3")
    assert guided not in (both, ran("plain", "--guidance", "3", identity=False)[0])
    context = ("--context", "static_standard", "--context-frames", "13", "--context-overlap", "4")
    assert ran("context", *embedding, *context)[0] != ran("bare", *context, identity=False)[0]

    named = ("--inputs", "in", "--weights", "models")
    repeated = subprocess.run(
        [*TRT_WAN, "run", "--from", "both.mp4", *named, "-o", "again.mp4", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert repeated.returncode == 0, repeated.stderr + repeated.stdout
    assert json.loads(repeated.stdout.splitlines()[-1])["ok"]
    assert read_frames(tmp_path / "again.mp4").tobytes() == both
    redo = subprocess.run(
        [*TRT_WAN, "run", "--from", "both.mp4", *named, "--redo", "2", "--seed", "1", "-o", "redone.mp4"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert redo.returncode == 0, redo.stderr
    one, other = (read_frames(tmp_path / f"{name}.mp4") for name in ("both", "redone"))
    np.testing.assert_array_equal(one[:13], other[:13])
