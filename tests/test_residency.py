"""What a job needs of the GPU: the rehearsal against the pipeline itself, and what stays or streams."""

import bisect
import math
import resource
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import CameraPlan, Plan, VaeTile
from trt_wan.errors import MemoryShort
from trt_wan.runtime import pipeline
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.context.settings import LATENT, Context
from trt_wan.runtime.executors import Array, BlendPart
from trt_wan.runtime.guidance import Nag
from trt_wan.runtime.job import Inputs, Job, Load
from trt_wan.runtime.networks import vae
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.text_encoder import encode_texts
from trt_wan.runtime.networks.tokenizer import byte_tokenizer
from trt_wan.runtime.opening import activation_memory as rehearsal
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.residency import (
    BETWEEN_WINDOWS,
    BLOCK,
    CONTEXT_BYTES,
    Residency,
    passing_bytes,
    plan_residency,
    weight_bytes,
)
from trt_wan.runtime.references import References
from trt_wan.runtime.step_cache import Ratios, Residuals, StepCache
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.video.pictures import write_picture
from trt_wan.runtime.weights.random import RandomWeights
from trt_wan.runtime.weights.streaming import SLOTS

GB = 10**9
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int64": 8}


class Bytes:
    """Zeros that occupy the lowest gap they fit into until they are forgotten."""

    def __init__(self, executor: "Counting", shape: Sequence[int], dtype: str) -> None:
        self.shape = tuple(shape)
        size = max(256, math.ceil(math.prod(shape) * ITEM_BYTES[dtype] / 256) * 256)
        start = 0
        for low, high in executor.live:
            if low - start >= size:
                break
            start = high
        bisect.insort(executor.live, (start, start + size))
        executor.peak = max(executor.peak, start + size)
        weakref.finalize(self, executor.live.remove, (start, start + size))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.zeros(self.shape, dtype or np.float32)


class Counting:
    """An executor of zeros: what is not on its device is put there for as long as a call lasts."""

    def __init__(self) -> None:
        self.live: list[tuple[int, int]] = []
        self.peak = 0

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        held = [self._on_device(inputs[t.name], t.dtype) for t in network.inputs]
        outputs = [Bytes(self, t.shape, t.dtype) for t in network.outputs]
        assert len(held) == len(inputs)
        return cast(tuple[Array, ...], tuple(outputs))

    def place(self, array: Array) -> Array:
        return cast(Array, Bytes(self, array.shape, array.dtype.name))

    def combine(self, terms: Sequence[tuple[float, Array]]) -> Array:
        held = [self._on_device(term, "float32") for _, term in terms]
        return cast(Array, Bytes(self, held[0].shape, "float32"))

    def take(self, array: Array, slots: Sequence[int]) -> Array:
        held = self._on_device(array, "float32")
        return cast(Array, Bytes(self, (held.shape[0], len(slots), *held.shape[2:]), "float32"))

    def blend(self, slots: int, parts: Sequence[BlendPart], onto: Array | None = None) -> Array:
        ((_, _, array),) = parts
        shape = (array.shape[0], slots, *array.shape[2:])
        return cast(Array, Bytes(self, shape, "float32")) if onto is None else onto

    def put_rows(self, onto: Array, array: Array, start: int, stop: int) -> Array:
        return onto

    def is_finite(self, array: Array) -> bool:
        return True

    def fetch(self, array: Array) -> Callable[[], Array]:
        return lambda: np.asarray(array)

    def wait(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self, names: set[str]) -> None:
        pass

    def _on_device(self, value: Any, dtype: str) -> Bytes:
        return value if isinstance(value, Bytes) else Bytes(self, value.shape, dtype)


class BlankClip:
    frames = 2  # a clip of one frame would stand still

    def __init__(self, height: int, width: int) -> None:
        self.size = height, width

    def window(self, indices: Sequence[int]) -> Any:
        return np.zeros((len(indices), *self.size, 3), np.uint8)


