"""An open model: jobs of different sizes, modes, prompts and seeds one after another, on ONNX Runtime. The
same on a GPU, with its memory, is in test_open_model_on_gpu.py.
"""

import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_job import FRAMES, PLAN, as_argv, prepare, write_clip, write_reference, write_sound

from trt_wan.cli.run import run
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.checksums import SETTLED
from trt_wan.engines.store.graphs import graph_set, graphs_folder, require_graphs
from trt_wan.errors import InputError, Stopped, UsageError
from trt_wan.runtime.device.arena import Arena
from trt_wan.runtime.events import Event, Note, StageStarted, StepDone, silent
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.host_memory import peak_bytes
from trt_wan.runtime.job import Inputs, Job, Load
from trt_wan.runtime.opening.gpu_sizes import GpuSizes
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.opening.residency import BEFORE_THE_STEPS, CONTEXT_BYTES, KERNELS_BYTES
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video import stills as stills_module
from trt_wan.runtime.video.clips import open_clips
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.sources import RandomSource
from trt_wan.runtime.weights.tiny import write_tiny_weights

OTHER = (48, 64)  # a second size, width and height: that of test_bench_starts.py, whose graphs are shared
BUILD_OTHER = "trt-wan build --model tiny --size 48x64 --window 13 --precision fp32"
Clips = dict[str, Path]


