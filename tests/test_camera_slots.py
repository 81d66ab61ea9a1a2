"""The residual of slot i reaches slot i: jobs through the pipeline with networks that carry the numbers
of frames.

Clips are folders of pictures whose grey is the number of the frame. The VAE of these tests takes the mean
over the frames of a latent, so a slot of the pose and one of the render that belong together are equal.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import CameraPlan, Plan
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.pipeline import stream_pieces
from trt_wan.runtime.references import References
from trt_wan.runtime.window_state import WindowState

FRAMES, SIZE = 60, 16  # of the folders; one token is a slot
STEP = 4  # grey levels between frames
REFERENCE = 250


def pictures(folder: Path, numbers: Sequence[int]) -> Path:
    folder.mkdir()
    for k, number in enumerate(numbers):
        Image.fromarray(np.full((SIZE, SIZE, 3), STEP * number, np.uint8)).save(folder / f"{k:04d}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("numbered")
    Image.fromarray(np.full((SIZE, SIZE, 3), REFERENCE, np.uint8)).save(base / "reference.png")
    Image.fromarray(np.full((SIZE, SIZE, 3), 8, np.uint8)).save(base / "start.png")
    return {
        "reference": base / "reference.png",
        "start": base / "start.png",
        "pose": pictures(base / "pose", range(FRAMES)),
        "later": pictures(base / "later", [max(k - 4, 0) for k in range(FRAMES)]),
        "short": pictures(base / "short", range(9)),
    }


class Tracing(OnnxRuntimeExecutor):
    """Zeros but for the numbers of frames. `seen` has, for every `uni3c_add`, its features by slot and
    the pose of the forward by latent.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[float], list[float]]] = []
        self.calls: list[tuple[str, int]] = []
        self.pose: list[float] = []

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        name = network.name
        self.calls.append((name, n))
        outputs = [np.zeros(t.shape, np.float32) for t in network.outputs]
        if name.startswith("vae_encode"):
            outputs[0][:] = next(iter(inputs.values())).mean()
        elif name == "patch_embed":
            self.pose = numbers_of(inputs["pose_latent"])
        elif name == "uni3c_patch":
            outputs[0][:] = inputs["render_latent"][0, :, 0, 0][:, None]
        elif name == "uni3c_out":
            outputs[0][:] = outputs[1][:] = inputs["z"]
        elif name == "uni3c_add":
            self.seen.append((n, numbers_of(inputs["features"].T[:, :, None, None]), self.pose))
        return tuple(outputs)

    def release(self, names: set[str]) -> None:
        pass


def numbers_of(latent: Array) -> list[float]:
    """The mean number of the frames of each slot of [channels, slots, h, w]."""
    return [round(float((value + 1) * 127.5 / STEP), 2) for value in latent[0, :, 0, 0]]


def traced(job: Job, begin_from: WindowState | None = None, keep: Any = None) -> Tracing:
    executor = Tracing()
    plan = Plan(SIZE, SIZE, job.model_window)
    text = np.zeros((TINY.text.length, TINY.text.dim), np.float32)

    class Opened:
        def begin(self, job: Job, *_: Any) -> Model:
            model = Model(TINY, plan, executor, {})
            if job.acting_camera is not None:
                model.take(CameraPlan.beside(plan, TINY.camera.ffn_dim))
            return model

        def texts(self, model: Model, job: Job, progress: Any) -> dict[str, Array]:
            return dict.fromkeys(job.texts, text)

    for _ in stream_pieces(job, Opened(), begin_from=begin_from, keep=keep):
        pass
    return executor


def job_of(files: dict[str, Path], frames: int, render: Any, **settings: Any) -> Job:
    from trt_wan.runtime.video.cut import Cut

    more = settings.pop("inputs", {})
    cut = Cut.frames(range(frames), frames == FRAMES)
    inputs = Inputs(files["reference"], files["pose"], None, cut=cut, **more)
    return Job(inputs, camera=Camera(render), **{"steps": 2, **settings})


