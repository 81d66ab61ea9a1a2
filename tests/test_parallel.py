"""Several ranks against one, on ONNX Runtime: forwards of the transformer, and whole jobs.

Ranks are threads here, and test_gpus.py has processes.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import MakeModel, Weights
from lora_files import FAMILIES
from ranks_in_threads import at_once, connected
from test_transformer import random_inputs
from tiny_job import PLAN, prepare, write_reference, write_sound

from trt_wan.build.export import export
from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan, ShardPlan
from trt_wan.engines.store.graphs import graph_set
from trt_wan.errors import UsageError
from trt_wan.runtime.camera import Camera
from trt_wan.runtime.colour import Anchor, Colour
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.events import silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.guidance import Nag
from trt_wan.runtime.job import Inputs, Job, Lora
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import (
    WindowCondition,
    embed_image,
    encode_context,
    encode_face,
    encode_time,
    rope_tables,
    velocity,
)
from trt_wan.runtime.opening.model import OpenModel, open_basis
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.sequence import HostSequence
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.pipeline import Keep
from trt_wan.runtime.references import References
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.step_cache import Ratios, StepCache
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.runtime.window_state import WindowState

TOLERANCE = 1e-5  # fp32; values of order 1


GraphsOf = Callable[[ShardPlan], Path]
Undivided = Callable[[Plan], tuple[Model, dict[str, Array], list[Any]]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    made = random_weights(TINY, "transformer", seed=1)
    return {"transformer": made | {ORTHONORMAL: orthonormal(made[DIRECTION])}}


def forwards(model: Model, inputs: dict[str, Array]) -> list[Any]:
    """Velocities of one latent: with a face, without, with NAG, with a second picture, block-sparse."""
    one, rank = np.ones(1, np.float32), model.ranks
    face = encode_face(model, inputs["face"])
    image = embed_image(model, inputs["image"])
    context, away = (
        encode_context(model, text, image) for text in (inputs["text"], np.negative(inputs["text"]))
    )
    number = [np.array([value], np.float32) for value in (4, 1.5, 0.5)]
    nag = [(*layer, *other[:2], *number) for layer, other in zip(context, away, strict=True)]
    time = encode_time(model, 500)
    window = WindowCondition(inputs["condition"], inputs["pose"], one, face, one)
    ropes = [rope_tables(TINY, model.plan, pictures) for pictures in (0, 1)]
    if model.sequence is not None:
        ropes = [(model.sequence.split(cos), model.sequence.split(sin)) for cos, sin in ropes]

    def run(context: Any, window: WindowCondition, rope: Any = ropes[0], **more: Any) -> Array:
        assert rank is model.ranks
        return np.array(velocity(model, inputs["latent"], time, context, window, rope, **more))

    return [
        run(context, window),
        run(context, replace(window, face=None)),
        run(nag, window, cross_attention="cross_attention_nag"),
        run(context, replace(window, pictures=1), ropes[1]),
        run(context, window, keep=np.array([0.5], np.float32)),
    ]


@pytest.fixture(scope="module")
def undivided(make_model: MakeModel, weights: Weights) -> Undivided:
    """undivided(plan): a whole model, inputs, and its forwards."""

    @cache
    def made(plan: Plan) -> tuple[Model, dict[str, Array], list[Any]]:
        whole, inputs = make_model(TINY, plan, weights), random_inputs(plan, seed=1)
        return whole, inputs, forwards(whole, inputs)

    return made


def rank_model(whole: Model, weights: Weights, graphs: Path, ranks: Ranks) -> Model:
    """A rank's model, with the graphs of `whole` beside those of its share."""
    share = ShardPlan.of(whole.plan, ranks.count)
    exported: Any = whole.executor
    executor = OnnxRuntimeExecutor(exported.graphs, BoundWeights(weights))
    executor.add(graphs, networks(TINY, share))
    model = Model(TINY, whole.plan, executor, weights, ranks=ranks)
    model.take(share)
    model.sequence = HostSequence(ranks, Shards.of(TINY, share))
    return model