@pytest.fixture(scope="module", autouse=True)
def home(tiny_home: Path) -> Iterator[None]:
    """Of the second size only the graphs that it has other contracts for are exported."""
    plan = Plan(*OTHER, PLAN.frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        with graph_set(TINY, plan).filling() as missing:
            for name in missing:
                if networks(TINY, plan)[name] == networks(TINY, PLAN)[name]:
                    shutil.copy(require_graphs(TINY, PLAN) / f"{name}.onnx", graphs_folder(TINY, plan))
                    graph_set(TINY, plan).finished(name)
        subprocess.run(as_argv(BUILD_OTHER), env=os.environ, capture_output=True, check=True)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Prepared clips of both sizes, and weights."""
    base = tmp_path_factory.mktemp("jobs")
    prepare(base / "first", write_sound(base / "tone.m4a", 1))
    (base / "other").mkdir()
    write_reference(base / "other/src_ref.png", OTHER)
    write_clip(base / "other/src_pose.mp4", OTHER, 9)
    write_tiny_weights(base / "weights", seed=5)
    return {name: base / name for name in ("first", "other", "weights")}


def opened(folders: Clips, **more: Any) -> OpenModel:
    files = WeightFiles((folders["weights"],))
    return open_model(files, Settings(executor="onnxruntime", text_cache=False), **more)


@pytest.fixture(scope="module")
def model(folders: Clips) -> Iterator[OpenModel]:
    with opened(folders) as model:
        yield model


def job(folder: Path, **changes: Any) -> Job:
    settings = {"window": PLAN.frames, "steps": 2, "seed": 7} | changes
    return Job(Inputs.from_folder(folder, changes.get("mode", "animate")), **settings)


def frames(model: OpenModel, job: Job, **more: Any) -> Array:
    return np.stack(list(model.stream(job, **more)))


def no_face(job: Job) -> Job:
    return replace(job, inputs=replace(job.inputs, face=None))


def jobs(folders: Clips) -> list[Job]:
    """Two sizes, both modes, another prompt, with and without guidance."""
    first = no_face(job(folders["first"]))
    return [
        first,
        job(folders["other"], seed=3),
        no_face(replace(first, prompt="a dancer", guidance=2.0)),
        no_face(job(folders["first"], mode="replace")),
        first,
    ]


def test_jobs_in_a_row_equal_single_runs(folders: Clips, model: OpenModel) -> None:
    """Also after a job that was stopped in the middle of a window."""
    alone = []
    for task in jobs(folders)[:4]:
        with opened(folders) as single:
            alone.append(frames(single, task))
    row = []
    for k, task in enumerate(jobs(folders)):
        if k == 2:
            stop_after_a_step(model, replace(task, steps=4))
        row.append(frames(model, task))
    for k, (got, want) in enumerate(zip(row, [*alone, alone[0]], strict=True)):
        assert np.array_equal(got, want), f"job {k} differs from its single run"
    assert not np.array_equal(alone[0], alone[2]) and not np.array_equal(alone[0], alone[3])


def stop_after_a_step(model: OpenModel, task: Job) -> None:
    steps: list[Event] = []

    def progress(event: Event) -> None:
        steps.extend([event] if isinstance(event, StepDone) else [])

    with pytest.raises(Stopped):
        frames(model, task, progress=progress, should_stop=lambda: bool(steps))


def test_a_model_runs_one_job_at_a_time(folders: Clips, model: OpenModel) -> None:
    task = no_face(job(folders["first"]))
    stream = model.stream(task)
    next(stream)
    with pytest.raises(UsageError, match="running another job"):
        next(model.stream(task))
    stream.close()
    assert len(frames(model, task)) == FRAMES


def test_a_closed_model_says_so(folders: Clips) -> None:
    with opened(folders) as model:
        pass
    model.close()
    with pytest.raises(UsageError, match="This model is closed"):
        next(model.stream(no_face(job(folders["first"]))))


def test_an_abandoned_stream_leaves_the_model_usable_in_another_thread(
    folders: Clips, model: OpenModel
) -> None:
    task = no_face(job(folders["first"]))
    want = frames(model, task)
    stream = model.stream(task)
    next(stream)
    stream.close()
    got: list[Array] = []
    thread = threading.Thread(target=lambda: got.append(frames(model, task)))
    thread.start()
    thread.join()
    assert np.array_equal(got[0], want)


def test_an_observer_sees_every_size(folders: Clips) -> None:
    seen: list[Executor] = []

    def observe(executor: Executor) -> Executor:
        seen.append(executor)
        return executor

    with opened(folders, observe=observe) as model:
        for task in (jobs(folders)[0], jobs(folders)[1], jobs(folders)[0]):
            frames(model, task)
    assert len(seen) == 2


class Counting:
    """Counts the networks that run; everything else passes through."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.ran: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def run(self, network: Any, n: int, inputs: Any) -> Any:
        self.ran[network.name] += 1
        return self.executor.run(network, n, inputs)


@pytest.mark.parametrize("cached", [True, False])
def test_a_known_prompt_opens_no_text_encoder(folders: Clips, cached: bool) -> None:
    while time.time() - (folders["weights"] / "tokenizer.json").stat().st_ctime < SETTLED:
        time.sleep(0.1)  # the hash of a file that was just written is not remembered
    task = job(folders["other"], prompt=f"known {cached}", guidance=1.0)
    ran: list[Counter[str]] = []
    made = []
    for _ in range(2):
        watched: list[Counting] = []

        def observe(executor: Executor, watched: list[Counting] = watched) -> Any:
            watched.append(Counting(executor))
            return watched[0]

        settings = Settings(executor="onnxruntime", text_cache=cached)
        with open_model(WeightFiles((folders["weights"],)), settings, observe=observe) as model:
            made.append(frames(model, task))
        ran.append(watched[0].ran)
    layers = TINY.text.layers
    assert [r["text_encoder_layer"] for r in ran] == [layers, 0 if cached else layers]
    assert np.array_equal(*made)
    assert ran[0]["attn_in"] == ran[1]["attn_in"] > 0


def test_the_grey_clip_is_encoded_once_a_size(folders: Clips) -> None:
    watched: list[Counting] = []

    def observe(executor: Executor) -> Any:
        watched.append(Counting(executor))
        return watched[0]

    task = job(folders["other"])
    with opened(folders, observe=observe) as model:
        first = frames(model, task)
        encoded = watched[0].ran["vae_encode_next"]
        (folders["other"] / "src_pose.mp4").touch()
        again = frames(model, task)
        assert watched[0].ran["vae_encode_next"] - encoded == encoded // 2  # the pose clip alone
    assert np.array_equal(first, again)


def test_a_job_with_the_same_clips_encodes_none_of_them(folders: Clips) -> None:
    """Pose, face, background and reference are encoded once; other frames, or a changed file, are encoded."""
    watched: list[Counting] = []

    def observe(executor: Executor) -> Any:
        watched.append(Counting(executor))
        return watched[0]

    first, other_seed = (job(folders["first"], mode="replace", seed=seed) for seed in (1, 2))
    encoders = ("vae_encode_first", "vae_encode_next", "motion_encoder", "image_encoder_layer")

    def ran() -> list[int]:
        return [watched[0].ran[name] for name in encoders]

    with opened(folders) as model:
        wanted = frames(model, other_seed)
    with opened(folders, observe=observe) as model:
        frames(model, first)
        whole = ran()
        assert min(whole) > 0
        assert np.array_equal(frames(model, other_seed), wanted)
        carried = [now - before for now, before in zip(ran(), whole, strict=True)]
        assert carried[2:] == [0, 0] and carried[1] == (PLAN.frames - 1) // 4, (
            "the second window's background"
        )
        before = ran()
        (folders["first"] / "src_face.mp4").touch()
        frames(model, other_seed)
        assert ran()[2] > before[2]


