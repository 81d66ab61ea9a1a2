"""Windows and context windows without a model: the tables of kijai_semantics.md 2.1 and 3, and
properties over thousands of lengths.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_wan.cli.context_options import take_context
from trt_wan.cli.run import run
from trt_wan.engines.shape import Plan
from trt_wan.errors import UsageError
from trt_wan.runtime.conditioning import known_mask
from trt_wan.runtime.context import fuse, schedules
from trt_wan.runtime.context.parts import ContextPlan, Part
from trt_wan.runtime.context.settings import FUSES, SCHEDULES, Context
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.noise import CpuGenerator
from trt_wan.runtime.windows import Windows, rounded_down, rounded_up


def job(**changes: Any) -> Job:
    return Job(Inputs(Path("ref.png"), Path("pose.mp4"), None), **changes)


def plan_of(video: int, **changes: Any) -> ContextPlan:
    compat = changes.pop("compat", None)
    task = job(context=Context(**changes), compat=compat)
    plan = task.context_plan(task.windows(video).length(0))
    assert plan is not None
    return plan


def spans(parts: Sequence[Part]) -> list[str]:
    return [f"{part.slots[0]}-{part.slots[-1]}" for part in parts]


# --- Tables of the wrapper ---------------------------------------------------------------------------------

STATIC = {  # frames of the video: windows of 81/16, 81/32, 81/48, 77/32 (context frames / overlap)
    121: ("0-20 11-31", "0-20 11-31", "0-20 9-29 11-31", "0-19 12-31"),
    161: ("0-20 17-37 21-41", "0-20 13-33 21-41", "0-20 9-29 18-38 21-41", "0-19 12-31 22-41"),
    241: (
        "0-20 17-37 34-54 41-61",
        "0-20 13-33 26-46 39-59 41-61",
        6,
        "0-19 12-31 24-43 36-55 42-61",
    ),
    501: (8, 10, 13, 10),
    1001: (15, 19, 27, 21),
}


@pytest.mark.parametrize("frames", STATIC)
def test_the_wrappers_static_windows(frames: int) -> None:
    for (size, overlap), expected in zip(
        ((81, 16), (81, 32), (81, 48), (77, 32)), STATIC[frames], strict=True
    ):
        parts = plan_of(frames, frames=size, overlap=overlap, compat="kijai").parts(3)
        assert expected == (len(parts) if isinstance(expected, int) else " ".join(spans(parts)))


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, "0-20 13-33 21-41"),
        (1, "21-41 0-20 5-25 18-38"),
        (2, "10-30 21-41 0-20 7-27"),
        (3, "21-41 0-20 3-23 16-36"),
        (4, 5),
        (5, 3),
    ],
)
def test_the_wrappers_uniform_windows(step: int, expected: str | int) -> None:
    plan = plan_of(161, schedule="uniform_standard", frames=81, overlap=32, compat="kijai")
    assert (plan.slots, plan.size) == (42, 21)
    parts = plan.parts(step)
    assert expected == (len(parts) if isinstance(expected, int) else " ".join(spans(parts)))


def test_a_video_as_long_as_the_context_has_one_window_or_two() -> None:
    """81 frames are 22 slots with the reference's, one more than a window of 81 frames in the wrapper."""
    assert spans(plan_of(81, frames=81, compat="kijai").parts(0)) == ["0-20", "1-21"]
    assert plan_of(81, frames=81).is_one and plan_of(77, frames=81, compat="kijai").is_one


def test_the_wrappers_linear_weights() -> None:
    sevenths = np.arange(8) / 7
    expected = [*sevenths, 1, 1, 1, 1, 1, *sevenths[::-1]]
    np.testing.assert_allclose(fuse.wrappers("linear", 21, 8, False, False), expected, atol=1e-15)
    assert fuse.wrappers("linear", 21, 8, True, False)[:8].tolist() == [1] * 8
    assert fuse.wrappers("linear", 21, 8, False, True)[-8:].tolist() == [1] * 8
    cut = fuse.wrappers("linear", 5, 1, False, False)
    assert cut.tolist() == [0, 1, 1, 1, 1], "an overlap of one latent is a hard cut"


