"""A part of the steps, from an init video: the latents that the model sees, against torch's noise and
diffusers' VAE; what is refused; the command line.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracles import diffusers_vae
from tiny_job import FRAMES, PLAN, prepare, write_clip, write_sound

from trt_wan.cli.main import cli
from trt_wan.cli.run import RunOptions, run
from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.errors import InputError, UsageError
from trt_wan.runtime.events import Event, Note, StepDone
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.sampling.grids import schedule
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.clips import open_clips, require_init_size
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.windows import Windows

SEED = 7
NOISE, ENCODED = 1e-5, 1e-4  # torch's noise, and diffusers' VAE
SHAPE = (16, PLAN.slots, PLAN.latent_height, PLAN.latent_width)
SEEN: list[Array] = []  # every latent that went into the transformer


class Watched:
    """An executor that keeps the latents that go into the transformer."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        if network.name == "patch_embed":
            SEEN.append(np.asarray(inputs["latent"]))
        return self._executor.run(network, n, inputs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared clips, an init video, weights."""
    place = tmp_path_factory.mktemp("init")
    prepare(place / "clips", write_sound(place / "tone.m4a", 1))
    write_clip(place / "init.mp4", colour=(40, 200, 90))
    write_tiny_weights(place / "weights", seed=5)
    return place


@pytest.fixture(scope="module")
def model(place: Path, tiny_home: Path) -> Iterator[OpenModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        settings = Settings(executor="onnxruntime", text_cache=False)
        with open_model(WeightFiles((place / "weights",)), settings, observe=Watched) as model:  # type: ignore[arg-type]
            yield model


def job(place: Path, init: str | None = "init.mp4", pose: str = "clips/src_pose.mp4", **changes: Any) -> Job:
    """Without a face clip, whose crops take most of the time."""
    reference = place / "clips/src_ref.png"
    inputs = Inputs(reference, place / pose, None, init=place / init if init else None)
    return Job(inputs, **({"window": PLAN.frames, "steps": 4, "seed": SEED} | changes))


def run_job(model: OpenModel, job: Job) -> tuple[list[Array], list[Event], int]:
    """The latents of every step, the events, the number of frames."""
    SEEN.clear()
    events: list[Event] = []
    frames = sum(piece.shape[1] for piece in model.pieces(job, progress=events.append))
    return list(SEEN), events, frames


@pytest.fixture(scope="module")
def encoded(place: Path) -> list[Array]:
    """By diffusers, for each window: the reference's latent and the init clip's, [16, T1, h, w]."""
    _, checkpoints = load_weights([place / "weights"], {})
    vae = diffusers_vae(TINY, {name: checkpoints["vae"][name] for name in required_tensors(TINY, "vae")})
    mean, std = (
        torch.tensor(numbers).reshape(-1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )

    def latent(pictures: Array) -> Array:
        pixels = torch.from_numpy(pictures).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            return ((vae.encode(pixels).latent_dist.mode()[0] - mean) / std).numpy()

    reference = latent(cv2.imread(str(place / "clips/src_ref.png"))[None, :, :, ::-1].copy())
    windows = Windows(FRAMES, PLAN.frames, 1)
    with Clip(place / "init.mp4", history=FRAMES) as clip:
        pictures = clip.window(range(FRAMES))
    return [
        np.concatenate((reference, latent(pictures[windows.indices(j)])), axis=1)
        for j in range(windows.total)
    ]


@pytest.mark.parametrize(
    ("sampler", "draws", "settings", "first", "steps"),
    [
        ("euler", 0, {"denoise_strength": 0.5}, 1, 3),  # int(4 · 0.5) + 1 steps
        ("dpm++_sde", 2, {"start_step": 2}, 2, 2),
        ("lcm", 1, {"start_step": 1, "end_step": 2}, 1, 1),
        ("er_sde", 1, {"denoise_strength": 0.3, "grid": "simple"}, 2, 2),
    ],
)
def test_the_first_latent(
    model: OpenModel,
    place: Path,
    encoded: list[Array],
    sampler: str,
    draws: int,
    settings: dict[str, Any],
    first: int,
    steps: int,
) -> None:
    """sigma·noise + (1 - sigma)·init, and the noise of a window comes after the steps of the one before."""
    task = job(place, sampler=sampler, **settings)
    seen, events, frames = run_job(model, task)
    assert len(seen) == 2 * steps and frames == FRAMES
    assert [(e.step, e.steps) for e in events if isinstance(e, StepDone)] == [
        (k + 1, steps) for _ in range(2) for k in range(steps)
    ]
    sigma = schedule(task.grid, 4, 5.0).sigmas[first]
    generator = torch.Generator().manual_seed(SEED)
    for window in range(2):
        noise = torch.randn(SHAPE, generator=generator).numpy()
        wanted = sigma * noise + (1 - sigma) * encoded[window]
        np.testing.assert_allclose(seen[window * steps], wanted, rtol=0, atol=ENCODED)
        assert np.abs(seen[window * steps] - noise).max() > 1e-2
        for _ in range(draws):
            torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("sampler", ["dpm++_sde", "lcm"])
def test_step_noise_comes_between_the_noises_of_windows(model: OpenModel, place: Path, sampler: str) -> None:
    """The order of ComfyUI-WanVideoWrapper, from one generator."""
    seen, _, _ = run_job(model, job(place, None, sampler=sampler, steps=2))
    generator = torch.Generator().manual_seed(SEED)
    noise = [torch.randn(SHAPE, generator=generator).numpy() for _ in range(4)]
    for latent, wanted in ((seen[0], noise[0]), (seen[2], noise[3])):
        np.testing.assert_allclose(latent, wanted, rtol=0, atol=NOISE)


def test_steps_that_end_early_leave_noise_and_say_so(model: OpenModel, place: Path) -> None:
    write_clip(place / "short.mp4", frames=PLAN.frames)  # one window
    whole, events, _ = run_job(model, job(place, None, "short.mp4", sampler="euler"))
    part, told, frames = run_job(model, job(place, None, "short.mp4", sampler="euler", end_step=3))
    assert frames == PLAN.frames and len(whole) == 4 and len(part) == 3
    for a, b in zip(whole, part, strict=False):
        np.testing.assert_array_equal(a, b)
    (note,) = [e for e in told if isinstance(e, Note) and e.code == "noise_left"]
    assert note.text.startswith("The steps end at level 0.625")
    assert note.data["sigma"] == schedule("official", 4, 5.0).sigmas[3]
    assert not [e for e in events if isinstance(e, Note) and e.code == "noise_left"]


def test_steps_that_start_late_without_a_video_say_so(model: OpenModel, place: Path) -> None:
    write_clip(place / "short.mp4", frames=PLAN.frames)
    _, late, _ = run_job(model, job(place, None, "short.mp4", sigmas=(0.8, 0.5)))
    _, whole, _ = run_job(model, job(place, None, "short.mp4", sigmas=(1, 0.5, 0)))
    notes = [
        [e.text for e in told if isinstance(e, Note) and e.code == "noise_alone"] for told in (late, whole)
    ]
    assert len(notes[0]) == 1 and "level 0.8 without a video" in notes[0][0] and not notes[1]


def test_levels_of_ones_own_are_run(place: Path) -> None:
    """Those of a grid, given one by one, are the same steps; steps, grid and shift are not read."""
    grid = job(place, None)
    own = job(place, None, sigmas=grid.schedule.sigmas, steps=9, grid="beta", shift=2.0)
    assert own.schedule == grid.schedule


@pytest.mark.parametrize(
    ("steps", "strength", "run"),
    [(6, 0.5, 4), (6, 0.833, 5), (4, 0.3, 2), (4, 0.01, 1), (20, 0.25, 6), (4, 0.74, 3)],
)
def test_denoise_strength(place: Path, steps: int, strength: float, run: int) -> None:
    """addons_spec.md 6: S = 6: .5 -> 4 steps; S = 4: .3 -> 2."""
    made = job(place, steps=steps, denoise_strength=strength).schedule
    assert made.steps == run and made == schedule("official", steps, 5.0).part(steps - run, steps)


START, STRENGTH = {"start_step": 1}, {"denoise_strength": 0.5}


@pytest.mark.parametrize(
    ("init", "settings", "message"),
    [
        (True, {}, "start from noise alone \\(level 0.9998\\), so the init video would do nothing"),
        (True, {"denoise_strength": 0.9}, "start from noise alone"),  # 4 of 4 steps
        (True, START | STRENGTH, "both say where the steps start"),
        (True, {"denoise_strength": 0.0}, "A denoise strength of 0.0"),
        (True, {"denoise_strength": 1.1}, "A denoise strength of 1.1"),
        (True, {"denoise_strength": float("nan")}, "A denoise strength of nan"),
        (False, START, "no video to start from"),
        (False, STRENGTH, "no video to start from"),
        (True, {"start_step": 4}, "Steps 4 to 4 are no part of 4 steps"),
        (True, {"start_step": -1}, "Steps -1 to 4 are no part"),
        (True, START | {"end_step": 1}, "Steps 1 to 1 are no part"),
        (False, {"end_step": 5}, "Steps 0 to 5 are no part"),
        (False, {"end_step": 0}, "Steps 0 to 0 are no part"),
        (False, {"sigmas": (0.5, 0.6)}, "do not fall"),
        (False, {"sigmas": (1, 0.5), "end_step": 3}, "no part of 2 steps"),
    ],
)
def test_what_is_refused(place: Path, init: bool, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job(place, "init.mp4" if init else None, **settings)


@pytest.mark.parametrize("settings", [{"steps": 2}, {"steps": 3}, {"sigmas": (1, 0.5, 0)}, {"steps": 1}])
def test_the_strength_of_the_hint_leaves_out_a_step(place: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="start from noise alone") as caught:
        job(place, **settings)
    found = re.search(r"--denoise-strength (\S+),", caught.value.hint)
    assert (found is None) == (settings == {"steps": 1})
    if found is not None:
        assert job(place, **settings, denoise_strength=float(found[1])).schedule.sigmas[0] < 0.999


def test_the_init_clip_has_the_rules_of_the_others(place: Path, tmp_path: Path) -> None:
    write_clip(place / "long.mp4", frames=FRAMES + 3)
    write_clip(place / "small.mp4", size=(48, 48))
    with pytest.raises(InputError, match=f"long.mp4 has {FRAMES + 3}"):
        open_clips(job(place, "long.mp4", **START).inputs, PLAN.frames)
    with pytest.raises(InputError, match="small.mp4 is 48x48 where 64x48 is needed"):
        open_clips(job(place, "small.mp4", **START).inputs, PLAN.frames)
    with pytest.raises(InputError, match="small.mp4 is 48x48 where 64x48"):
        require_init_size(place / "small.mp4", PLAN.width, PLAN.height, FRAMES)
    with pytest.raises(InputError, match=f"{FRAMES + 3} frames, and the clips will have {FRAMES}"):
        require_init_size(place / "long.mp4", PLAN.width, PLAN.height, FRAMES)
    inputs = Inputs.from_folder(place / "clips", "animate", init=place / "long.mp4", trim_to_shortest=True)
    with open_clips(inputs, PLAN.frames) as clips:
        assert clips.frames == FRAMES and clips.init is not None


# --- The command line --------------------------------------------------------------------------------------


def test_the_options(place: Path) -> None:
    arguments = ["-o", "o.mp4", "--sigmas", "1,0.9, .5", "--init", str(place / "init.mp4")]
    with run.make_context("run", [*arguments, "--start-step", "1", "--end-step", "2"]) as context:
        known = {name: value for name, value in context.params.items() if name in RunOptions.__annotations__}
    options = RunOptions(**known)
    made = options.job(options.inputs(place / "clips"))
    assert made.sigmas == (1, 0.9, 0.5) and made.inputs.init == place / "init.mp4" in options.files()
    assert (made.start_step, made.end_step, made.denoise_strength) == (1, 2, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sigmas 1,x", "'1,x' is not a list of numbers"),
        ("--sigmas 1,0.5 --steps 4", "so --steps would do nothing"),
        ("--sigmas 1,0.5 --grid beta", "so --grid would do nothing"),
        ("--sigmas 0.5,0.6", "do not fall from at most 1"),
        ("--denoise-strength 0.5", "no video to start from"),
        ("--grid lightx2v --steps 6", "lightx2v has 4 steps"),
        ("--init missing.mp4", "does not exist"),
    ],
)
def test_the_command_refuses(place: Path, tmp_path: Path, arguments: str, message: str) -> None:
    command = ["run", "--inputs", str(place / "clips"), "-o", str(tmp_path / "o.mp4"), *arguments.split()]
    result = CliRunner().invoke(cli, [*command, "--random-weights", "tiny", "--executor", "onnxruntime"])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_the_init_video_is_not_the_output(place: Path) -> None:
    init = str(place / "init.mp4")
    command = ["run", "--inputs", str(place / "clips"), "-o", init, "-y", "--init", init, "--start-step", "1"]
    result = CliRunner().invoke(cli, [*command, "--random-weights", "tiny"])
    assert result.exit_code == 2 and Path(init).exists()