def a_job(plan: Plan, steps: int, context: Context | None = None, **settings: Any) -> Job:
    inputs = Inputs(Path("ref"), Path("pose"), Path("face"))
    more = LATENT * settings["references"].latents if "references" in settings else 0
    window = plan.frames - more if context is None else Job.window
    return Job(inputs, window=window, overlap=1, steps=steps, context=context, **settings)


def counted(plan: Plan, job: Job, windows: int, more: int = 0, tile: VaeTile | None = None) -> int:
    """The peak of a whole job with all clips, through the pipeline that a GPU runs."""
    executor = Counting()
    weights = {part: RandomWeights(TINY, part, 0) for part in PARTS}
    model = Model(TINY, plan, executor, weights, tile)
    if job.acting_camera is not None:
        model.take(CameraPlan.beside(plan, TINY.camera.ffn_dim))
    tokenizer = byte_tokenizer(TINY.text.vocabulary, TINY.text.length)

    class Opened:
        def begin(self, job: Job, *_: Any) -> Model:
            return model

        def texts(self, model: Model, job: Job, progress: Any) -> dict[str, Array]:
            return dict(zip(job.texts, encode_texts(model, tokenizer, job.texts), strict=True))

    clip, face = BlankClip(plan.height, plan.width), BlankClip(512, 512)
    frames = job.video_window + (windows - 1) * (job.video_window - 1) + more
    blank = cast(Any, (clip, face, clip, clip))
    size = plan.width, plan.height
    reference = np.zeros((plan.height, plan.width, 3), np.uint8)
    clips = Clips(reference, *blank, *size, frames=frames, rate=Fraction(16))
    made = sum(window.shape[1] for window in pipeline.stream_pieces(job, Opened(), clips=clips))
    assert made == frames
    return executor.peak


STEPS = 8
PLANS = [Plan(64, 48, 5, "bf16"), Plan(16, 16, 33, "fp8"), Plan(128, 128, 13), Plan(256, 256, 9, "fp8")]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.width}x{p.height}x{p.frames}")


KINDS: list[dict[str, Any]] = [
    {},
    {"guidance": 3.0},
    {"nag": Nag("blurred")},
    {"prompt": "a | b | c | d", "guidance": 3.0, "nag": Nag("e | f | g | h"), "negative_prompt": "i|j|k|l"},
]


@each_plan
@pytest.mark.parametrize("settings", KINDS)
def test_the_rehearsal_is_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(rehearsal, "STEPS", 6)
    monkeypatch.setattr(rehearsal, "WINDOWS", 4)
    monkeypatch.setattr(rehearsal, "MARGIN", 0)
    job = a_job(plan, 6, **settings)
    assert activation_bytes(TINY, plan, job.load) == counted(plan, job, 4)


@pytest.mark.parametrize("plan", PLANS[:2], ids=lambda p: f"{p.width}x{p.height}x{p.frames}")
@pytest.mark.parametrize(("guidance", "render"), [(1.0, "orbit"), (3.0, "static")])
def test_the_rehearsal_of_a_camera_is_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, guidance: float, render: Any
) -> None:
    monkeypatch.setattr(rehearsal, "STEPS", 6)
    monkeypatch.setattr(rehearsal, "WINDOWS", 4)
    monkeypatch.setattr(rehearsal, "MARGIN", 0)
    job = a_job(plan, 6, guidance=guidance, camera=Camera(render))
    load = replace(job.load, camera_ffn=TINY.camera.ffn_dim)
    assert activation_bytes(TINY, plan, load) == counted(plan, job, 4)