@pytest.mark.parametrize("compat", ["kijai", None])
def test_the_reference_leaks_into_no_neighbour(compat: str | None) -> None:
    """The model predicts the reference in the first slot of every part."""
    plan = plan_of(161, frames=81, overlap=32, compat=compat)
    for part in plan.parts(0):
        assert part.slots[0] == 0 or part.weights[0] == 0
        assert part.seen[0] == 0
    if compat is None:
        assert all(part.weights[0] == pytest.approx(1 / len(plan.parts(0))) for part in plan.parts(0))
    leaking = plan_of(161, frames=81, overlap=32, fuse="pyramid", compat=compat).parts(0)[1]
    assert (leaking.slots[0] > 0) == (compat == "kijai")
    if compat == "kijai":  # 1/11 against 8/11 of the window before
        assert leaking.weights[0] == pytest.approx(1 / 9)


def torchs_free_noise(
    noise: torch.Tensor, size: int, overlap: int, generator: torch.Generator
) -> torch.Tensor:
    """kijai_semantics.md 3.6, literally."""
    noise, slots, delta = noise.clone(), noise.shape[1], size - overlap
    for start in range(0, slots, delta):
        if start + size >= slots:
            break
        count = min(delta, slots - start - size)
        order = torch.randperm(count, generator=generator)
        noise[:, start + size : start + size + count] = noise[:, start : start + count][:, order]
    return noise