# --- Faults that were there ------------------------------------------------------------------------------


def test_replace_without_a_face_clip_gets_a_grey_face(folders: Clips, model: OpenModel) -> None:
    """The wrapper feeds one (kijai_semantics.md 1.5); the fusers were skipped."""
    events: list[Event] = []
    task = no_face(job(folders["first"], mode="replace"))
    without = frames(model, task, progress=events.append)
    assert any(isinstance(event, Note) and "grey face" in event.text for event in events)

    skipped = frames(model, replace(task, face_strength=0.0))
    assert not np.array_equal(without, skipped), "the fusers are skipped"
    animated = no_face(job(folders["first"]))
    assert np.array_equal(frames(model, animated), frames(model, replace(animated, face_strength=0.0)))


def test_strengths_are_placed_once_a_window(folders: Clips) -> None:
    """They were uploaded nine times a step."""
    given: list[Any] = []

    class Watching(Counting):
        def run(self, network: Any, n: int, inputs: Any) -> Any:
            given.extend(value for name, value in inputs.items() if name.endswith("_strength"))
            return super().run(network, n, inputs)

    with opened(folders, observe=Watching) as model:  # type: ignore[arg-type]
        frames(model, job(folders["first"], steps=3))
    assert len(given) == 2 * 3 * (1 + TINY.transformer.fusers)  # windows, steps
    assert len({id(value) for value in given}) == 2 * 2


@pytest.mark.parametrize("stage", ["weights", "text", "image", "condition", "decode"])
def test_a_stop_is_looked_at_in_every_stage(folders: Clips, model: OpenModel, stage: str) -> None:
    """It was looked at between steps only: in the last decode the job went on to its end."""
    reached: list[str] = []
    steps: list[StepDone] = []

    def progress(event: Event) -> None:
        if isinstance(event, StageStarted):
            reached.append(event.stage)
        if isinstance(event, StepDone):
            steps.append(event)

    (folders["other"] / "src_pose.mp4").touch()  # its encoding is not remembered
    task = job(folders["other"])
    with pytest.raises(Stopped):
        frames(model, task, progress=progress, should_stop=lambda: reached[-1:] == [stage])
    assert reached[-1] == stage and len(steps) == (2 if stage == "decode" else 0)
    assert len(frames(model, task)) == 9


def test_clips_are_closed_when_they_do_not_fit_together(
    folders: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["first"], tmp_path / "clips")
    write_clip(tmp_path / "clips/src_face.mp4", (512, 512), 12)
    made: list[Clip] = []
    closed: list[Clip] = []

    class Watched(Clip):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

        def close(self) -> None:
            closed.append(self)
            super().close()

    monkeypatch.setattr(stills_module, "Clip", Watched)
    inputs = Inputs.from_folder(tmp_path / "clips", "replace")
    with pytest.raises(InputError, match="different numbers of frames"):
        open_clips(inputs, 13)
    assert len(made) == 4 and set(closed) == set(made)
    with open_clips(Inputs.from_folder(folders["first"], "replace"), 13):
        assert len(closed) == 4
    assert set(closed) == set(made) and len(made) == 8