def some_settings(rng: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {"guidance": rng.choice([1.0, 3.0, (3.0, 1.0)]), "seed": rng.randrange(9)}
    if rng.random() < 0.5:
        window = rng.choice([5, 9, 13, 17])
        return made | {"window": window, "overlap": rng.choice([1, 5] if window > 5 else [1])}
    size = rng.choice([9, 13, 17])
    kind: Any = rng.choice(["static_standard", "uniform_standard", "uniform_looped"])
    compat = rng.choice([None, None, "kijai"]) if kind != "uniform_looped" else None
    whole = compat is not None or kind == "uniform_looped" or rng.random() < 0.6
    context = Context(kind, size, overlap=4, whole=whole, freenoise=rng.random() < 0.5)
    return (
        made | {"context": context, "compat": compat} | ({} if whole else {"window": size + 8, "overlap": 1})
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_render_is_where_the_pose_is(files: dict[str, Path], seed: int) -> None:
    """In every forward of every combination: loops, context windows, guidance, a start frame."""
    rng = random.Random(seed)
    frames, settings = rng.randint(6, 40), some_settings(rng)
    if settings.get("compat") is None and rng.random() < 0.3:
        settings["inputs"] = {"start_frame": files["start"]}
    seen = traced(job_of(files, frames, files["pose"], **settings)).seen
    assert seen
    for _, slots, pose in seen:
        assert slots[1:] == pose, settings
    starts = {slots[0] for _, slots, _ in seen}
    loops = settings.get("context") is None or not settings["context"].whole
    assert min(starts) == 0 and (loops or starts == {0}), "slot 0 is the first frame of the loop's window"


@pytest.mark.parametrize("use", ["slots", "prefix"])
@pytest.mark.parametrize(
    "settings", [{"window": 13, "overlap": 5}, {"context": Context(frames=13, overlap=4)}]
)
def test_other_references_have_the_view_of_the_first_frame(
    files: dict[str, Path], use: Any, settings: dict[str, Any]
) -> None:
    references = References((files["start"],), use)
    seen = traced(job_of(files, 30, files["pose"], steps=1, references=references, **settings)).seen
    more = references.latents
    assert seen and more == {"slots": 1, "prefix": 4}[use]
    for _, slots, pose in seen:
        assert slots[1 : 1 + more] == slots[:1] * more and slots[1 + more :] == pose[more:]


def test_slot_0_of_the_wrappers_windows_is_the_first_frame_too(files: dict[str, Path]) -> None:
    context = Context("static_standard", 17, overlap=4)
    tracing = traced(job_of(files, 41, files["pose"], context=context, compat="kijai", steps=1))
    starts = {slots[1] for _, slots, _ in tracing.seen}
    assert len(starts) > 1 and {slots[0] for _, slots, _ in tracing.seen} == {0}


def test_slot_0_of_a_window_is_its_first_frame(files: dict[str, Path]) -> None:
    seen = traced(job_of(files, 30, files["pose"], window=13, overlap=5, steps=1)).seen
    starts = list(dict.fromkeys(slots[0] for _, slots, _ in seen))
    assert starts == [0, 8, 16, 24]
    assert seen[0][1] == [0, 0, 2.5, 6.5, 10.5]


@pytest.mark.parametrize("kind", ["one window", "loop", "context"])
def test_a_render_a_latent_later_shifts_the_residuals_by_a_slot(files: dict[str, Path], kind: str) -> None:
    settings: dict[str, Any] = {
        "one window": {"window": 33},
        "loop": {"window": 17, "overlap": 1},
        "context": {"context": Context(frames=17, overlap=4)},
    }[kind]
    now, later = (
        traced(job_of(files, 33, files[name], steps=1, **settings)).seen for name in ("pose", "later")
    )
    assert len(now) == len(later) and now != later
    for (n, slots, _), (m, shifted, _) in zip(now, later, strict=True):
        assert n == m
        assert shifted == [max(number - 4, 0) for number in slots]
        if kind != "context":  # whose windows have slots that do not follow each other behind slot 0
            assert shifted[3:] == slots[2:-1]


@pytest.mark.parametrize("render", ["static", "reference.png", "short"])
def test_what_stands_still_and_what_ends_early(files: dict[str, Path], render: str) -> None:
    """One encoded frame in all slots; a short video holds its last frame."""
    given: Any = {"reference.png": files["reference"], "short": files["short"]}.get(render, render)
    tracing = traced(job_of(files, 21, given, window=21, steps=1))
    for _, slots, _ in tracing.seen:
        expected = [0, 0, 2.5, 6.5, 8, 8, 8] if render == "short" else [REFERENCE / STEP] * 7
        assert slots == pytest.approx(expected)
    encoded = [name for name, _ in tracing.calls if name.startswith("vae_encode")]
    # Reference, grey clip and pose; a still render is one frame more, and `static` is the reference's own.
    others = 1 + 6 + 6
    assert len(encoded) == others + {"static": 0, "reference.png": 1, "short": 7}[render]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_camera_that_does_not_act_runs_nothing(files: dict[str, Path], guidance: float) -> None:
    """Strength 0, and start and end 0: the same calls as without, so the same bits."""
    task = job_of(files, 21, files["pose"], window=13, guidance=guidance)
    without = traced(replace(task, camera=None)).calls
    assert not any(name.startswith("uni3c") for name, _ in without)
    for off in (Camera(files["pose"], strength=0), Camera(files["pose"], start=0, end=0)):
        assert traced(replace(task, camera=off)).calls == without
    assert traced(task).calls != without


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0, 100, {0, 1, 2, 3}), (0, 10, {0}), (25, 50, {1, 2}), (60, 100, {3})]
)
def test_the_steps_in_which_it_acts(
    files: dict[str, Path], start: float, end: float, steps: set[int]
) -> None:
    task = replace(job_of(files, 13, "static", window=13, steps=4), camera=Camera("static", 1, start, end))
    calls = [name for name, _ in traced(task).calls]
    heads = [k for k, name in enumerate(calls) if name == "head"]
    acting = {sum(head < k for head in heads) for k, name in enumerate(calls) if name == "uni3c_patch"}
    assert acting == steps
    assert calls.count("uni3c_modulation") == TINY.camera.layers, "one call for all steps"