def test_the_memory_of_a_camera_at_full_size() -> None:
    """Without guidance z and one block's features, beside which the VAE still needs more. With it those of 20
    blocks, [tokens, 1024] in bf16, which the second side adds.
    """
    plan = Plan(832, 480, 77, "fp8")
    alone, guided = (
        activation_bytes(ANIMATE_14B, plan, Load(4, guided=guided, camera_ffn=3072)) / GB
        for guided in (False, True)
    )
    assert [alone, guided] == pytest.approx([4.71, 5.82], abs=0.02), "4.70 and 5.15 without"
    assert 20 * plan.tokens * 1024 * 2 == pytest.approx(1.34 * GB, rel=0.01)
    contracts = networks(ANIMATE_14B, CameraPlan.beside(plan, 3072))
    bytes_of = weight_bytes(contracts)
    passing = bytes_of.pop("uni3c_modulation")
    assert [passing / GB, sum(bytes_of.values()) / GB] == pytest.approx([2.52, 0.33], abs=0.02)


@pytest.mark.parametrize("plan", [Plan(512, 144, 9, "fp8"), Plan(64, 320, 13)], ids=["wide", "tall"])
def test_the_rehearsal_of_tiles_is_the_pipeline(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(rehearsal, "WINDOWS", 4)
    monkeypatch.setattr(rehearsal, "MARGIN", 0)
    monkeypatch.setattr(vae, "SEGMENT", 1)  # caches leave the device, and come back
    job, tile = a_job(plan, 4), plan.vae_tile
    assert tile is not None
    needed = activation_bytes(TINY, plan, job.load, None, tile)
    assert needed == counted(plan, job, 4, tile=tile)
    assert needed < 0.9 * activation_bytes(TINY, plan, job.load)


@each_plan
@pytest.mark.parametrize(
    ("guidance", "steps", "windows"), [(1.0, 5, 1), (1.0, 7, 3), (3.0, 2, 1), (3.0, 9, 5), (1.0, 200, 1)]
)
def test_activation_bytes_do_for_every_job(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, guidance: float, steps: int, windows: int
) -> None:
    job = a_job(plan, steps, guidance=guidance)
    needed = counted(plan, job, windows)
    assert needed <= activation_bytes(TINY, plan, job.load) <= 1.03 * needed


@pytest.mark.parametrize("plan", PLANS[::3], ids=lambda p: f"{p.width}x{p.height}x{p.frames}")
@pytest.mark.parametrize(
    ("guidance", "more", "prompt"), [(1.0, 4, "a"), (3.0, 200, "a"), (3.0, 60, "a | b | c")]
)
def test_activation_bytes_do_for_context_windows(plan: Plan, guidance: float, more: int, prompt: str) -> None:
    """The whole latent, its fused velocity and one part, whatever the number of parts; all prompts."""
    job = a_job(plan, 5, Context(frames=plan.frames, overlap=4), guidance=guidance, prompt=prompt)
    needed = counted(plan, job, 1, more)
    planned = activation_bytes(TINY, plan, job.load, job.context_plan(plan.frames + more))
    assert needed <= planned <= 1.03 * needed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(3):
        write_picture(folder / f"{k}.png", np.zeros((16, 16, 3), np.uint8))
    return tuple(folder / f"{k}.png" for k in range(3))


@pytest.mark.parametrize(("use", "count"), [("prefix", 1), ("prefix", 4), ("slots", 4)])
def test_the_rehearsal_with_several_references_is_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, pictures: tuple[Path, ...], use: Any, count: int
) -> None:
    monkeypatch.setattr(rehearsal, "WINDOWS", 3)
    monkeypatch.setattr(rehearsal, "MARGIN", 0)
    references, plan = References(pictures[: count - 1], use), Plan(64, 48, 37, "bf16")
    job = a_job(plan, 4, references=references, guidance=3.0)
    assert job.model_window == plan.frames
    assert activation_bytes(TINY, plan, job.load) == counted(plan, job, 3)
    context = Context(frames=job.video_window, overlap=4)
    job, plan = a_job(plan, 4, context, references=references), Plan(64, 48, job.model_window, "bf16")
    planned = activation_bytes(TINY, plan, job.load, job.context_plan(job.video_window + 40))
    assert planned <= 1.03 * counted(plan, job, 1, 40) <= 1.06 * planned


