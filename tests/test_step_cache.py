"""The step cache: skip lists of the published rule, skipped steps against diffusers' blocks, and runs of the
tiny model with ratios that `bench calibrate-cache` has made.
"""

import itertools
import json
import shlex
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import MakeModel
from oracles import diffusers_transformer
from residual_passes import PUBLISHED, Passes, require_held
from test_transformer import random_inputs
from tiny_job import FRAMES, PLAN, prepare, read_frames, write_sound

from trt_wan.cli.calibrate_cache import calibrate_cache
from trt_wan.cli.main import cli
from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan
from trt_wan.errors import InputError, Stopped, UsageError
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.denoise import Branch, predict_window
from trt_wan.runtime.events import Event, Note, StepDone, silent
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.guidance import StepSettings
from trt_wan.runtime.job import Inputs, Job, Load, Lora
from trt_wan.runtime.kept.record import Record
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_blank_face,
    encode_context,
    encode_time,
    rope_tables,
)
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.model import Basis, open_model
from trt_wan.runtime.render import render
from trt_wan.runtime.sampling.combine import combine_fp32
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.step_cache import Ratios, Residuals, StepCache, skipped_steps, told_skips
from trt_wan.runtime.step_ratios import Calibration, NotCalibrated, made_for, read, with_ratios
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tiny import write_tiny_weights

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), Path("face.mp4"))
LEVEL = Ratios((1.0,) * 20)
FULL = StepCache(0.06, ratios=Ratios(PUBLISHED, PUBLISHED))


def plain(count: int, guidance: float = 1.0) -> list[StepSettings]:
    return [StepSettings(guidance, pose=True, face=True)] * count


def skipped(
    cache: StepCache, ratios: Sequence[float], steps: Sequence[StepSettings], side: int = 0
) -> list[int]:
    found = skipped_steps(cache, ratios, side, steps, len(steps), 0)
    return [i for i, skips in enumerate(found) if skips]


# --- Which steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "threshold", "expected"),
    [
        (4, 0.06, "1,2"),  # addons_spec.md 4.3
        (6, 0.06, "1,2,4"),
        (8, 0.06, "2,3,5"),
        (20, 0.06, "4,5,7,8,10,11,13,15"),
        (30, 0.06, "6,7,9,10,12,13,15,16,18,20,22,24"),
        (40, 0.06, "8,9,11,12,14,15,17,18,20,21,23,24,26,28,30,32,34"),
        (4, 0.12, "1,2"),
        (6, 0.12, "1,2,4"),
        (8, 0.12, "2,3,5,6"),
        (20, 0.12, "4,5,7,8,10,11,13,14,16,18"),
        (30, 0.12, "6,7,9,10,12,13,15,16,18,19,21,22,24,26,28"),
    ],
)
def test_skip_lists_of_the_published_table(steps: int, threshold: float, expected: str) -> None:
    assert skipped(StepCache(threshold), PUBLISHED, plain(steps)) == [int(i) for i in expected.split(",")]


def test_the_longest_of_the_table() -> None:
    assert len(skipped(StepCache(0.12), PUBLISHED, plain(40))) == 21