def test_several_folders_of_weights_are_searched(folders: Clips, tmp_path: Path) -> None:
    """A second --weights replaced the first in silence."""
    first, second = tmp_path / "diffusion_models", tmp_path / "rest"
    for folder in (first, second):
        folder.mkdir()
    for path in folders["weights"].iterdir():
        shutil.copy(path, first if path.name.startswith("wan2.2") else second)
    files = WeightFiles((first, second))
    with open_model(files, Settings(executor="onnxruntime", text_cache=False)) as model:
        assert len(frames(model, job(folders["other"]))) == 9


def test_the_command_line_takes_several_folders_of_weights() -> None:
    given = ["--inputs", ".", "-o", "x.mp4", "--weights", "first", "--weights", "second"]
    with run.make_context("run", given) as context:
        assert context.params["weights"] == (Path("first"), Path("second"))


@pytest.mark.parametrize(
    ("vram", "budget"), [(None, 5 * 10**9 - KERNELS_BYTES), (3.0, 3 * 10**9 - CONTEXT_BYTES)]
)
def test_the_cuda_context_is_subtracted_once(vram: float | None, budget: int) -> None:
    """Free memory is measured with the context open; it was subtracted again."""
    gpu: Any = SimpleNamespace(
        free_bytes=lambda: 5 * 10**9, name="A GPU", driver=13, capability=(9, 0), loads=None, copies=None
    )
    flavour = Flavour("tensorrt_rtx", "1.6.1", None, "a test")
    sizes = GpuSizes(gpu, flavour, TINY, {}, RandomSource(0), Settings(vram=vram), None)
    assert sizes._budget == budget


@pytest.mark.parametrize(("vram", "passing"), [(None, False), (12.0, True)])
def test_loading_ahead_of_the_first_size_keeps_to_the_memory(vram: float | None, passing: bool) -> None:
    """An open model keeps its encoders, if they fit. With --vram 12 all of them were loaded first, and 18 GB
    were in use on an H200.
    """
    gpu: Any = SimpleNamespace(
        free_bytes=lambda: 141 * 10**9,
        name="A GPU",
        driver=13,
        capability=(9, 0),
        loads=None,
        copies=None,
        arena=Arena(0),
    )
    flavour = Flavour("tensorrt_rtx", "1.6.1", None, "a test")
    sizes = GpuSizes(gpu, flavour, ANIMATE_14B, {}, RandomSource(0), Settings(vram=vram), None)
    asked: list[tuple[bool, int | None]] = []

    class Weights:
        def plan(self, streamed: Sequence[Pack], passing: Collection[str]) -> None:
            self.passing = passing

        def prefetch(self, packs: Sequence[Pack], room: int | None) -> None:
            asked.append((set(BEFORE_THE_STEPS) <= set(self.passing), room))
            raise Stopped("enough")

    sizes.weights = Weights()  # type: ignore[assignment]
    with pytest.raises(Stopped):
        sizes.begin(Plan(832, 480, 77, "fp8"), Load(), None, [], silent)
    assert asked == [(passing, sizes._budget)]


def test_peak_memory_is_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS counts bytes where Linux counts kilobytes: the peak was a thousand times too large there."""
    usage = SimpleNamespace(ru_maxrss=4096)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_bytes() == 4096 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes() == 4096


@pytest.mark.parametrize("vram", [-1.0, 0.0, float("nan"), float("inf")])
def test_gpu_memory_is_a_positive_number(vram: float) -> None:
    with pytest.raises(UsageError, match="GB of GPU memory is not possible"):
        Settings(vram=vram)


def test_weights_must_be_named() -> None:
    with pytest.raises(UsageError, match="no weights"):
        WeightFiles()