def test_pictures_at_full_size_take_the_memory_of_their_slots() -> None:
    """The forecast of 77 frames with three more slots is that of 89 frames. One canvas takes no memory."""
    paths, plan = (Path("a"), Path("b"), Path("c")), Plan(832, 480, 89, "fp8")
    job = a_job(plan, 4, references=References(paths, "slots"))
    assert a_job(plan, 4, references=References(paths)).load == a_job(plan, 4).load
    with_slots = activation_bytes(ANIMATE_14B, plan, job.load)
    assert with_slots == pytest.approx(activation_bytes(ANIMATE_14B, plan, a_job(plan, 4).load), rel=0.01)


@pytest.mark.parametrize("more", [0, pytest.param(140, marks=pytest.mark.long)])
def test_activation_bytes_do_for_the_step_cache(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Residuals of both sides and all context windows, in whatever steps they are made. At full size, where
    they decide the peak.
    """
    plan = Plan(832, 480, 77 if more == 0 else 21, "fp8")
    context = Context(frames=plan.frames, overlap=4) if more else None
    cache, sides = StepCache(0.2, 3, 0.05), np.random.default_rng(1).uniform(0.9, 1.0, (2, 20)).tolist()
    sides = sides if more else [sides[0]] * 2
    job = a_job(plan, 20, context, guidance=3.0, step_cache=replace(cache, ratios=Ratios(*sides)))
    assert all(2 < sum(side[:STEPS]) < STEPS - 2 for side in job.skips)
    held = job.context_plan(plan.frames + more)
    planned, without = (
        activation_bytes(ANIMATE_14B, plan, load, held)
        for load in (job.load, replace(job.load, cached=False))
    )
    activation_bytes.cache_clear()
    steps = [side[:STEPS] for side in job.skips]
    monkeypatch.setattr(rehearsal, "STEPS", STEPS)
    monkeypatch.setattr(rehearsal, "MARGIN", 0)
    monkeypatch.setattr(rehearsal, "Residuals", lambda combine, _: Residuals(combine, steps))
    needed = activation_bytes(ANIMATE_14B, plan, job.load, held)
    activation_bytes.cache_clear()
    assert 1.05 * without < needed <= planned <= 1.03 * needed


def test_activation_bytes_grow_with_size_guidance_and_prompts() -> None:
    plans = [Plan(256, 256, 13), Plan(832, 480, 13), Plan(832, 480, 33), Plan(1280, 720, 33)]
    loads = [
        Load(4),
        Load(4, guided=True, contexts=2),
        Load(4, True, nag=True, contexts=3),
        Load(4, True, True, 9),
    ]
    sizes = [activation_bytes(TINY, plan, loads[1]) for plan in plans]
    kinds = [activation_bytes(TINY, plans[0], load) for load in loads]
    assert sizes == sorted(set(sizes)) and kinds == sorted(set(kinds))


def test_the_memory_of_prompts_at_full_size() -> None:
    """Keys and values of 40 blocks in bf16: 512 text tokens for each prompt, 257 image tokens once. Prompts
    that travel are held one at a time, however many they are, beside three sets of weights.
    """
    plan = Plan(832, 480, 77, "fp8")
    one, three = (activation_bytes(ANIMATE_14B, plan, Load(4, contexts=n)) for n in (1, 3))
    assert three - one == pytest.approx(2 * 40 * 512 * 5120 * 2 * 2, rel=0.05)
    travel = activation_bytes(ANIMATE_14B, plan, a_job(plan, 4, prompt="a | b | c | d").load)
    assert travel == pytest.approx(one, rel=0.05)
    contracts = networks(ANIMATE_14B, plan)
    spare = passing_bytes(contracts, BETWEEN_WINDOWS)
    assert spare == pytest.approx(3 * 4 * 5120**2, rel=0.01)
    fits = [
        plan_residency(ANIMATE_14B, contracts, one, GB, 1000 * GB, False, extra).total for extra in (0, spare)
    ]
    assert fits[1] - fits[0] == spare
    assert plan_residency(ANIMATE_14B, contracts, one, GB, fits[0], False, spare).streamed
    in_each_job = plan_residency(ANIMATE_14B, contracts, one, GB, 12 * GB, True)
    assert in_each_job.streamed and in_each_job.spare == passing_bytes(contracts) > spare, (
        "umT5's layers pass"
    )


def test_tiles_of_the_full_model_take_what_the_transformer_takes() -> None:
    """The peak of a job is a whole decoder's, or with tiles the transformer's: more tiles save nothing."""
    plan = Plan(832, 480, 77, "fp8")
    needed = [activation_bytes(ANIMATE_14B, plan, Load(4), None, tile) for tile in (None, plan.vae_tile)]
    assert [n / GB for n in needed] == pytest.approx([4.70, 3.51], abs=0.02)


def test_rehearsing_the_full_model_takes_little() -> None:
    """Of host memory mostly the face crops, 80 of 3 MB, which `encode_face` fills up and copies."""
    resident, start = _most_resident(), time.perf_counter()
    needed = activation_bytes(ANIMATE_14B, Plan(832, 480, 77, "fp8"), Load(4, True, contexts=2))
    assert 4 * GB < needed < 7 * GB
    assert time.perf_counter() - start < 2
    assert _most_resident() - resident < 450 << 20


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def planned(budget: float, precision: Precision = "fp8") -> Residency:
    plan = Plan(precision=precision)
    return plan_residency(ANIMATE_14B, networks(ANIMATE_14B, plan), 5 * GB, GB, int(budget))


def test_what_fits_stays() -> None:
    whole = planned(1000 * GB)
    assert whole.streamed == [] and whole.slots == 0
    assert planned(whole.total).streamed == []
    assert planned(whole.total - 1).streamed != []


def test_the_sizes_of_the_full_model() -> None:
    """model_spec.md 1.2: of a block, 8 of 12 linear layers' weights stay after the context is encoded."""
    packs = planned(planned(1000 * GB).total - 1).streamed
    block = 6 * 5120**2 + 2 * 5120 * 13824
    assert [(pack.network.name, pack.n) for pack in packs[-3:]] == [(name, 39) for name in BLOCK]
    assert sum(pack.size for pack in packs[-3:]) == pytest.approx(block, rel=0.004)
    fp8, bf16 = planned(1000 * GB), planned(1000 * GB, "bf16")
    assert bf16.resident - fp8.resident == pytest.approx(40 * block, rel=0.004)
    others = fp8.resident - 40 * block
    assert 1 * GB < others < 2.5 * GB  # the fusers in bf16, the motion encoder, the VAE


@pytest.mark.parametrize("share", [0.97, 0.8, 0.6, 0.4, 0.2, 0.0])
def test_as_many_blocks_stay_as_fit(share: float) -> None:
    whole = planned(1000 * GB)
    with pytest.raises(MemoryShort) as short:
        planned(0)
    least = float(short.value.hint.split()[2].rstrip(",")) * GB
    budget = int(least + share * (whole.total - least))
    residency = planned(budget)
    streamed = residency.streamed
    names = [(name, n) for n in range(40) for name in BLOCK]
    assert [(pack.network.name, pack.n) for pack in streamed] == names[len(names) - len(streamed) :]
    assert residency.total <= budget
    assert residency.resident + sum(pack.size for pack in streamed) == whole.resident
    assert residency.slots == SLOTS * max(pack.size for pack in streamed)
    if len(streamed) < len(names):
        block = sum(pack.size for pack in streamed[: len(BLOCK)])
        assert residency.total + block > budget


def test_the_budget_that_memory_short_names_suffices_and_little_less_does_not() -> None:
    with pytest.raises(MemoryShort) as short:
        planned(3 * GB - CONTEXT_BYTES)
    assert "3.0 GB are to be used" in short.value.message
    named = float(short.value.hint.split()[2].rstrip(","))
    assert len(planned(named * GB - CONTEXT_BYTES).streamed) == 120
    with pytest.raises(MemoryShort):
        planned((named - 0.2) * GB - CONTEXT_BYTES)