def published_rule(cache: StepCache, curves: Sequence[Sequence[float]], steps: int) -> list[list[int]]:
    """As the published code counts: the passes of both sides in turn, one list of their ratios."""
    places = np.round(np.linspace(0, len(curves[0]) - 1, steps)).astype(int)
    table = np.array([[curve[place] for curve in curves] for place in places]).ravel()
    state, made = [[1.0, 0.0, 0] for _ in range(2)], [list[int](), list[int]()]
    for count, ratio in enumerate(table):
        side, skip = count % 2, False
        if count >= int(2 * steps * cache.retention):
            state[side][0] *= ratio
            state[side][1] += abs(1 - state[side][0])
            state[side][2] += 1
            skip = state[side][1] < cache.threshold and state[side][2] <= cache.most
        if skip:
            made[side].append(count // 2)
        else:
            state[side] = [1.0, 0.0, 0]
    return made


@pytest.mark.parametrize("seed", range(20))
def test_both_sides_are_those_of_the_published_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, count = int(rng.integers(15, 60)), int(rng.integers(2, 60))
    cache = StepCache(float(rng.uniform(0.01, 0.3)), int(rng.integers(1, 6)), float(rng.uniform(0.05, 0.5)))
    curves = rng.uniform(0.9, 1.05, (2, count)).tolist()
    ours = [skipped(cache, curve, plain(steps, 5.0), side) for side, curve in enumerate(curves)]
    assert ours == published_rule(cache, curves, steps)


def test_a_step_under_other_conditions_is_computed() -> None:
    """Whatever begins or ends to act; the value of guidance changes no residual."""
    cache, ratios = StepCache(0.06, most=100), LEVEL.prompt
    steps = plain(20, 5.0)
    assert skipped(cache, ratios, steps) == list(range(4, 20))
    for other in ({"pose": False}, {"face": False}, {"guidance": 1.0}):
        changed = [*steps[:8], *(replace(step, **other) for step in steps[8:12]), *steps[12:]]  # type: ignore[arg-type]
        assert skipped(cache, ratios, changed) == [i for i in range(4, 20) if i not in (8, 12)], other
    weaker = [*steps[:8], *(replace(step, guidance=2.0) for step in steps[8:])]
    assert skipped(cache, ratios, weaker) == list(range(4, 20))
    late = [*plain(10), *plain(10, 5.0)]
    assert skipped(cache, ratios, late, side=1) == list(range(11, 20)), "it has no residual before"


def test_a_part_of_the_steps_has_their_ratios() -> None:
    job = Job(replace(INPUTS, init=Path("a.mp4")), steps=40, start_step=10, step_cache=FULL)
    rng = np.random.default_rng(0)
    curve = tuple(rng.uniform(0.9, 1.0, 40).tolist())
    job = replace(job, step_cache=replace(FULL, ratios=Ratios(curve)))
    shifted = skipped_steps(FULL, curve[10:], 0, job.step_settings, 30, 0)
    assert job.skips == (shifted,) and any(shifted) and len(shifted) == 30


def test_threshold_0_skips_nothing_and_needs_no_ratios() -> None:
    job = Job(INPUTS, steps=4, sampler="lcm", step_cache=StepCache(0))
    assert job.skips == () and job.load == Job(INPUTS, steps=4).load and job.computed == (1,) * 4
    assert with_ratios(job, "14b", (), silent) is job


# --- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says", "fix"),
    [
        ({"steps": 14}, "for 15 steps and more: 14 steps", "leave out --step-cache"),
        ({"sigmas": (1.0, 0.5)}, "2 steps differ", "--steps 20"),
        ({"end_step": 10}, "10 steps differ", "--steps 20"),
        ({"sampler": "dpm++_sde"}, "dpm++_sde adds noise in every step", "unipc"),
        ({"sampler": "lcm"}, "lcm adds noise", "unipc, euler, dpm++"),
        ({"context": Context("uniform_standard")}, "uniform_standard move", "--context static_standard"),
        ({"context": Context("uniform_looped")}, "uniform_looped move", "--context static_standard"),
        ({"guidance": 5.0}, "made without guidance", "`bench calibrate-cache`"),
    ],
)
def test_jobs_are_refused(settings: dict[str, Any], says: str, fix: str) -> None:
    for ratios in (LEVEL, None):
        if ratios is None and "guidance" in settings:
            continue
        with pytest.raises(UsageError) as caught:
            Job(INPUTS, step_cache=StepCache(0.06, ratios=ratios), **settings)
        assert says in caught.value.message and fix in caught.value.hint
    assert Job(INPUTS, step_cache=StepCache(0.06), context=Context())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sampler", "lcm", "--steps", "15", "--size", "64x48"), "no job with it takes the step cache"),
        (("--steps", "14", "--size", "64x48"), "14 steps have no use"),
        (("--steps", "15", "--size", "7x7"), "not a multiple of 16"),
        (("--steps", "15", "--size", "99999x99999"), "99999"),
    ],
)
def test_what_cannot_be_calibrated(options: tuple[str, ...], says: str) -> None:
    command = ["bench", "calibrate-cache", "--random-weights", "tiny", "--window", "5", *options]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2 and says in result.stderr, result.output


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((-0.1,), "threshold of -0.1"),
        ((float("nan"),), "threshold of nan"),
        ((2,), "threshold of 2"),
        ((0.1, 0), "0 skipped steps"),
        ((0.1, 2, 1.0), "A share of 1.0"),
    ],
)
def test_settings_are_refused(values: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        StepCache(*values)


@pytest.mark.parametrize("sides", [((1.0,),), ((1.0, 0.0),), ((1.0, float("inf")),), ((1.0, 1.0), (1.0,))])
def test_ratios_are_refused(sides: Any) -> None:
    with pytest.raises(UsageError, match="positive numbers"):
        Ratios(*sides)


# --- A skipped step --------------------------------------------------------------------------------------


class Blocks:
    """diffusers' transformer, with the residual over its blocks in a dictionary of ours."""

    def __init__(self, weights: dict[str, Array], inputs: dict[str, Array]) -> None:
        self.model, self.inputs = diffusers_transformer(TINY, weights), inputs
        self.entered = self.left = None
        self.add: torch.Tensor | None = None
        self.model.blocks[0].register_forward_pre_hook(self._enter)
        self.model.norm_out.register_forward_pre_hook(self._leave)

    def _enter(self, module: object, arguments: Any) -> None:
        self.entered = arguments[0]

    def _leave(self, module: object, arguments: Any) -> Any:
        if self.add is not None:
            return (self.entered + self.add, *arguments[1:])
        self.left = arguments[0]
        return None

    def velocity(self, latent: Array, text: Array, t: int, add: torch.Tensor | None) -> Array:
        self.add = add
        batched = {name: torch.from_numpy(values)[None] for name, values in self.inputs.items()}
        with torch.no_grad():
            made = self.model(
                hidden_states=torch.cat((torch.from_numpy(latent)[None], batched["condition"]), dim=1),
                timestep=torch.tensor([t]),
                encoder_hidden_states=torch.from_numpy(text)[None],
                encoder_hidden_states_image=batched["image"],
                pose_hidden_states=batched["pose"],
                face_pixel_values=batched["face"].transpose(1, 2),
            ).sample
        return made[0].numpy()


def test_a_skipped_step_adds_the_residual_of_its_side(make_model: MakeModel) -> None:
    """Against diffusers: the blocks of both sides are skipped in other steps."""
    weights, inputs = random_weights(TINY, "transformer", seed=1), random_inputs(PLAN, seed=4)
    rng = np.random.default_rng(1)
    latents = [rng.standard_normal(inputs["latent"].shape, np.float32) for _ in range(3)]
    inputs["face"] = np.full_like(inputs["face"], -1)
    texts = [inputs["text"], rng.standard_normal(inputs["text"].shape, np.float32)]
    times, skips = [900, 700, 400], ([False, True, True], [False, False, True])
    model = make_model(TINY, PLAN, {"transformer": weights | {ORTHONORMAL: orthonormal(weights[DIRECTION])}})
    one, image = np.ones(1, np.float32), embed_image(model, inputs["image"])
    face = encode_blank_face(model)
    window = WindowCondition(inputs["condition"], inputs["pose"], one, face, one)
    branches = [Branch(encode_context(model, text, image), window) for text in texts]
    prepared: Any = Prepared([encode_time(model, t) for t in times], rope_tables(TINY, PLAN))
    caches = Residuals(model.executor.combine, skips).of(None)
    predict = predict_window(model, prepared, branches, plain(3, 3.0), caches=caches)
    exact = predict_window(model, prepared, branches, plain(3, 3.0))
    theirs, held = Blocks(weights, inputs), [torch.empty(0)] * 2
    for i, (latent, t) in enumerate(zip(latents, times, strict=True)):
        sides = []
        for side, text in enumerate(texts):
            sides.append(theirs.velocity(latent, text, t, held[side] if skips[side][i] else None))
            if not skips[side][i]:
                held[side] = theirs.left - theirs.entered  # type: ignore[operator]
        made = predict(i, latent)
        assert np.abs(made - (3 * sides[0] - 2 * sides[1])).max() < 1e-3, i
        computed = exact(i, latent)
        if skips[0][i] or skips[1][i]:
            assert np.abs(made - computed).max() > 1e-2, "the residual is of another step"
        else:
            np.testing.assert_array_equal(made, computed)


class Prepared:
    def __init__(self, times: Any, rope: Any) -> None:
        self.times, self.rope = times, rope


def test_residuals_are_held_by_side_and_part_while_they_are_needed() -> None:
    residuals = Residuals(
        combine_fp32, [(False, True, True, False, False), (False, False, True, False, False)]
    )
    rng = np.random.default_rng(0)
    parts: list[Any] = [None, (0, 1), (0, 2)]
    streams = [(part, side) for part in parts for side in range(2)]
    last: dict[Any, Array] = {}
    entered: list[Any] = []
    for step in range(5):
        for part, side in streams:
            cache, x = residuals.of(part)[side].at(step), rng.standard_normal((3, 4), np.float32)
            skips = step == 2 or (step == 1 and side == 0)
            if cache is None:
                assert step > 2 or (step, side) == (0, 1), "no later step needs it"
                continue
            cache.enter(x)
            out = x + 0 if skips else x + rng.standard_normal((3, 4), np.float32)
            left = cache.leave(out)
            assert cache.skips == skips
            if skips:
                np.testing.assert_array_equal(left, x + last[part, side])
            else:
                assert left is out
                last[part, side] = out - x
            entered.append(weakref.ref(x))
            del x, out, left
        if step >= 2:
            assert not any(stream._kept is not None for part in parts for stream in residuals.of(part))
    assert not any(ref() is not None for ref in entered), "arrays before the blocks stay"


# --- Ratios ----------------------------------------------------------------------------------------------


RUN = ("--window", str(PLAN.frames), "--steps", "15", "--sampler", "euler", "--seed", "3")
THRESHOLD = "0.25"


class Made:
    """A folder with clips of two windows, weights of the tiny model, and a home with its calibration."""

    def __init__(self, folder: Path, calibrated: Result, independent: list[float]) -> None:
        self.folder, self.calibrated, self.independent = folder, calibrated, independent
        self.options = ("--inputs", str(folder / "clips"), "--weights", str(folder / "weights"), *RUN)

    def run(self, name: str, *options: str) -> dict[str, Any]:
        return data_of("run", *self.options, "-o", str(self.folder / name), *options)

    @property
    def expected(self) -> list[int]:
        ratios = read(next((self.folder / "home" / "step_cache").iterdir())).ratios
        return skipped(StepCache(float(THRESHOLD)), ratios.prompt, plain(15))

    def frames(self, name: str) -> Any:
        return read_frames(self.folder / name)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--json"])


def data_of(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1])["data"])


