"""Several pictures of the character: on one canvas, as known frames in front, in slots of their own.

Whole jobs run with a model that copies its condition, so that every frame of the output can be traced: the
clips have levels up to 128, and the pictures are white.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import MakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import diffusers_transformer
from test_transformer import TOLERANCE, random_inputs
from tiny_job import PLAN, write_clip

from trt_wan import AnimatePipeline
from trt_wan.cli.main import cli
from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan
from trt_wan.errors import UsageError
from trt_wan.runtime.composite import composite, layout
from trt_wan.runtime.conditioning import behind_prefix, prefix_frames, to_signal
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.events import Note, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor, least_memory
from trt_wan.runtime.guidance import ClipVision
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.kept.record import read_record
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_blank_face,
    encode_context,
    encode_motion,
    encode_time,
    fuser_keys,
    rope_tables,
    velocity,
)
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.pipeline import noise_before, stream_pieces
from trt_wan.runtime.references import References, prefix_order
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.video.cut import Cut
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.window_state import WindowState
from trt_wan.runtime.window_texts import WindowTexts
from trt_wan.serve.fields import FILE_OPTIONS, VideoFields, options_of
from trt_wan.serve.orders import KIND_OF, REFERENCES, Given, _file_arguments, order_of
from trt_wan.serve.settings import ServeSettings

LEVELS = 128  # of the clips: pictures are 255
FRAMES = 22


# --- The canvas of all views -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=2, max_size=4),
    st.sampled_from([(832, 480), (480, 832), (1280, 720), (64, 48), (16, 16), (640, 640), (1600, 16)]),
)
def test_views_are_whole_apart_and_in_their_shapes(sizes: list[tuple[int, int]], canvas: Any) -> None:
    boxes = layout(sizes, *canvas)
    taken = np.zeros(canvas[::-1], int)
    for (w, h), (left, top, width, height) in zip(sizes, boxes, strict=True):
        assert 0 <= left < left + width <= canvas[0] and 0 <= top < top + height <= canvas[1]
        taken[top : top + height, left : left + width] += 1
        sides = [(width, w), (height, h)]
        least = max(shown / side for shown, side in sides if shown > 1) if width * height > 1 else 0
        assert least < min((shown + 1) / side for shown, side in sides), "another shape"
    assert taken.max() == 1
    (_, _, width, height), *others = boxes
    assert all(w * h <= width * height / 2 or min(w, h) == 1 for _, _, w, h in others)


def test_views_by_hand() -> None:
    """Equal shapes: the main view at two thirds, the others at a third. A tall main view keeps its size."""
    boxes = layout([(832, 480)] * 4, 832, 480)
    assert boxes == [(0, 78, 560, 323), *((560, 2 + top, 272, 156) for top in (0, 160, 320))]
    tall = layout([(320, 480), (320, 480)], 832, 480)
    assert tall[0] == (0, 0, 320, 480) and tall[1][2:] == (226, 339)


def test_the_canvas_has_every_view() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    views = [np.full((90 - 20 * k, 60, 3), colour, np.uint8) for k, colour in enumerate(colours)]
    canvas = composite(views, 128, 96)
    boxes = layout([(60, 90), (60, 70), (60, 50)], 128, 96)
    for colour, (_, _, width, height) in zip(colours, boxes, strict=True):
        shown = int((canvas == colour).all(-1).sum())
        assert width * height - 2 * max(width, height) <= shown <= width * height  # letterbox rounds
    assert np.array_equal(
        composite(views[:1], 128, 96),
        cv2.copyMakeBorder(cv2.resize(views[0], (64, 96)), 0, 0, 32, 32, cv2.BORDER_CONSTANT),
    )


# --- Known frames in front ---------------------------------------------------------------------------------


def test_the_order_of_the_known_frames() -> None:
    """Whole latents each, at most 17 frames; the main picture is the nearest to the video."""
    assert [prefix_order(count) for count in (1, 2, 3, 4)] == [(0,), (0, 1, 0), (0, 1, 2, 0), (1, 2, 3, 0)]
    pictures = [np.full((2, 2, 3), k, np.uint8) for k in range(4)]
    for count, frames in ((1, 5), (2, 13), (3, 17), (4, 17)):
        made = prefix_frames(pictures[:count])[:, 0, 0, 0].tolist()
        expected = [prefix_order(count)[0], *np.repeat(prefix_order(count), 4)]
        assert len(made) == frames and made == expected
        others = tuple(Path(f"{k}.png") for k in range(1, count))
        assert References(others, "prefix").latents == (frames - 1) // 4 + 1


@pytest.mark.parametrize("chunk", [1, 4, 5, 40])
def test_a_clip_behind_known_frames(chunk: int) -> None:
    prefix = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1) * np.ones((13, 2, 2, 3), np.uint8)
    clip = np.arange(9, dtype=np.float32).reshape(1, 9, 1, 1) * np.ones((3, 9, 2, 2), np.float32)
    read = behind_prefix(prefix, lambda start, stop: clip[:, start:stop])
    made = np.concatenate([read(k, min(k + chunk, 25)) for k in range(0, 25, chunk)], axis=1)
    expected = np.concatenate([to_signal(prefix), clip[:, [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]], axis=1)
    np.testing.assert_array_equal(made, expected)


# --- Slots of their own: the model -------------------------------------------------------------------------


def test_rotary_times_of_the_pictures() -> None:
    """Main 0, the others -1, -2, -3, the video 1, 2, …; by complex numbers."""
    plan, head = Plan(32, 48, 21), TINY.transformer.head_dim
    spatial = 2 * (head // 6)
    axes = (head - 2 * spatial, spatial, spatial)
    cos, sin = rope_tables(TINY, plan, 3)
    times = [0, -1, -2, -3, 1, 2, 3]
    expected = [
        np.concatenate(
            [np.exp(1j * place * 1e4 ** (-np.arange(0, d, 2) / d)) for place, d in zip(at, axes, strict=True)]
        )
        for at in ((t, y, x) for t in times for y in range(3) for x in range(2))
    ]
    np.testing.assert_allclose(cos + 1j * sin, np.array(expected), atol=1e-6)


class _Oracle:
    """diffusers' network with `pictures` more reference slots behind the first, by addons_spec.md 5.1: no
    pose, zeros for face tokens, and negative times.
    """

    def __init__(self, weights: Mapping[str, Array], pictures: int) -> None:
        self.net, self.pictures = diffusers_transformer(TINY, dict(weights)), pictures
        self.net.pose_patch_embedding.register_forward_hook(self._no_pose)
        self.net.face_encoder.register_forward_hook(self._no_face)
        self.net.rope.register_forward_hook(self._times)

    def _no_pose(self, module: Any, given: Any, pose: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros_like(pose[:, :, : self.pictures]), pose[:, :, self.pictures :]), dim=2)

    def _no_face(self, module: Any, given: Any, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros_like(tokens[:, :1]).repeat(1, self.pictures, 1, 1), tokens), dim=1)

    def _times(self, rope: Any, given: Any, made: Any) -> tuple[torch.Tensor, torch.Tensor]:
        frames, place = given[0].shape[2], rope.t_dim
        times = torch.tensor([0, *(-1 - k for k in range(self.pictures)), *range(1, frames - self.pictures)])
        powers = 1e4 ** (-torch.arange(0, place, 2, dtype=torch.float64) / place)
        angles = (times[:, None] * powers).repeat_interleave(2, dim=1).float()
        rows = made[0].shape[1] // frames
        cos, sin = (array.clone() for array in made)
        cos[0, :, 0, :place] = angles.cos().repeat_interleave(rows, dim=0)
        sin[0, :, 0, :place] = angles.sin().repeat_interleave(rows, dim=0)
        return cos, sin

    def __call__(self, inputs: Mapping[str, Array], t: int) -> Array:
        batched = {name: torch.from_numpy(values)[None] for name, values in inputs.items()}
        with torch.no_grad():
            made = self.net(
                hidden_states=torch.cat((batched["latent"], batched["condition"]), dim=1),
                timestep=torch.tensor([t]),
                encoder_hidden_states=batched["text"],
                encoder_hidden_states_image=batched["image"],
                pose_hidden_states=batched["pose"],
                face_pixel_values=batched["face"].transpose(1, 2),
            ).sample
        return np.asarray(made[0])


@pytest.mark.parametrize("pictures", [*(pytest.param(k, marks=pytest.mark.long) for k in (1, 2)), 3])
def test_the_velocity_with_more_slots_equals_diffusers(make_model: MakeModel, pictures: int) -> None:
    weights = random_weights(TINY, "transformer", seed=1)
    model = make_model(TINY, PLAN, {"transformer": weights | {ORTHONORMAL: orthonormal(weights[DIRECTION])}})
    inputs = random_inputs(PLAN, seed=pictures)
    inputs["face"] = inputs["face"][: PLAN.frames - 4 * pictures]
    context = encode_context(model, inputs["text"], embed_image(model, inputs["image"]))
    one = np.ones(1, np.float32)
    crops = inputs["face"]
    face = fuser_keys(
        model, encode_motion(model, lambda start, stop: crops[start:stop], len(crops)), pictures
    )
    window = WindowCondition(inputs["condition"], inputs["pose"], one, face, one, pictures)
    rope = rope_tables(TINY, PLAN, pictures)
    ours = velocity(model, inputs["latent"], encode_time(model, 500), context, window, rope)
    theirs = _Oracle(weights, pictures)(inputs, 500)
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= TOLERANCE
    # Each part of the definition is more than the tolerance.
    posed = velocity(
        model, inputs["latent"], encode_time(model, 500), context, replace(window, pictures=0), rope
    )
    assert np.abs(posed - theirs).max() > 10 * TOLERANCE
    in_a_row = velocity(
        model, inputs["latent"], encode_time(model, 500), context, window, rope_tables(TINY, PLAN)
    )
    assert np.abs(in_a_row - theirs).max() > 10 * TOLERANCE
    blank = encode_blank_face(model, pictures)
    assert all(np.array_equal(key[0], key[pictures]) for key, _ in blank)


# --- Whole jobs --------------------------------------------------------------------------------------------


class Copying(OnnxRuntimeExecutor):
    """A VAE of means over a chunk, and a transformer that finds its condition at once: with one step the
    latent is the condition's. Nothing is random but the noise, which is gone after the step.
    """

    def __init__(self) -> None:
        super().__init__(Path(), BoundWeights({}))
        self._velocity: Any = None

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        made: list[Any] = [np.broadcast_to(np.float32(0), tensor.shape) for tensor in network.outputs]
        if network.name.startswith("vae_encode"):
            made[0] = np.full(made[0].shape, np.mean(inputs["frames"], dtype=np.float64), np.float32)
        elif network.name.startswith("vae_decode"):
            made[0] = np.full(made[0].shape, inputs["latent"].mean(), np.float32)
        elif network.name == "patch_embed":
            made[0] = np.zeros(made[0].shape, np.float32)
            self._velocity = inputs["latent"] - inputs["condition"][4:]
        elif network.name == "head":
            made[0] = self._velocity
        return tuple(made)


class Opened:
    def __init__(self) -> None:
        self.model: Model | None = None

    def begin(self, job: Job, width: int, height: int, frames: int, progress: Any) -> Model:
        self.model = Model(TINY, Plan(width, height, job.model_window), Copying(), {})
        return self.model

    def texts(self, model: Model, job: Job, progress: Any) -> dict[str, Array]:
        return dict.fromkeys(job.texts, np.zeros((TINY.text.length, TINY.text.dim), np.float32))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the mode replace without a face; each frame of the background has a level of its own."""
    folder = tmp_path_factory.mktemp("references")
    size = PLAN.width, PLAN.height
    write_clip(folder / "src_pose.mp4", frames=FRAMES)
    for k in range(4):
        cv2.imwrite(str(folder / f"white{k}.png"), np.full((40 + 8 * k, 64, 3), 255, np.uint8))
    cv2.imwrite(str(folder / "src_ref.png"), np.full((*size[::-1], 3), 255, np.uint8))
    background = folder / "background"
    background.mkdir()
    for k in range(FRAMES):
        level = LEVELS * k // FRAMES
        cv2.imwrite(str(background / f"{k:03}.png"), np.full((*size[::-1], 3), level, np.uint8))
    cv2.imwrite(str(folder / "src_mask.png"), np.zeros((*size[::-1], 3), np.uint8))
    cv2.imwrite(str(folder / "before.png"), np.full((*size[::-1], 3), 30, np.uint8))
    return folder


