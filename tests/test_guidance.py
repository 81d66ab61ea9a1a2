"""Guidance: schedules, strengths over the steps, NAG, CFG-Zero*, prompts that change, CLIP's pictures.

Golden numbers are those of addons_spec.md 9. test_pipeline.py compares the whole pipeline with diffusers.
"""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from kernels_on_cpu import CpuKernels
from tiny_job import PLAN

from trt_wan.build.models.block import normalised_guidance
from trt_wan.engines.config import TINY
from trt_wan.errors import UsageError
from trt_wan.runtime import pipeline
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.denoise import Branch, predict_window
from trt_wan.runtime.device import dot
from trt_wan.runtime.events import StepDone
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.guidance import ClipVision, Nag, StepSettings, per_step
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.image_encoder import MEAN, STD
from trt_wan.runtime.networks.transformer import WindowCondition
from trt_wan.runtime.preparation import Contexts, Pictures, prepare
from trt_wan.runtime.prompts import Prompts
from trt_wan.runtime.window_texts import WindowTexts

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), Path("face.mp4"))
MASK = 2**32 - 1


def filled(k: int, shape: tuple[int, ...], amp: float = 1.0, base: float = 0.0) -> np.ndarray[Any, Any]:
    """H of addons_spec.md, in Python's integers."""
    values = []
    for i in range(int(np.prod(shape))):
        u = (i * 2654435761 + k * 2246822519 + 374761393) & MASK
        u ^= u >> 15
        u = u * 2246822519 & MASK
        u ^= u >> 13
        u = u * 3266489917 & MASK
        u ^= u >> 16
        values.append(base + amp * (u / 2**32 - 0.5))
    return np.array(values).reshape(shape)


def test_the_fill() -> None:
    np.testing.assert_allclose(filled(0, (3,)), [-0.48906916, -0.28626186, -0.46559526], atol=1e-8)


# --- Schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [
        (3.0, 3, (3, 3, 3)),
        ((2.0,), 2, (2, 2)),
        ((2.0, 1.0), 4, (2, 1, 1, 1)),
        ((3.0, 2.33, 1.67, 1.0), 4, (3, 2.33, 1.67, 1)),
    ],
)
def test_guidance_by_step(given: Any, steps: int, expected: tuple[float, ...]) -> None:
    job = Job(INPUTS, guidance=given, steps=steps)
    settings = job.step_settings
    assert tuple(step.guidance for step in settings) == per_step(given, steps) == expected
    assert [step.passes for step in settings] == [2 if value > 1 else 1 for value in expected]
    assert job.guided == (max(expected) > 1) and ("negative" in job._prompts) == job.guided


@pytest.mark.parametrize(
    ("start", "end", "steps", "expected"),
    [
        (0, 100, 4, "1111"),
        (0, 10, 6, "100000"),  # addons_spec.md 0, "Percent units"
        (0, 10, 4, "1000"),
        (25, 50, 4, "0110"),  # both ends count
        (25.1, 49.9, 20, "00000011110000000000"),
        (0, 0, 5, "10000"),
        (50, 100, 2, "01"),
    ],
)
def test_strengths_act_from_start_to_end(start: float, end: float, steps: int, expected: str) -> None:
    job = Job(INPUTS, steps=steps, pose_start=start, face_end=end, pose_end=end, face_start=start)
    for settings in job.step_settings, Job(INPUTS, steps=steps, pose_start=start, pose_end=end).step_settings:
        assert "".join(str(int(step.pose)) for step in settings) == expected
    assert [step.face for step in job.step_settings] == [step.pose for step in job.step_settings]
    assert all(step.face for step in settings), "the face has its own"