def error_of(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments)
    assert result.exit_code, result.output
    return {**json.loads(result.stdout.splitlines()[-1])["error"], "exit": result.exit_code}


class Independent(ForwardingExecutor):
    """The residual of every pass, from the outputs of the networks. None where no block ran."""

    def __init__(self, executor: Executor, made: list[Any]) -> None:
        super().__init__(executor)
        self.made, self.first = made, np.empty(0)
        self.last: Array | None = None

    def run(self, network: Network, n: int, inputs: Any) -> tuple[Array, ...]:
        outputs = super().run(network, n, inputs)
        if network.name == "patch_embed":
            self.first, self.last = np.array(outputs[0], np.float64), None
        elif network.name in ("ffn", "fuser"):
            self.last = np.array(outputs[0], np.float64)
        elif network.name == "head":
            self.made.append(None if self.last is None else self.last - self.first)
        return outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("cache")
    prepare(folder / "clips", write_sound(folder / "tone.m4a", 1))
    (folder / "clips" / "src_face.mp4").unlink()  # faces take most of a job's time on the CPU
    write_tiny_weights(folder / "weights", seed=5)
    (folder / "home").mkdir()
    (folder / "home" / "graphs").symlink_to(tiny_home / "graphs")
    residuals: list[Array] = []
    opened = Basis.open

    def watched(basis: Basis, observe: Any = None, export: Any = None) -> Any:
        return opened(basis, lambda executor: Independent(observe(executor), residuals), export)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(folder / "home"))
        options = ("--inputs", str(folder / "clips"), "--weights", str(folder / "weights"), *RUN)
        with patch.context() as watching:
            watching.setattr(Basis, "open", watched)
            result = invoke("bench", "calibrate-cache", *options)
        assert result.exit_code == 0, result.output
        norms = [[np.linalg.norm(token) for token in residual] for residual in residuals]
        ratios = [
            sum(a / b for a, b in zip(now, before, strict=True)) / len(now)
            for before, now in itertools.pairwise(norms)
        ]
        yield Made(folder, result, [1.0, *ratios])