@pytest.fixture(scope="module")
def graphs_of(home_of_ranks: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> GraphsOf:
    """graphs_of(share): a folder with its graphs. Those of equal networks are exported once: of one rank,
    which are the whole ones, and of several numbers of ranks with equally many tokens and heads.
    """
    made: list[tuple[Network, Path]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(home_of_ranks(2)))
        for plan in (PLAN, ShardPlan.of(PLAN, 2)):
            folder = graph_set(TINY, plan).require()
            made += [(each, folder / f"{name}.onnx") for name, each in networks(TINY, plan).items()]

    def graphs(share: ShardPlan) -> Path:
        folder = tmp_path_factory.mktemp("graphs")
        for name, network in networks(TINY, share).items():
            path = folder / f"{name}.onnx"
            if ready := next((found for each, found in made if each == network), None):
                shutil.copy(ready, path)
            else:
                export(network, TINY, share, path)
                made.append((network, path))
        return folder

    return graphs


long = pytest.mark.long
SIZES = [(64, 48, 13), (64, 96, 5), (112, 48, 13), (48, 32, 77)]  # of test_transformer.py


@pytest.mark.parametrize(
    ("size", "count"),
    [
        pytest.param(size, count, marks=() if size == SIZES[0] and count != 3 else long)
        for size in SIZES
        for count in (1, 2, 3, 4, 5)  # TINY has two heads. Of 12 tokens the last of 5 ranks has none.
    ],
)
def test_the_velocity_of_ranks_is_that_of_one(
    undivided: Undivided, weights: Weights, graphs_of: GraphsOf, size: tuple[int, int, int], count: int
) -> None:
    plan = Plan(*size)
    whole, inputs, alone = undivided(plan)
    others = alone[:4]  # attention over one block of tokens is dense
    apart = [np.abs(a - b).max() for k, a in enumerate(others) for b in others[:k]]
    assert min(apart) > TOLERANCE, "two of the forwards are the same"
    graphs = graphs_of(ShardPlan.of(plan, count))
    with connected(count) as all_ranks:
        models = [rank_model(whole, weights, graphs, ranks) for ranks in all_ranks]
        for made in at_once([partial(forwards, model, inputs) for model in models]):
            for ours, expected in zip(made, alone, strict=True):
                assert np.abs(ours - expected).max() <= TOLERANCE


# --- Whole jobs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(home_of_ranks: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """weights/, clips/ and a LoRA."""
    base = tmp_path_factory.mktemp("jobs")
    prepare(base / "clips", write_sound(base / "tone.m4a", 1))
    write_reference(base / "other.png", (40, 70))
    write_tiny_weights(base / "weights", seed=5)
    FAMILIES["high_noise"]().save(base / "lora.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(home_of_ranks(2)))
        yield base


Models = list[OpenModel]
Opened = Callable[[int], Models]


@pytest.fixture(scope="module")
def opened(place: Path, home_of_ranks: Callable[[int], Path]) -> Iterator[Opened]:
    """opened(count): the models of all ranks, which stay open for all jobs."""
    files = WeightFiles((place / "weights",))
    made: dict[int, Models] = {}

    def models(count: int) -> Models:
        if count not in made:
            if count > 2:
                home_of_ranks(count)
            settings = Settings(executor="onnxruntime", text_cache=False, gpus=count)
            made[count] = [
                held.enter_context(open_basis(files, settings, silent).open(ranks=ranks))
                for ranks in held.enter_context(connected(count))
            ]
        return made[count]

    with ExitStack() as held:
        yield models


def frames(models: Models, task: Job, keep: Keep | None = None, **more: Any) -> Array:
    """The frames of rank 0. Others have none."""

    def run(rank: int) -> list[Array]:
        return list(models[rank].pieces(task, keep=None if rank else keep, **more))

    first, *others = at_once([partial(run, rank) for rank in range(len(models))])
    assert not any(others)
    return np.concatenate(first, axis=1)


def job(place: Path, **changes: Any) -> Job:
    """Two windows. Most have no face clip, which takes most of the time."""
    inputs = Inputs.from_folder(place / "clips", changes.get("mode", "animate"))
    if not changes.pop("face", False):
        inputs = replace(inputs, face=None)
    return Job(inputs, **{"window": PLAN.frames, "steps": 2, "seed": 7} | changes)


def ratios(*sides: int) -> StepCache:
    """Of which a few steps in a row are skipped, not the same ones on both sides."""
    made = [tuple(1.01 if (step + side) % 5 else 1.5 for step in range(15)) for side in sides]
    return StepCache(0.06, ratios=Ratios(*made))


CONTEXT = {"context": Context(frames=13, overlap=4), "window": Job.window}  # two parts
JOBS: dict[str, tuple[dict[str, Any], str]] = {  # settings, and the split of two ranks
    "animate": ({"face": True}, "tokens"),
    "replace": ({"mode": "replace", "face": True, "overlap": 5}, "tokens"),
    "guided": ({"guidance": 3.0}, "sides"),
    "guided first": ({"guidance": (3.0, 1.0, 1.0), "steps": 3, "cfg_zero_star": True}, "tokens"),
    "context": (CONTEXT, "windows"),
    "guided context": (CONTEXT | {"guidance": 3.0, "face": True}, "windows"),
    "context that moves": (
        CONTEXT | {"context": Context("uniform_looped", frames=13, overlap=4), "steps": 3},
        "windows",
    ),
    "nag": ({"nag": Nag("blurred", scale=4, tau=1.5, alpha=0.5)}, "tokens"),
    "step cache": ({"steps": 15, "step_cache": ratios(0)}, "tokens"),
    "guided step cache": ({"steps": 15, "step_cache": ratios(0, 1), "guidance": 3.0}, "sides"),
    "context step cache": (CONTEXT | {"steps": 15, "step_cache": ratios(0)}, "windows"),
    "prompts": ({"prompt": "he walks | he sits"}, "tokens"),
    "slots": ({"references": "slots", "window": 9}, "tokens"),
    "prefix": ({"references": "prefix", "window": 5}, "tokens"),
    **{
        f"colours of {anchor}": ({"colour": Colour("mkl", 1.0, anchor)}, "tokens")
        for anchor in get_args(Anchor)
    },
    "lora": ({"loras": "lora.safetensors"}, "tokens"),
    "noise in the steps": ({"sampler": "lcm", "steps": 3}, "tokens"),
}
IN_CI = {"replace", "guided step cache", "context", "slots"}


def settled(place: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """With the files of the place."""
    made = dict(changes)
    if use := changes.get("references"):
        made["references"] = References((place / "other.png",) if use == "slots" else (), use)
    if lora := changes.get("loras"):
        made["loras"] = (Lora(place / lora),)
    return made


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(name, count, marks=() if count == 2 and name in IN_CI else long)
        for name in JOBS
        for count in (2, 3, 4)
    ],
)
def test_a_job_has_the_bits_of_one_process(place: Path, opened: Opened, name: str, count: int) -> None:
    changes, split = JOBS[name]
    task = job(place, **settled(place, changes))
    expected = frames(opened(1), task)
    assert expected.std() > 0.05
    np.testing.assert_array_equal(frames(opened(count), task), expected)
    if count == 2:
        sizes: list[Any] = [model._sizes for model in opened(2)]
        assert split in {made.split for each in sizes for made in each._models.values()}


def test_a_job_goes_on_after_a_window_on_any_number_of_ranks(place: Path, opened: Opened) -> None:
    task = job(place, steps=1, colour=Colour("mkl"))
    states: list[WindowState] = []
    whole = frames(opened(2), task, keep=states.append)
    assert [state.done for state in states] == [1, 2]
    for count in (1, 2):
        rest = frames(opened(count), task, begin_from=states[0])
        np.testing.assert_array_equal(rest, whole[:, PLAN.frames :])


def test_ranks_of_different_ages_remember_different_things(place: Path, opened: Opened) -> None:
    """A process that was started again remembers nothing."""
    task = job(place, steps=1)
    expected = frames(opened(2), task)
    np.testing.assert_array_equal(frames(opened(2), task), expected)
    younger: Any = opened(2)[1]._sizes
    for model in younger._models.values():
        model._remembered.clear()
    np.testing.assert_array_equal(frames(opened(2), task), expected)


def test_what_takes_all_tokens_is_refused_before_anything_is_opened(place: Path) -> None:
    files = WeightFiles((place / "weights",))
    basis = open_basis(files, Settings(executor="onnxruntime", gpus=2), silent)
    camera = {"camera": Camera("orbit"), "steps": 2}
    with pytest.raises(UsageError, match="--camera cannot be split over 2 GPUs") as refused:
        basis.split(job(place, **camera), 20)
    assert "--guidance above 1" in refused.value.hint
    guided = basis.split(job(place, **camera, guidance=2.0), 20)
    assert guided is not None and guided.split == "sides"
    plain = basis.split(job(place), 20)
    assert plain is not None and plain.text == "2 GPUs: every forward is split by tokens."  # no GPU, no speed