def test_a_resumed_run_has_the_same_residuals(files: dict[str, Path]) -> None:
    task = job_of(files, 40, files["pose"], window=13, overlap=5, guidance=2.0)
    states: list[WindowState] = []
    whole = traced(task, keep=states.append).seen
    resumed = traced(task, begin_from=states[1]).seen
    assert len(states) > 3 and resumed == whole[len(whole) - len(resumed) :]
    assert len(resumed) == len(whole) * (len(states) - 2) // len(states)


def test_a_path_begins_with_the_reference(files: dict[str, Path], tmp_path: Path) -> None:
    """And leaves it: a render of one frame stands still."""
    from trt_wan.runtime.camera import MOVES
    from trt_wan.runtime.video.camera_render import moved, opened_render

    picture = np.random.default_rng(0).integers(1, 256, (SIZE * 2, SIZE * 3, 3), np.uint8)
    size = SIZE * 3, SIZE * 2
    for move in MOVES:
        with opened_render(Camera(move), picture, size, 9, 1) as render:
            assert render is not None and render.still == (move == "static")
            np.testing.assert_array_equal(render.frames([0, 0]), np.stack([picture] * 2))
            last = render.frames([8])[0]
            assert last.shape == picture.shape and (last == picture).all() == (move == "static")
            assert render.key([8]) != render.key([0]) or render.still
    assert (moved(picture, "orbit", 1.0) == 0).all(-1).mean() > 0.05, "black holes"
    assert (moved(picture, "dolly", 1.0) == 0).all(-1).mean() == 0