def task(place: Path, references: References | None = None, animate: bool = False, **changes: Any) -> Job:
    clips = (None, None) if animate else (place / "background", place / "src_mask.png")
    inputs = Inputs(place / "src_ref.png", place / "src_pose.mp4", None, *clips)
    inputs = replace(inputs, start_frame=changes.pop("start_frame", None), init=changes.pop("init", None))
    if "end" in changes:
        inputs = replace(inputs, cut=Cut.frames(range(changes.pop("end")), False))
    shape = {
        "steps": 1,
        "sampler": "euler",
        "face_strength": 0.0,
        "mode": "animate" if animate else "replace",
    }
    window = {} if "context" in changes else {"window": 9}
    return Job(inputs, references=references, **{**window, **shape, **changes})


NOISED = {"steps": 2, "start_step": 1}


def made_by(job: Job, **options: Any) -> Array:
    return np.concatenate(list(stream_pieces(job, Opened(), **options)), axis=1)


def several(place: Path, count: int, use: Any) -> References:
    return References(tuple(place / f"white{k}.png" for k in range(1, count)), use)


WAYS = [(use, count) for use in ("composite", "prefix", "slots") for count in (1, 2, 3, 4)]
WAYS = [way for way in WAYS if way not in (("composite", 1), ("slots", 1))]  # which are refused
KINDS: dict[str, dict[str, Any]] = {
    "loop": {},
    "five carried": {"overlap": 5},
    "animate": {"animate": True},
    "one window": {"window": 25},
    "standard": {"context": Context(frames=9, overlap=4)},
    "uniform": {"context": Context("uniform_standard", 9, overlap=4, fuse="pyramid")},
    "looped": {"context": Context("uniform_looped", 9, overlap=4)},
    "hybrid": {"window": 17, "overlap": 5, "context": Context(frames=9, overlap=4, whole=False)},
    "guided": {"guidance": 3.0},
}