def test_ratios_are_the_mean_growth_of_the_tokens(made: Made) -> None:
    """Of the first window alone, which has 15 steps."""
    data = json.loads(made.calibrated.stdout.splitlines()[-1])["data"]
    assert len(made.independent) == 15 and data["negative"] == []
    np.testing.assert_allclose(data["prompt"], made.independent, rtol=1e-4)
    assert np.std(data["prompt"][1:]) > 1e-3, "a curve"
    kept = read(Path(data["result"]))
    assert kept.ratios.prompt == tuple(data["prompt"]) and kept.made_with["size"] == "64x48"
    assert kept.made_for["sampler"] == "euler" and len(kept.made_for["transformer"]) == 1


def test_runs_with_the_calibration(made: Made) -> None:
    """The forecast and the run tell the steps; --from and --redo give the same bits."""
    expected = made.expected
    assert 3 <= len(expected) <= 10, "some steps, for the rest of this test"
    cached, told = ("--step-cache", THRESHOLD), [[step + 1 for step in expected]]
    forecast = made.run("a.mp4", *cached, "--dry-run")
    assert forecast["skipped_steps"] == told and forecast["evaluations"] == 2 * (15 - len(expected))
    assert forecast["step_cache_bytes"] == PLAN.tokens * TINY.transformer.dim * 4
    without = made.run("a.mp4", "--dry-run")
    assert forecast["memory"] - without["memory"] == forecast["step_cache_bytes"]
    assert "skipped_steps" not in without

    assert made.run("a.mp4", *cached)["skipped_steps"] == told
    video = str(made.folder / "a.mp4")
    data_of("run", "--from", video, "-o", str(made.folder / "b.mp4"))
    assert (made.folder / "b.mp4").read_bytes() == Path(video).read_bytes()
    data_of("run", "--from", video, "--redo", "2", "--seed", "9", "-o", str(made.folder / "c.mp4"))
    again = made.frames("c.mp4")
    assert (again[:13] == made.frames("a.mp4")[:13]).all() and (again[13:] != made.frames("a.mp4")[13:]).any()


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(made: Made) -> None:
    """Its second window begins without a residual, as in one run."""
    files, settings = WeightFiles((made.folder / "weights",)), Settings(executor="onnxruntime")
    inputs = Inputs.from_folder(made.folder / "clips", "animate")
    job = Job(inputs, window=PLAN.frames, steps=15, sampler="euler", seed=3)
    job = replace(job, step_cache=StepCache(float(THRESHOLD)))
    steps: list[StepDone] = []
    blocks: list[Any] = []

    def count(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event)

    with open_model(files, settings, observe=lambda executor: Independent(executor, blocks)) as model:
        shared: Any = {"record": Record({}, {}, {}, {}, {}), "sidecar": False, "progress": count}
        with pytest.raises(Stopped):
            render(job, model, made.folder / "cut.mp4", should_stop=lambda: len(steps) == 22, **shared)
        render(job, model, made.folder / "cut.mp4", resume=True, **shared)
    assert [(event.window, event.step) for event in steps[20:24]] == [(2, 6), (2, 7), (2, 1), (2, 2)]
    np.testing.assert_array_equal(made.frames("cut.mp4"), made.frames("a.mp4"))
    skips = [i in made.expected for i in range(15)]
    assert [residual is None for residual in blocks] == [*skips, *skips[:7], *skips], "the blocks did not run"


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (("--step-cache", "0"), True),
        (("--step-cache", "0.2", "--step-cache-most", "3"), True),
        (("--step-cache-ratios", "other.json"), True),
        (("--steps", "16"), True),
        ((), False),  # the calibration has been made anew since
    ],
)
def test_what_a_given_option_changes_was_asked_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], asked: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UsageError("opened", "")

    record = json.loads((made.folder / "a.json").read_text())
    (place,) = (made.folder / "home" / "step_cache").iterdir()
    other = json.loads(place.read_text())
    other["prompt"][1] += 0.5
    (tmp_path / "other.json").write_text(json.dumps(other))
    if not asked:
        record["job"]["step_cache"]["ratios"]["prompt"][1] += 0.5
    (tmp_path / "a.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Basis, "open", refuse)
    error = error_of("run", "--from", "a.json", "-o", "x.mp4", *options)
    assert ("opened" == error["message"]) is asked, error
    assert asked or "would not repeat a.json: step cache ratios prompt" in error["message"]


def test_each_context_window_has_its_own_residual(made: Made) -> None:
    files, settings = WeightFiles((made.folder / "weights",)), Settings(executor="onnxruntime")
    job = Job(
        Inputs.from_folder(made.folder / "clips", "animate"),
        context=Context(frames=PLAN.frames, overlap=4),
        steps=15,
        step_cache=StepCache(0.06, ratios=Ratios((1.0,) * 15)),
    )
    passes: list[Any] = []
    with open_model(files, settings, observe=lambda executor: Passes(executor, passes)) as model:
        assert len(list(model.stream(job))) == FRAMES
    assert len(passes) == 2 * 15 and job.skips[0].count(True) == 8
    require_held(job, passes)


def test_without_ratios_the_hint_has_the_command_that_makes_them(made: Made) -> None:
    output = ("-o", str(made.folder / "no.mp4"), "--step-cache", "0.06")
    for more in (("--shift", "3"), ("--shift", "3", "--dry-run")):
        error = error_of("run", *made.options, *output, *more)
        assert error["exit"] == 2 and "has no ratios for these weights" in error["message"]
        assert shlex.split(error["hint"].splitlines()[1]) == ["trt-wan", *error["command"]]
    with calibrate_cache.make_context("calibrate-cache", error["command"][2:]) as context:
        given = context.params
    assert (given["size"], given["window"], given["shift"]) == ((PLAN.width, PLAN.height), PLAN.frames, 3)
    assert (given["steps"], given["sampler"], given["seed"]) == (15, "euler", 3)
    assert given["weights"] == (made.folder / "weights",)


def test_options_that_do_nothing_are_refused(made: Made) -> None:
    error = error_of("run", *made.options, "-o", "x.mp4", "--step-cache-most", "3")
    assert error["exit"] == 2 and "--step-cache-most would do nothing" in error["message"]
    error = error_of("run", *made.options, "-o", "x.mp4", "--step-cache", "0.1", "--steps", "6")
    assert error["exit"] == 2 and "for 15 steps and more" in error["message"]
    for options, says in (
        (("--steps", "6"), "6 steps have no use"),
        (("--guidance", "5,1"), "Only some of the steps are guided"),
        (("--size", "64x48"), "--inputs have a size"),
    ):
        error = error_of("bench", "calibrate-cache", *made.options, *options)
        assert error["exit"] == 2 and says in error["message"]


def kept(job: Job, steps: int, level: float = 1.0) -> Path:
    made = Calibration(made_for(job, "tiny", ()), {"steps": steps}, Ratios((1.0, *(level,) * (steps - 1))))
    return made.write()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    return tmp_path


def test_ratios_are_found_by_what_they_were_made_for(home: Path) -> None:
    """Weights, LoRAs and levels must be the same; of several step counts the nearest is taken, and told."""
    lora = home / "a.safetensors"
    lora.write_bytes(b"1")
    job = Job(INPUTS, steps=20, step_cache=StepCache(0.06))
    kept(job, 20), kept(job, 40, 0.9)
    notes: list[Event] = []
    assert with_ratios(job, "tiny", (), notes.append).step_cache == replace(job.step_cache, ratios=LEVEL)
    assert not notes
    more = with_ratios(replace(job, steps=35, shift=5), "tiny", (), notes.append)
    assert more.step_cache.ratios.prompt[1] == 0.9  # type: ignore[union-attr]
    assert [event.text for event in notes if isinstance(event, Note)] == [
        "The calibration has 40 steps and this job 35: ratios of the nearest steps are taken."
    ]
    for other in ({"shift": 3.0}, {"sampler": "euler"}, {"grid": "simple"}, {"loras": (Lora(lora),)}):
        with pytest.raises(NotCalibrated):
            with_ratios(replace(job, **other), "tiny", (), silent)  # type: ignore[arg-type]
    for changed in (replace(job, guidance=5.0), replace(job, sigmas=tuple(np.linspace(1, 0.05, 20)))):
        with pytest.raises(NotCalibrated):
            with_ratios(changed, "tiny", (), silent)
    with pytest.raises(NotCalibrated):
        with_ratios(job, "tiny", (lora,), silent)
    merged = replace(job, loras=(Lora(lora, 0.5),))
    kept(merged, 20)
    assert with_ratios(merged, "tiny", (), silent).step_cache.ratios == LEVEL  # type: ignore[union-attr]
    lora.write_bytes(b"2")
    with pytest.raises(NotCalibrated):
        with_ratios(merged, "tiny", (), silent)


def test_a_file_that_is_named(home: Path) -> None:
    """One for another job is told, one of another model is refused, as is a file of another kind."""
    job = Job(INPUTS, steps=20, step_cache=StepCache(0.06))
    named = replace(job, shift=3.0, step_cache=StepCache(0.06, file=kept(job, 20)))
    notes: list[Any] = []
    found = with_ratios(named, "tiny", (), notes.append)
    assert found.step_cache == StepCache(0.06, ratios=LEVEL), "the record has the ratios, not their place"
    assert "from which it differs in: shift" in notes[0].text
    assert with_ratios(found, "tiny", (), notes.append) is found and len(notes) == 1
    with pytest.raises(UsageError, match="of the model tiny, not of 14b"):
        with_ratios(named, "14b", (), silent)
    bad = home / "bad.json"
    for text in ("", "[]", "{}", '{"trt_wan_step_cache": 2}', "9" * 5000):
        bad.write_text(text)
        with pytest.raises(InputError, match="is no file of ratios"):
            with_ratios(replace(job, step_cache=StepCache(0.06, file=bad)), "tiny", (), silent)


def test_skipped_steps_are_told_from_1() -> None:
    assert told_skips([(False, True, True), (False,) * 3]) == (
        "2 of 3 steps (2, 3), and for the negative prompt 0 of 3 steps"
    )
    assert told_skips([(True,) * 30]).endswith("19, 20, 10 more)")


def test_what_residuals_take_at_full_size() -> None:
    """0.67 GB each. Without guidance the peak is the VAE's, as without a cache; with it, it was 5.15 GB."""
    plan = Plan(832, 480, 77, "fp8")
    loads = [Load(20, guided, contexts=1 + guided, cached=True) for guided in (False, True)]
    peaks = [activation_bytes(ANIMATE_14B, plan, load) / 1e9 for load in loads]
    assert peaks == pytest.approx([4.70, 5.64], abs=0.02)