@pytest.mark.parametrize("frames, size, overlap", [(161, 81, 16), (241, 81, 32), (501, 77, 48), (81, 81, 16)])
def test_free_noise_is_the_wrappers(frames: int, size: int, overlap: int) -> None:
    plan = plan_of(frames, frames=size, overlap=overlap, compat="kijai")
    theirs = torch.Generator("cpu").manual_seed(6)
    noise = torch.randn((2, plan.slots, 4, 4), generator=theirs)
    generator = CpuGenerator(6)
    given = generator.randn((2, plan.slots, 4, 4))
    ours = plan.reorder(given.copy(), generator)
    expected = torchs_free_noise(torch.from_numpy(given), plan.size, overlap // 4, theirs).numpy()
    np.testing.assert_allclose(given, noise.numpy(), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(ours, expected)
    assert not np.array_equal(ours, given) or plan.slots <= plan.size


def test_free_noise_leaves_the_reference_alone() -> None:
    plan = plan_of(161, frames=81)
    noise = CpuGenerator(0).randn((1, plan.slots, 4, 4))
    ours = plan.reorder(noise.copy(), CpuGenerator(1))
    np.testing.assert_array_equal(ours[:, :22], noise[:, :22])
    blocks = {ours[0, slot].tobytes() for slot in range(22, plan.slots)}
    assert blocks <= {noise[0, slot].tobytes() for slot in range(1, 22)}
    off = plan_of(161, frames=81, freenoise=False)
    np.testing.assert_array_equal(off.reorder(noise.copy(), CpuGenerator(1)), noise)


def test_the_latent_mask() -> None:
    """Parity test 5 of section 9; `person` is 1 on the character."""
    person = np.ones((81, 2, 2), np.float32)
    assert not known_mask(0, person).any()
    for frame, slot, channels in ((5, 2, [0]), (0, 0, [0, 1, 2, 3]), (4, 1, [3])):
        person = np.zeros((81, 2, 2), np.float32)
        person[frame] = 1
        unknown = np.argwhere(known_mask(0, person)[..., 0, 0] == 0).tolist()
        assert unknown == [[channel, slot] for channel in channels]


def test_slots_poses_and_faces_belong_together() -> None:
    """Slot g shows pose latent g-1 and the frames 4(g-1)-3 to 4(g-1); slot 1 shows frame 0."""
    part = Part((0, 1, 2, 3), (1.0,) * 4)
    assert part.latents == [0, 1, 2] and part.frames == list(range(9))
    part = Part((7, 8, 9, 10), (1.0,) * 4)
    assert part.latents == [7, 8, 9] and part.frames == [28, 29, 30, 31, 32, 33, 34, 35, 36]
    assert part.seen == [0, 8, 9, 10]
    around = Part((0, 6, 7, 1, 2), (1.0,) * 5)  # the end of a loop, then its beginning
    assert around.frames == [20, 21, 22, 23, 24, 0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "frames, window, windows, made",
    [
        (77, 77, 1, 77),
        (97, 81, 2, 161),
        (161, 81, 2, 161),
        (161, 77, 3, 229),
        (201, 77, 3, 229),
        (241, 77, 4, 305),
        (301, 77, 4, 305),
        (501, 77, 7, 533),
        (801, 77, 11, 837),
        (241, 81, 3, 241),
    ],
)
def test_the_wrappers_frame_plan(frames: int, window: int, windows: int, made: int) -> None:
    for surplus in range(4):  # it rounds the number of frames down to 4k+1
        plan = job(window=window, compat="kijai").windows(frames + surplus)
        kept = sum(plan.keep(j).stop - plan.keep(j).start for j in range(plan.total))
        assert (plan.total, plan.target, kept) == (windows, made, made)
        assert max(max(plan.indices(j)) for j in range(plan.total)) == frames - 1
    exact = job(window=window).windows(frames)
    assert sum(exact.keep(j).stop - exact.keep(j).start for j in range(exact.total)) == frames


@pytest.mark.parametrize("frames, window", [(97, 81), (201, 77), (501, 77), (45, 13), (6, 5)])
def test_the_wrappers_mask_is_padded_by_latents(frames: int, window: int) -> None:
    """Its latent mask, cut and padded as section 2.2 says, against ours from the pixels of `mask_indices`."""
    plan = job(window=window, compat="kijai").windows(frames)
    count = plan.clip_frames
    person = np.random.default_rng(0).integers(0, 2, (count, 3, 2)).astype(np.float32)
    known = torch.from_numpy(1 - person)
    known = torch.cat([known[:1].repeat(4, 1, 1), known[1:]]).view(-1, 4, 3, 2).transpose(0, 1).numpy()
    latents = list(range(known.shape[1]))
    length = (window - 1) // 4 + 1
    padded = (latents + latents[-2:0:-1]) * (plan.target // max(1, len(latents)) + 2)
    for j in range(plan.total):
        start = j * (length - 1)
        theirs = known[:, padded[start : start + length]]
        if j:
            theirs[:, 0] = 1
        ours = known_mask(1 if j else 0, person[plan.mask_indices(j)])
        np.testing.assert_array_equal(ours, theirs)


# --- Properties --------------------------------------------------------------------------------------------


@st.composite
def loops(draw: st.DrawFn) -> tuple[int, Job]:
    overlap = 4 * draw(st.integers(0, 12)) + 1
    window = overlap + 4 * draw(st.integers(1, 40))
    return draw(st.integers(1, 1200)), job(window=window, overlap=overlap)


@settings(max_examples=300, deadline=None)
@given(loops())
def test_every_frame_is_made_once_by_the_loop(drawn: tuple[int, Job]) -> None:
    frames, task = drawn
    check_loop(task.windows(frames), frames, task.history)


def check_loop(windows: Windows, frames: int, history: int) -> None:
    """Each output frame is made once, under the condition frame of the same number."""
    made: list[int] = []
    decoded = 0
    for j in range(windows.total):
        indices, kept = windows.indices(j), windows.keep(j)
        assert len(indices) == windows.length(j) == len(windows.mask_indices(j))
        assert windows.length(j) % 4 == 1 and windows.length(j) <= windows.window
        assert min(indices) >= 0 and max(indices) < frames
        assert indices == windows.mask_indices(j)
        for index in indices:
            decoded = max(decoded, index + 1)
            assert index >= decoded - history, "a clip cannot go back that far"
        assert 0 <= kept.start < kept.stop <= len(indices)
        if j:
            assert kept.start == windows.overlap and indices[: windows.overlap] == made[-windows.overlap :]
        made += indices[kept]
    assert made == list(range(frames))


@st.composite
def contexts(draw: st.DrawFn) -> tuple[int, Job, int]:
    latents = draw(st.integers(2, 24))
    schedule = draw(st.sampled_from(list(SCHEDULES)))
    context = Context(
        schedule,
        frames=4 * latents - 3,
        stride=draw(st.integers(4, 7)),
        overlap=4 * draw(st.integers(1, latents - 1)),
        fuse=draw(st.sampled_from(list(FUSES))),
        whole=schedule == "uniform_looped" or draw(st.booleans()),
    )
    step, frames = draw(st.integers(0, 50)), draw(st.integers(1, 700))
    if context.whole:
        return frames, job(context=context), step
    overlap = 4 * draw(st.integers(0, latents - 2)) + 1
    window = context.frames + 4 * draw(st.integers(0, 60))
    return frames, job(context=context, window=window, overlap=overlap), step


@settings(max_examples=300, deadline=None)
@given(contexts())
def test_context_windows_cover_every_slot(drawn: tuple[int, Job, int]) -> None:
    frames, task, step = drawn
    windows = task.windows(frames)
    check_loop(windows, frames, task.history)
    assert not (task.context and task.context.whole) or windows.total == 1
    for j in {0, windows.total - 1}:
        plan = task.context_plan(windows.length(j))
        assert plan is not None and plan.size == Plan(16, 16, task.model_window).slots
        check_parts(plan, step)
        asked = plan.context.latent_overlap
        starts = sorted(part.slots[1] for part in plan.parts(step))
        assert all(b - a <= plan.size - 1 - asked for a, b in zip(starts, starts[1:], strict=False))
        if plan.context.schedule == "static_standard":
            theirs = schedules.wrappers("static_standard", plan.slots - 1, plan.size - 1, asked, step)
            assert len(plan.parts(step)) == len(theirs), "as many windows as the wrapper"


def check_parts(plan: ContextPlan, step: int) -> None:
    sums, video = np.zeros(plan.slots), 4 * (plan.slots - 2) + 1
    for part in plan.parts(step):
        assert len(part.slots) == len(part.weights) == len(set(part.slots)) == plan.size
        assert min(part.slots) >= 0 and max(part.slots) < plan.slots and min(part.weights) >= 0
        assert part.seen[0] == 0 and part.seen[1:] == [latent + 1 for latent in part.latents]
        assert min(part.latents) >= 0
        steps = np.diff(part.latents)
        if plan.context.schedule == "uniform_looped":
            assert set(steps.tolist()) <= {1, 2 - plan.slots}
        else:
            assert (steps == 1).all()
        # Frame t of the clip belongs to latent (t+3)//4; the first latent gives its last frame.
        assert [(t + 3) // 4 for t in part.frames] == [part.latents[0], *np.repeat(part.latents[1:], 4)]
        assert len(part.frames) == 4 * (plan.size - 2) + 1 and max(part.frames) < video
        np.add.at(sums, list(part.slots), part.weights)
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(3, 24),
    st.integers(0, 100),
    st.data(),
    st.sampled_from(["static_standard", "uniform_standard"]),
    st.sampled_from(list(FUSES)),
    st.integers(0, 50),
)
def test_the_wrappers_windows_cover_every_slot(
    size: int, more: int, data: st.DataObject, schedule: Any, kind: Any, step: int
) -> None:
    overlap = 4 * data.draw(st.integers(1, size - 1))
    context = Context(schedule, 4 * size - 3, overlap=overlap, fuse=kind)
    check_parts(ContextPlan(context, size + more, size, "kijai"), step)


def test_seams_move_with_the_steps() -> None:
    for schedule in ("uniform_standard", "uniform_looped"):
        plan = plan_of(231, schedule=schedule)
        assert len({plan.parts(step) for step in range(8)}) == 8
    assert plan_of(231).parts(0) == plan_of(231).parts(5)


def test_linear_weights_of_two_windows_fade_into_each_other() -> None:
    first, second = plan_of(121, frames=81, overlap=16).parts(0)
    shared = sorted({*first.slots[1:]} & {*second.slots[1:]})
    falling = [first.weights[first.slots.index(slot)] for slot in shared]
    assert falling == sorted(falling, reverse=True) and len(shared) == 11
    np.testing.assert_allclose(falling, np.arange(11, 0, -1) / 12)


# --- Settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message, hint",
    [
        ({"context": {"stride": 8}}, "context stride of 8 frames is not possible", "--context-stride 4"),
        ({"context": {"overlap": 3}}, "context overlap of 3 frames", "--context-overlap 16"),
        ({"context": {"overlap": 14}}, "context overlap of 14 frames", "--context-overlap 12."),
        ({"context": {"overlap": 13, "frames": 13}}, "context overlap of 13 frames", "--context-overlap 12."),
        ({"context": {"overlap": 80}}, "context overlap of 80 frames", "from 4 to 76"),
        ({"context": {"overlap": 0, "frames": 5}}, "context overlap of 0 frames", "--context-overlap 4."),
        ({"context": {"frames": 78}}, "window of 78 frames", "--context-frames 77 or --context-frames 81"),
        ({"context": {"frames": 9001}}, "window of 9001 frames", "--context-frames 77"),
        ({"context": {"schedule": "uniform_looped", "whole": False}}, "needs the whole video", "--window"),
        ({"context": {}, "overlap": 5}, "--overlap would do nothing", "--window"),
        ({"context": {}, "window": 81}, "need no window of 81", "whole=False"),
        (
            {"context": {"whole": False}, "window": 13},
            "shorter than its context windows",
            "--context-frames 13",
        ),
        ({"context": {"whole": False}, "window": 230}, "window of 230 frames", "--window 229"),
        (
            {"context": {"whole": False}, "window": 231 - 2, "compat": "kijai"},
            "no context windows inside",
            "",
        ),
        (
            {"context": {"schedule": "uniform_looped"}, "compat": "kijai"},
            "tear pose and face apart",
            "--compat",
        ),
        ({"context": {"frames": 5, "overlap": 4}, "compat": "kijai"}, "counts the reference", "frames 9"),
        ({"compat": "kijai", "overlap": 5}, "carries 1 frame, not 5", "--overlap"),
    ],
)
def test_settings_that_no_video_can_have(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        job(**{**changes, **({"context": Context(**changes["context"])} if "context" in changes else {})})
    assert hint in caught.value.hint


def options(*arguments: str) -> Context | None:
    with run.make_context("run", ["--inputs", "in", "-o", "out.mp4", *arguments]) as context:
        return take_context(dict(context.params))


def test_options_of_the_command_line() -> None:
    assert options() is None
    assert options("--context", "static_standard") == Context()
    given = (
        "--context-frames",
        "81",
        "--context-overlap",
        "32",
        "--context-fuse",
        "pyramid",
        "--no-freenoise",
    )
    expected = Context("uniform_standard", 81, 4, 32, "pyramid", freenoise=False, whole=False)
    assert options("--context", "uniform_standard", *given, "--window", "229") == expected
    for name in ("--context-frames", "--context-overlap"):
        with pytest.raises(UsageError, match=f"Without context windows {name} would do nothing"):
            options(name, "81")
    with pytest.raises(UsageError, match="Without context windows --no-freenoise"):
        options("--no-freenoise")


def test_rounding() -> None:
    assert [rounded_up(n) for n in (1, 2, 5, 6, 9)] == [1, 5, 5, 9, 9]
    assert [rounded_down(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 5, 5, 9]