@pytest.fixture(scope="module")
def plain(place: Path) -> Any:
    found: dict[str, Array] = {}

    def video(kind: str) -> Array:
        if kind not in found:
            found[kind] = made_by(task(place, **KINDS[kind]))
        return found[kind]

    return video


CASES = [
    pytest.param(kind, *way, marks=() if kind == "loop" or way[1] == 3 else pytest.mark.long)
    for kind in KINDS
    for way in WAYS
]


@pytest.mark.parametrize(("kind", "use", "count"), CASES)
def test_the_video_has_its_frames_and_none_of_a_picture(
    place: Path, plain: Any, kind: str, use: Any, count: int
) -> None:
    """The copying model gives the same video with any pictures: no slot is lost, doubled or shifted."""
    job = task(place, several(place, count, use), **KINDS[kind])
    video, expected = made_by(job), plain(kind)
    assert video.shape[1] == FRAMES
    assert video.max() < LEVELS / 127.5 - 1 + 1e-3, "a white picture is in the video"
    np.testing.assert_allclose(video, expected, atol=1e-4)
    if kind == "one window":  # the oracle itself: a frame, then the means of four
        levels = [LEVELS * k // FRAMES for k in range(FRAMES)]
        padded = [*levels, *levels[-2:-5:-1]]
        means = [padded[0], *(np.mean(padded[k : k + 4]) for k in range(1, 25, 4) for _ in range(4))]
        np.testing.assert_allclose(video[0, :, 0, 0] * 127.5 + 127.5, means[:FRAMES], atol=0.1)


@pytest.mark.parametrize("use", ["prefix", "slots"])
def test_a_video_that_goes_on_from_a_picture_or_a_video(place: Path, use: Any) -> None:
    for changes in (
        {"start_frame": place / "before.png"},
        {"init": place / "background", "window": 25, **NOISED},
    ):
        expected = made_by(task(place, **changes))
        video = made_by(task(place, several(place, 3, use), **changes))
        assert video.shape[1] == FRAMES
        np.testing.assert_allclose(video, expected, atol=1e-4)


@pytest.mark.parametrize("use", ["prefix", "slots"])
def test_known_frames_at_the_end_stay_there(place: Path, use: Any) -> None:
    """Those of --redo."""
    made = []
    for references in (None, several(place, 3, use)):
        job = task(place, references, window=25)
        with open_clips(job.inputs, job.history) as clips:
            ending = np.full((3, 5, clips.height, clips.width), 0.25, np.float32)
            made.append(made_by(job, clips=replace(clips, endings={0: ending})))
    np.testing.assert_allclose(made[0][:, 21:], 0.25, atol=1e-3)
    np.testing.assert_allclose(*made, atol=1e-4)


@pytest.mark.parametrize("use", ["composite", "prefix", "slots"])
def test_a_job_goes_on_between_windows_and_its_noise_is_known(place: Path, use: Any) -> None:
    job, states = task(place, several(place, 3, use), seed=5), list[WindowState]()
    whole = made_by(job, keep=states.append)
    slot = 16, PLAN.latent_height, PLAN.latent_width
    for state in states[:-1]:
        start = 9 + 8 * (state.done - 1)
        np.testing.assert_array_equal(made_by(job, begin_from=state), whole[:, start:])
        assert noise_before(job, state.done, 5, FRAMES, slot).state() == state.generator
    assert states[0].latent.shape[1] == 4 + job.picture_slots


def test_the_first_window_starts_from_the_same_noise(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pictures there are, and those of the pictures are other numbers."""
    from trt_wan.runtime import pipeline

    seen: list[Array] = []

    def noised(combine: Any, noise: Array, *others: Any) -> Array:
        seen.append(np.array(noise))
        return noise

    monkeypatch.setattr(pipeline, "noised", noised)
    for references in (None, several(place, 4, "slots"), several(place, 2, "prefix")):
        made_by(task(place, references, window=25))
    one, slots, prefix = seen
    assert slots.shape[1] == 7 + 1 + 3 and prefix.shape[1] == 7 + 1 + 4
    for noise, pictures in ((slots, 3), (prefix, 4)):
        np.testing.assert_array_equal(np.delete(noise, range(1, 1 + pictures), axis=1), one)
        assert not np.isin(noise[:, 1 : 1 + pictures], one).any()


def test_clip_sees_the_main_picture(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_wan.runtime import preparation

    seen: list[Array] = []

    def encode(model: Model, canvas: Array, *others: Any) -> Array:
        seen.append(canvas)
        return np.zeros((TINY.image.tokens, TINY.image.dim), np.float32)

    monkeypatch.setattr(preparation, "encode_image", encode)
    for use in ("composite", "prefix", "slots"):
        made_by(task(place, several(place, 3, use), window=25))
    assert len(seen) == 3 and all((canvas == 1).all() for canvas in seen)


# --- Settings ----------------------------------------------------------------------------------------------


def test_windows_keep_their_frames(place: Path) -> None:
    """--window is of the video; the model's window has the pictures too."""
    for use, count, more in (("slots", 4, 12), ("prefix", 1, 8), ("prefix", 3, 20), ("composite", 4, 0)):
        job = task(place, several(place, count, use), window=77)
        assert (job.model_window, job.video_window, job.history) == (77 + more, 77, 77)
        assert job.windows(200) == task(place, window=77).windows(200)
        context = task(place, several(place, count, use), context=Context(frames=77))
        plan = context.context_plan(context.windows(200).length(0))
        assert plan is not None and plan.size == Plan(16, 16, context.model_window).slots
        alone = task(place, context=Context(frames=77)).context_plan(context.windows(200).length(0))
        assert alone is not None
        for ours, theirs in zip(plan.parts(0), alone.parts(0), strict=True):
            assert ours.frames == theirs.frames and ours.latents == theirs.latents
            assert ours.slots[: plan.shared] == tuple(range(plan.shared))
            assert ours.weights[plan.shared :] == theirs.weights[1:]


def test_context_windows_have_the_same_noise_and_prompts(place: Path) -> None:
    given: dict[str, Any] = {"context": Context(frames=21, overlap=4), "prompt": "a | b | c | d"}
    jobs = [task(place, references, **given) for references in (None, several(place, 4, "slots"))]
    noise = np.random.default_rng(0).standard_normal((1, 30, 2, 2))
    found = []
    for job in jobs:
        plan = job.context_plan(job.windows(117).length(0))
        assert plan is not None and plan.slots == 30 + plan.shared
        shared = np.zeros((1, plan.shared, 2, 2))
        ordered = plan.reorder(np.concatenate((shared, noise), axis=1), CpuGenerator(1))
        assert not ordered[:, : plan.shared].any()
        texts = WindowTexts(job, 117, 16.0)
        found.append((ordered[:, plan.shared :].tobytes(), [texts.of(0, part) for part in plan.parts(0)]))
    assert found[0] == found[1] and len({texts.prompt for texts in found[0][1]}) == 4


@pytest.mark.parametrize(
    ("count", "use", "changes", "says"),
    [
        (5, "slots", {}, "5 reference pictures are too many"),
        (1, "slots", {}, "no different as 'slots'"),
        (1, "composite", {}, "no different as 'composite'"),
        (2, "slots", {"compat": "kijai"}, "no other pictures as 'slots'"),
        (1, "prefix", {"compat": "kijai"}, "no other pictures as 'prefix'"),
        (4, "slots", {"window": 4089}, "4101 frames is not possible"),
        (2, "slots", {"window": 8}, "window of 8 frames"),
    ],
)
def test_settings_that_are_refused(place: Path, count: int, use: Any, changes: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        task(place, several(place, count, use), **changes)


def test_a_picture_is_given_once(place: Path) -> None:
    for twice in ((place / "src_ref.png",), (place / "white1.png", place / "." / "white1.png")):
        with pytest.raises(UsageError, match="is given twice"):
            task(place, References(twice))
    task(place, several(place, 4, "composite"), compat="kijai")


def test_transparent_pictures_and_longer_windows_are_told(place: Path, tmp_path: Path) -> None:
    clear = np.zeros((40, 20, 4), np.uint8)
    cv2.imwrite(str(tmp_path / "clear.png"), clear)
    notes: list[Note] = []
    job = task(place, References((tmp_path / "clear.png",), "slots"), window=25)
    video = made_by(job, progress=lambda event: notes.append(event) if isinstance(event, Note) else None)
    texts = {note.code: note.text for note in notes}
    assert video.shape[1] == FRAMES and "white is put behind them" in texts["transparent"]
    assert texts["references"].startswith("The model computes windows of 29 frames, 25 of them of the video")


# --- The tiny model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    weights = tmp_path_factory.mktemp("weights")
    write_tiny_weights(weights, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        with open_model(
            WeightFiles((weights,)), Settings(executor="onnxruntime", text_cache=False)
        ) as opened:
            yield opened


def test_every_way_changes_the_video_and_goes_on_bit_for_bit(model: OpenModel, place: Path) -> None:
    """All with the graphs of 13 frames, in one open model: nothing that it keeps is of another window."""
    for window, use, count in [(13, "composite", 3), (9, "slots", 2), (5, "prefix", 1)]:
        short = {"window": window, "steps": 2, "sampler": "unipc", "animate": True, "end": window + 3}
        job, states = task(place, several(place, count, use), **short), list[WindowState]()
        whole = np.concatenate(list(model.pieces(job, keep=states.append)), axis=1)
        assert whole.shape[1] == window + 3
        again = np.concatenate(list(model.pieces(job, begin_from=states[-2])), axis=1)
        np.testing.assert_array_equal(again, whole[:, -again.shape[1] :])
        if window == PLAN.frames:
            alone = np.concatenate(list(model.pieces(task(place, **short))), axis=1)
            assert np.abs(whole - alone).max() > 1e-3
    assert model.begin(task(place, window=13), 64, 48, FRAMES, silent).plan == PLAN


# --- The fronts --------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared clips of the mode animate without a face, and pictures of several shapes."""
    made = tmp_path_factory.mktemp("prepared")
    for name in ("src_ref.png", "src_pose.mp4"):
        shutil.copy(place / name, made / name)
    for k, shape in enumerate([(90, 40), (40, 90), (64, 64)]):
        picture = np.random.default_rng(k).integers(0, 256, (*shape, 3), np.uint8)
        cv2.imwrite(str(made / f"view{k}.png"), picture)
    return made


def test_the_forecast_counts_the_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    run = (
        "run",
        "--inputs",
        str(folder),
        "--random-weights",
        "tiny",
        "-o",
        str(tmp_path / "o.mp4"),
        "--dry-run",
    )
    views = [argument for k in range(3) for argument in ("--reference", str(folder / f"view{k}.png"))]
    for use, more in (("composite", 0), ("prefix", 20), ("slots", 12)):
        code, (*_, told) = invoke(*run, "--window", "13", *views, "--reference-as", use)
        data, plan = told["data"], Plan(PLAN.width, PLAN.height, 13 + more)
        assert code == 0 and (data["frames"], data["windows"], data["window"]) == (FRAMES, 2, 13)
        assert (data["model_window"], data["tokens"]) == (plan.frames, plan.tokens)
        assert data["memory"] == least_memory(TINY, plan)
    given = ("--reference", str(folder / "view0.png"))
    clips = ("run", str(folder / "view0.png"), str(folder / "src_pose.mp4"), "-o", str(tmp_path / "o.mp4"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for arguments, says in (
        ((*clips, *given, "--dry-run"), "is given twice"),
        ((*run, *views, *given), "5 reference pictures are too many"),
        ((*run, "--reference-as", "slots"), "no different as 'slots'"),
        ((*run, "--reference", str(bad)), "cannot be read as a picture"),
        ((*run, *given, "--reference-as", "prefix", "--compat", "kijai"), "no other pictures as 'prefix'"),
        ((*clips[:3], *given, "-o", str(folder / "view0.png"), "-y"), ""),
    ):
        code, (*_, told) = invoke(*arguments)
        assert code == (1 if str(bad) in arguments else 2) and says in told["error"]["message"], told


@pytest.mark.long
def test_a_video_with_pictures_is_repeated(folder: Path, tiny_home: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        views = [shutil.copy(folder / f"view{k}.png", tmp_path) for k in range(2)]
        given = [argument for view in views for argument in ("--reference", str(view))]
        run = ("run", "--random-weights", "tiny", "--inputs", str(folder), "--steps", "2", "--end", "9")
        first, other = tmp_path / "first.mp4", tmp_path / "other.mp4"
        code, _ = invoke(*run, "--window", "5", *given, "--reference-as", "slots", "-o", str(first))
        assert code == 0
        record = read_record(first)
        assert record.job["references"] == {"pictures": [], "use": "slots"}
        assert [file["name"] for file in record.files["pictures 2"]] == ["view1.png"]
        code, _ = invoke("run", "--from", str(first), "-o", str(other))
        assert code == 0 and other.read_bytes() == first.read_bytes()
        cv2.imwrite(str(views[1]), np.zeros((20, 20, 3), np.uint8))
        code, (*_, told) = invoke("run", "--from", str(first), "-o", str(other), "-y")
        assert code == 2 and "the pictures 2 view1.png has other content" in told["error"]["message"]
        code, events = invoke("run", "--from", str(first), "-o", str(other), "-y", *given)
        assert code == 0 and other.read_bytes() != first.read_bytes()
        assert "not_repeated" in {event.get("code") for event in events}


def test_the_server_takes_the_pictures_as_files(folder: Path) -> None:
    files = {"reference": Path("a.png"), "reference_2": Path("b.png"), "reference_3": Path("c.png")}
    assert _file_arguments(files) == ["--reference=b.png", "--reference=c.png"]
    assert set(REFERENCES) < set(FILE_OPTIONS) <= set(KIND_OF)
    assert "more_references" not in options_of("video") and "reference_as" in options_of("video")
    uploads = {
        name: Given({"kind": "picture", "suffix": ".png"}, folder / f"view{k}.png", Path(), f"view{k}.png")
        for k, name in enumerate(("input_reference", "reference_2", "reference_3"))
    }
    uploads["control_reference"] = Given({"kind": "clip", "suffix": ".mp4"}, folder / "src_pose.mp4", Path())
    fields = VideoFields(extra_params={"reference_as": "slots"})
    made = order_of("video", fields, uploads, ServeSettings(data=Path()), None, None)
    assert made.options == {"reference_as": "slots"}
    assert set(made.files) == {"reference.png", "reference_2.png", "reference_3.png", "clip.mp4"}


@pytest.mark.long
def test_pictures_in_python(folder: Path, tiny_home: Path) -> None:
    picture = cv2.cvtColor(cv2.imread(str(folder / "view0.png")), cv2.COLOR_BGR2RGB)
    given: Any = {"image": folder / "src_ref.png", "pose_video": folder / "src_pose.mp4", "generator": 3}
    given |= {"segment_frame_length": 9, "num_inference_steps": 1, "output_type": "uint8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        with AnimatePipeline.from_pretrained(random="tiny", executor="onnxruntime") as pipe:
            (made,) = pipe(**given, reference_images=picture[None], reference_as="slots").frames
            with pytest.raises(UsageError, match="no different as 'composite'"):
                pipe(**given, reference_as="composite")
        references = References((folder / "view0.png",), "slots")
        inputs = Inputs(folder / "src_ref.png", folder / "src_pose.mp4", None)
        with open_model(WeightFiles(random="tiny"), Settings(executor="onnxruntime")) as model:
            job = Job(inputs, window=9, steps=1, seed=3, references=references)
            np.testing.assert_array_equal(made, np.stack(list(model.stream(job))))


def test_clip_settings_that_change_nothing_are_told(place: Path) -> None:
    same, white = place / "src_ref.png", place / "white2.png"
    for clip_vision, told in (
        (ClipVision(white), False),
        (ClipVision(white, second_strength=0.0), True),
        (ClipVision(same), True),
        (ClipVision(same, 1.0, 1.0), False),
    ):
        notes: list[Any] = []
        job = task(place, window=25, clip_vision=clip_vision)
        made_by(job, progress=lambda event, notes=notes: notes.append(getattr(event, "code", "")))
        assert ("clip_unused" in notes) == told