@pytest.mark.parametrize(
    ("settings", "says", "fix"),
    [
        ({"guidance": (2.0, 0.5)}, "A guidance of 0.5", "--guidance 1 (off) to 100"),
        ({"guidance": (2.0, float("nan"))}, "A guidance of nan", "--guidance 1"),
        (
            {"guidance": (2.0, 1.0, 1.0), "steps": 2},
            "3 values of guidance for 2 steps",
            "at most one for each",
        ),
        ({"guidance": ()}, "0 values of guidance", "at least one"),
        ({"pose_end": 0.5}, "0.5 percent of the steps is less than a step", "write 50"),
        ({"face_start": 1}, "1 percent of the steps is less", "write 100"),
        ({"face_start": 101}, "101.0 percent of the steps", "0 to 100"),
        ({"pose_start": float("nan")}, "nan percent of the steps", "0 to 100"),
        ({"pose_start": 80, "steps": 4}, "Of 4 steps none is between 80 and 100", "--pose-strength 0"),
        ({"face_start": 50, "face_end": 20}, "none is between 50 and 20", "--face-strength 0"),
        ({"prompt": "a | | b"}, "A part between the |", "leave a | out"),
        ({"prompt": "a |"}, "A part between the |", "leave a | out"),
        ({"prompt": "0:00 a | 0:90 b"}, "'0:90 b' begins with no time", "m:ss or h:mm:ss"),
        ({"prompt": "0:00: a | 0:05: b"}, "'0:00: a' begins with no time", "a space and the text"),
        ({"prompt": "0:00 a | b"}, "1 of 2 prompts between | begin with a time", "all of them one, or none"),
        ({"prompt": "0:01 a | 0:02 b"}, "The times of the prompts are 0:01, 0:02", "Begin with 0:00"),
        ({"prompt": "0:00 a | 0:05 b | 0:05 c"}, "they must rise", "in the order of their times"),
        ({"prompt": "0:00 a | 0:05"}, "A part between the |", "Write a text"),
        ({"negative_prompt": "a ||b", "guidance": 2}, "A part between the |", "leave a | out"),
        ({"nag": Nag("a | |")}, "A part between the |", "leave a | out"),
    ],
)
def test_jobs_are_refused(settings: dict[str, Any], says: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        Job(INPUTS, **settings)
    assert says in caught.value.message and fix in caught.value.hint, (
        caught.value.message,
        caught.value.hint,
    )


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (Nag, {"prompt": "a", "scale": 0.5}, "A NAG scale of 0.5"),
        (Nag, {"prompt": "a", "tau": -1}, "A NAG tau of -1"),
        (Nag, {"prompt": "a", "alpha": 1.5}, "A NAG alpha of 1.5"),
        (Nag, {"prompt": "a", "alpha": float("nan")}, "A NAG alpha of nan"),
        (Nag, {"prompt": 3}, "Nag.prompt is 3"),
        (ClipVision, {"tiles": 1}, "1 CLIP tiles"),
        (ClipVision, {"tiles": 17}, "17 CLIP tiles"),
        (ClipVision, {"strength": -1}, "strength of the reference of -1"),
        (ClipVision, {"second_strength": 1}, "There is no second CLIP picture"),
        (ClipVision, {"off": True, "tiles": 2}, "its other settings would do nothing"),
    ],
)
def test_settings_are_refused(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        kind(**settings)
    assert says in caught.value.message and caught.value.hint


def test_the_remaining_time_counts_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each pass of the transformer: the estimate is exact after the first step."""
    now = [0.0]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])
    model: Any = SimpleNamespace(executor=SimpleNamespace(wait=lambda: None))
    told: list[Any] = []
    job = Job(INPUTS, guidance=(3.0, 2.0, 1.0), steps=5)
    clock = pipeline._StepClock(model, job, 2, told.append, lambda: False)
    total = 2 * (2 + 2 + 1 + 1 + 1)
    for window in range(2):
        between = clock.window(window)
        for step, settings in enumerate(job.step_settings):
            now[0] += settings.passes
            between(step + 1)
            assert isinstance(told[-1], StepDone) and told[-1].seconds == settings.passes
            assert told[-1].eta == pytest.approx(total - now[0])


# --- Prompts that change ---------------------------------------------------------------------------------


def test_a_prompt_without_bars_is_one_text_as_it_is() -> None:
    for prompt in ("  a man  ", "", "10:30 in the morning, a man walks"):
        prompts = Prompts.parse(prompt)
        assert prompts == Prompts((prompt,))
        assert {prompts.of_window(j, (j, j + 1)) for j in range(3)} == {prompt}


def test_prompts_in_turn() -> None:
    prompts = Prompts.parse("a|b | c ")
    assert prompts.texts == ("a", "b", "c")
    assert [prompts.of_window(j, (j, j + 1)) for j in range(5)] == ["a", "b", "c", "c", "c"]


def test_prompts_of_context_windows() -> None:
    """kijai_semantics.md 3.4: min(int(max(c) / (n / prompts)), prompts - 1), in fractions."""
    for slots in range(2, 60):
        for count in range(1, 6):
            prompts = Prompts(tuple(map(str, range(count))))
            for last in range(slots):
                expected = min(int(last / Fraction(slots, count)), count - 1)
                assert prompts.of_slots(last, slots, (0, 1)) == str(expected)


def test_prompts_at_times() -> None:
    prompts = Prompts.parse("0:00 a walk, 1:30 long | 0:02.5 b | 1:00 c\nd | 1:00:00 e")
    assert prompts.texts == ("a walk, 1:30 long", "b", "c\nd", "e") and prompts.times == (0, 2.5, 60, 3600)
    for seconds, text in (
        ((0, 3), 0),
        ((0, 4.9), 0),
        ((0, 5), 1),
        ((2, 4), 1),
        ((58, 62), 2),
        ((4e3, 5e3), 3),
    ):
        for found in (prompts.of_window(7, seconds), prompts.of_slots(3, 9, seconds)):
            assert found == prompts.texts[text], seconds


def test_windows_get_the_prompts_of_their_new_frames() -> None:
    """At 10 frames per second windows of 21 frames bring 21, then 20 new ones: from 0, 2.1, 4.1, 6.1 s."""
    job = Job(
        INPUTS,
        window=21,
        prompt="0:00 a | 0:03 b | 0:06.2 c",
        guidance=2,
        negative_prompt="x | y",
        nag=Nag("n"),
    )
    texts = WindowTexts(job, 70, 10)
    found = [texts.of(j) for j in range(4)]
    assert [each.prompt for each in found] == ["a", "b", "b", "c"]  # middles: 1.05, 3.1, 5.1, 6.55
    assert [each.negative for each in found] == ["x", "y", "y", "y"]
    assert {each.nag for each in found} == {"n"}
    assert [texts.used(j) for j in range(4)] == [each.all for each in found] and texts.unused() == []
    assert WindowTexts(job, 30, 10).unused() == ["b", "c"], "the second window's middle is 2.55"
    assert WindowTexts(replace(job, prompt="a | b"), 20, 10).unused() == ["b", "y"]
    assert job.texts == ("a", "b", "c", "x", "y", "n")
    assert job.load.travels and job.load.contexts == 3 and job.load.nag and job.load.guided


def test_context_windows_have_prompts_of_their_own() -> None:
    """kijai_semantics.md 3.3 and 3.4: 241 frames, 62 slots, windows that end with 20, 37, 54, 61."""
    context = Context(frames=81, overlap=16)
    job = Job(
        INPUTS, prompt="a | b | c", context=context, compat="kijai", guidance=2, negative_prompt="x | y"
    )
    texts = WindowTexts(job, 241, 24)
    plan = job.context_plan(job.windows(241).length(0))
    assert plan is not None
    parts = plan.parts(0)
    assert [part.slots[-1] for part in parts] == [20, 37, 54, 61]
    found = [texts.of(0, part) for part in parts]
    assert [each.prompt for each in found] == [*("a", "b", "c", "c")]  # int(last·3/62)
    assert [each.negative for each in found] == [*("x", "y", "y", "y")]
    assert set(texts.used(0)) == set("abcxy") and texts.unused() == []
    assert job.load.contexts == 5, "all texts may be in use in one step"


def test_context_windows_by_time_and_in_windows_of_the_loop() -> None:
    timed = Job(INPUTS, prompt="0:00 a | 0:02 b", context=Context(frames=21, overlap=8))
    texts = WindowTexts(timed, 101, 25)
    plan = timed.context_plan(timed.windows(101).length(0))
    assert plan is not None
    middles = [part.frames[len(part.frames) // 2] / 25 for part in plan.parts(0)]
    assert middles == sorted(middles) and 0.3 < middles[0] < 0.5 and 3.5 < middles[-1] < 3.8
    assert [texts.of(0, part).prompt for part in plan.parts(0)] == ["ab"[m >= 2] for m in middles]
    hybrid = replace(timed, prompt="a | b", window=41, context=replace(timed.context, whole=False))
    texts = WindowTexts(hybrid, 101, 25)
    for j, prompt in enumerate("abb"):
        plan = hybrid.context_plan(hybrid.windows(101).length(j))
        assert plan is not None and len(plan.parts(0)) > (j < 2)
        assert {texts.of(j, part).prompt for part in plan.parts(0)} == {prompt}
    by_time = WindowTexts(replace(hybrid, prompt="0:00 a | 0:02.3 b"), 101, 25)
    plan = hybrid.context_plan(41)
    assert plan is not None  # window 1 begins with frame 40, at 1.6 seconds
    expected = ["ab"[1.6 + part.frames[len(part.frames) // 2] / 25 >= 2.3] for part in plan.parts(0)]
    assert [by_time.of(1, part).prompt for part in plan.parts(0)] == expected and set(expected) == {"a", "b"}
    assert set(by_time.used(1)) == {"a", "b"}


class Recorded:
    """A model of which only the calls matter."""

    def __init__(self) -> None:
        self.config, self.plan = TINY, PLAN
        self.executor, self.sequence = OnnxRuntimeExecutor(Path(), BoundWeights({})), None
        self.calls: list[str] = []

    def run(self, name: str, *inputs: Any, n: int = 0) -> tuple[Any, ...]:
        self.calls.append(name)
        if name == "text_embed":
            return (inputs[0],)
        if name == "context_kv":
            text, image = (float(np.mean(array)) for array in inputs)
            return (f"k{text} {n}", f"v{text} {n}", f"k{image} {n}", f"v{image} {n}")
        raise AssertionError(name)

    def place(self, array: Array) -> Array:
        return array

    def release(self, *names: str) -> None:
        self.calls.append(f"release {' '.join(names)}")


def test_contexts_are_computed_when_they_are_needed_and_held_no_longer() -> None:
    model: Any = Recorded()
    features = {text: np.full((2, 2), k, np.float32) for k, text in enumerate("abcx")}
    contexts = Contexts(model, features, np.full((2, 2), 9, np.float32), Nag("x", 4, 2, 0.5))
    layers = TINY.transformer.layers
    once = ["text_embed", *["context_kv"] * layers]
    contexts.use("ax")
    assert model.calls == [*once, *once, "release text_embed context_kv"]
    assert contexts.of("a") == [(f"k0.0 {n}", f"v0.0 {n}", f"k9.0 {n}", f"v9.0 {n}") for n in range(layers)]
    model.calls.clear()
    contexts.use("ax")
    assert model.calls == [], "nothing is computed twice, and no weights are asked for"
    contexts.use("bx")
    assert model.calls == [*once, "release text_embed context_kv"] and set(contexts._made) == {"b", "x"}
    for (*plain, k, v, scale, tau, alpha), b, x in zip(
        contexts.with_nag("b", "x"), contexts.of("b"), contexts.of("x"), strict=True
    ):
        assert tuple(plain) == b and (k, v) == x[:2] and b[2] is x[2] and b[3] is x[3]
        assert (scale, tau, alpha) == (4, 2, 0.5)


# --- One step --------------------------------------------------------------------------------------------


class Passing:
    """A model whose velocity is the condition of the window."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(transformer=SimpleNamespace(layers=1, fuser_interval=1))
        self.executor, self.keep = OnnxRuntimeExecutor(Path(), BoundWeights({})), None
        self.split, self.sequence = "tokens", None
        self.seen: list[tuple[str, Any]] = []

    def run(self, name: str, *inputs: Any, n: int = 0) -> tuple[Any, ...]:
        if name == "patch_embed":
            self.seen.append(("pose", float(inputs[3][0])))
            return (inputs[1],)
        if name in ("fuser", "cross_attention", "cross_attention_nag"):
            self.seen.append((name, inputs[1]))
        return inputs[:1] * (3 if name == "attn_in" else 2 if name == "attn_out" else 1)

    def place(self, array: Array) -> Array:
        return array


def predicted(
    c: Any, u: Any, steps: list[StepSettings], cfg_zero_star: bool = False
) -> tuple[list[Any], list[tuple[str, Any]]]:
    model: Any = Passing()
    one = np.ones(1, np.float32)
    windows = [WindowCondition(np.float32(v), one, one, [("key", "value")], one) for v in (c, u)]
    sides = [Branch([("nag",)], windows[0], "cross_attention_nag"), Branch([("no",)], windows[1])]
    time: Any = (None, None)
    prepared: Any = SimpleNamespace(times=[time] * len(steps), rope=(None, None))
    predict = predict_window(model, prepared, sides, steps, cfg_zero_star)
    return [predict(step, one) for step in range(len(steps))], model.seen


def test_cfg_zero_star() -> None:
    c, u = filled(4100, (2, 3, 4), 2), filled(4101, (2, 3, 4), 2)
    (v,), _ = predicted(c, u, [StepSettings(5.0, True, True)], cfg_zero_star=True)
    np.testing.assert_allclose(v.reshape(-1)[:3], [0.818259, 4.329708, -0.138389], atol=2e-6)
    alpha = (c * u).sum() / (u * u).sum()
    assert alpha == pytest.approx(0.348043, abs=1e-6)
    np.testing.assert_allclose(v, alpha * u + 5 * (c - alpha * u), atol=1e-5)
    (plain,), _ = predicted(c, u, [StepSettings(5.0, True, True)])
    np.testing.assert_allclose(plain, u + 5 * (c - u), atol=1e-5)
    nothing, _ = predicted(c, np.zeros_like(u), [StepSettings(5.0, True, True)], cfg_zero_star=True)
    np.testing.assert_allclose(nothing[0], 5 * c, atol=1e-5)


def test_each_step_has_its_own_settings() -> None:
    steps = [StepSettings(3.0, True, False), StepSettings(1.0, False, True), StepSettings(2.0, False, False)]
    velocities, seen = predicted([2.0], [1.0], steps)
    assert [float(v[0]) for v in velocities] == [1 + 3 * (2 - 1), 2, 1 + 2 * (2 - 1)]
    nag, plain = ("cross_attention_nag", "nag"), ("cross_attention", "no")
    assert seen == [
        *(("pose", 1.0), nag, ("pose", 1.0), plain),
        *(("pose", 0.0), nag, ("fuser", "key")),
        *(("pose", 0.0), nag, ("pose", 0.0), plain),
    ]


# --- NAG -------------------------------------------------------------------------------------------------


def nag_values() -> tuple[Any, Any]:
    positive, negative = filled(4000, (3, 8), 2), filled(4001, (3, 8), 2)
    negative[1] = positive[1] + 0.05 * negative[1]
    return positive, negative


ROW0 = [0.206021, 0.348054, -0.234852, 0.265582, -0.758876, -0.391256, 0.450507, 1.307686]


def test_nag_golden() -> None:
    positive, negative = (torch.from_numpy(values) for values in nag_values())
    numbers = (torch.tensor([number], dtype=torch.float64) for number in (11, 2.5, 0.25))
    made = normalised_guidance(positive, negative, *numbers).numpy()
    np.testing.assert_allclose(made[0], ROW0, atol=1e-6)
    np.testing.assert_allclose(made[1, :2], [-0.707435, -0.623181], atol=1e-6)
    rho = np.abs(11 * nag_values()[0] - 10 * nag_values()[1]).sum(1) / np.abs(nag_values()[0]).sum(1)
    np.testing.assert_allclose(rho, [13.0692, 1.07278, 12.1818], rtol=1e-5)


def test_nag_graph(make_model: MakeModel) -> None:
    """In ONNX Runtime: the golden numbers, spread over all heads, and random inputs against numpy in fp64."""
    model, c = make_model(TINY, PLAN, {"transformer": {}}), TINY.transformer
    shapes = {t.name: t.shape for t in model.networks["cross_attention_nag"].inputs}
    rng = np.random.default_rng(0)
    channels = np.arange(8) * c.dim // 8 + 3  # of all heads: the norm must be over all
    given = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    q = given["cross_q"].reshape(-1, c.heads, c.head_dim)
    q[:3, :, :3] = 200 * np.eye(3)[:, None]  # token t sees key t alone
    for name, values in zip(("text", "nag"), nag_values(), strict=True):
        given[f"{name}_k"][:, :3, :3] = np.eye(3)
        spread = np.zeros((3, c.dim))
        spread[:, channels] = values
        given[f"{name}_v"][:, :3] = spread.reshape(3, c.heads, c.head_dim).swapaxes(0, 1)
    for name, number in (("nag_scale", 11), ("nag_tau", 2.5), ("nag_alpha", 0.25)):
        given[name][:] = number
    (made,) = model.run("cross_attention_nag", *given.values())
    np.testing.assert_allclose(np.asarray(made)[0, channels], ROW0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(made)[1, channels[:2]], [-0.707435, -0.623181], atol=1e-5)

    for name, shape in shapes.items():
        if len(shape) > 1:
            given[name] = rng.standard_normal(shape, np.float32)
    (made,) = model.run("cross_attention_nag", *given.values())
    exact = {name: values.astype(np.float64) for name, values in given.items()}
    heads = exact["cross_q"].reshape(-1, c.heads, c.head_dim).swapaxes(0, 1)

    def attended(name: str) -> Any:
        weights = np.exp(heads @ exact[f"{name}_k"].swapaxes(1, 2))
        values = weights / weights.sum(-1, keepdims=True) @ exact[f"{name}_v"]
        return values.swapaxes(0, 1).reshape(-1, c.dim)

    zp, zn = attended("text"), attended("nag")
    expected = np.empty_like(zp)
    for token, (p, n) in enumerate(zip(zp, zn, strict=True)):
        g = 11 * p - 10 * n
        if np.abs(g).sum() / np.abs(p).sum() > 2.5:
            g = g * 2.5 * np.abs(p).sum() / (np.abs(g).sum() + 1e-7)
        expected[token] = 0.25 * g + 0.75 * p
    np.testing.assert_allclose(made, expected + attended("image"), atol=2e-5)


def test_nag_of_no_attention_is_none() -> None:
    """Where the attention to the text is zero, so is the result: the wrapper's NaN."""
    zero, other = torch.zeros(2, 8), torch.ones(2, 8)
    numbers = [torch.tensor([number]) for number in (11.0, 2.5, 0.25)]
    for negative in (zero, other):
        assert normalised_guidance(zero, negative, *numbers).abs().max() == 0


# --- CLIP's pictures -------------------------------------------------------------------------------------


def test_weights_of_the_pictures() -> None:
    second = Path("second.png")
    assert ClipVision().weights == (1.0,)
    assert ClipVision(strength=0.7).weights == (0.7,)
    assert ClipVision(second=second).weights == (0.5, 0.5)
    assert ClipVision(second=second, strength=1, second_strength=0.2).weights == (1.0, 0.2)
    assert ClipVision(second=second, second_strength=0).weights == (0.5, 0.0)


class Seeing(Recorded):
    """CLIP's features of a picture are its mean, image tokens these plus 100."""

    def remembered(self, key: object, make: Callable[[], Any]) -> Any:
        return make()

    def run(self, name: str, *inputs: Any, n: int = 0) -> tuple[Any, ...]:
        match name:
            case "image_encoder_embed":
                self.calls.append(name)
                return (np.full((257, 4), inputs[0].mean(), np.float32),)
            case "image_encoder_layer":
                return inputs[:1]
            case "image_embed":
                return (inputs[0] + 100,)
            case "vae_encode_first":
                return (np.zeros((16, 1, 6, 8), np.float32), *[None] * 99)
            case "time_embed":
                return None, None
        return super().run(name, *inputs, n=n)


@pytest.mark.parametrize(
    ("clip_vision", "expected", "seen"),
    [
        (ClipVision(), lambda a, b: a + 100, 1),
        (ClipVision(strength=0.5), lambda a, b: (a + 100) / 2, 1),
        (ClipVision(second=Path("b")), lambda a, b: (a + b) / 2 + 100, 2),
        (ClipVision(second=Path("b"), strength=2, second_strength=1), lambda a, b: 2 * a + b + 300, 2),
        (ClipVision(tiles=2), lambda a, b: a + 100, 5),
        (ClipVision(off=True), lambda a, b: 100, 0),
    ],
)
def test_image_tokens(
    monkeypatch: pytest.MonkeyPatch, clip_vision: ClipVision, expected: Any, seen: int
) -> None:
    monkeypatch.setattr(
        "trt_wan.runtime.preparation.encode_reference", lambda model, canvas: np.zeros((20, 1, 6, 8))
    )
    model: Any = Seeing()
    pictures = [np.full((48, 64, 3), level, np.uint8) for level in (0, 200)]
    job = Job(INPUTS, clip_vision=clip_vision, window=PLAN.frames)
    chosen = Pictures(pictures[0], pictures[1] if clip_vision.second else None)
    features = {job.prompt: np.zeros((2, 2), np.float32)}
    prepared = prepare(model, features, job.texts, chosen, clip_vision, None, [], guided=False)
    means = [np.mean((level / 255 - MEAN) / STD) for level in (0, 200)]
    np.testing.assert_allclose(prepared.contexts._image_tokens, expected(*means), rtol=1e-5)
    assert model.calls.count("image_encoder_embed") == seen


# --- The dot product -------------------------------------------------------------------------------------


def test_the_dot_kernel_on_the_cpu(tmp_path: Path) -> None:
    kernels = CpuKernels(dot.SOURCE, tmp_path)
    rng = np.random.default_rng(1)
    for n, grid in ((1, 1), (255, 2), (5000, 3)):
        x, y = rng.standard_normal((2, n), np.float32) * 1e3
        partial = np.full(grid + 1, np.nan)
        kernels.launch("dot", grid, 256, True, x, y, n, partial)
        assert np.isnan(partial[-1]), "nothing is written behind the blocks' sums"
        exact = float(np.dot(x.astype(np.float64), y.astype(np.float64)))
        assert partial[:-1].sum() == pytest.approx(exact, rel=1e-12, abs=1e-6)
