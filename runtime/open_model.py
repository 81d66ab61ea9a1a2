"""From a job's settings to a model that runs: executor, precision, engines and memory, each with its reason.

Everything is decided before the first stage. On a GPU, TensorRT-RTX engines that are missing or damaged are
built on the spot; a second each at most.
"""

from collections.abc import Mapping
from typing import Any

from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.engine_id import GpuKind
from trt_wan.engines.engine_store import ensure, open_checked
from trt_wan.engines.plan import Plan
from trt_wan.engines.precision import PRECISIONS, Precision
from trt_wan.engines.recipes import ATTENTION_FP8, Recipe, recipes
from trt_wan.engines.store import home, require_graphs
from trt_wan.engines.tensorrt import Flavour, Target, choose_flavour
from trt_wan.errors import EnvironmentBroken, UsageError
from trt_wan.runtime.checkpoints.find_tokenizer import find_tokenizer
from trt_wan.runtime.checkpoints.loading import load_weights
from trt_wan.runtime.checkpoints.random_weights import RandomWeights
from trt_wan.runtime.clips import Clips
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.sources import FileSource, RandomSource
from trt_wan.runtime.device.weights import DeviceWeights, WeightSource
from trt_wan.runtime.engine_segment import open_engines
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor, require_memory
from trt_wan.runtime.job import Job, Settings, Tier
from trt_wan.runtime.model import Model
from trt_wan.runtime.rehearsal import activation_bytes
from trt_wan.runtime.residency import BEFORE_THE_STEPS, plan_residency
from trt_wan.runtime.tokenizer import Tokenizer, byte_tokenizer

RANDOM_SEED = 0
HostWeights = Mapping[Part, Mapping[str, Array]]
FP8_CAPABILITY = (8, 9)

# Where the engine for the GPU that is there loses against one for a named target (docs/log.md: bf16 attention
# does not build for the H200 itself and takes 78 ms built for SM89). By compute capability and network.
BETTER_TARGETS: dict[tuple[tuple[int, int], str], Target] = {((9, 0), "attention"): "sm89"}


def open_job(job: Job, clips: Clips, guided: bool, progress: Progress) -> tuple[Model, Tokenizer]:
    """The model for a job's clips, and the tokenizer of its text encoder."""
    weights: HostWeights
    source: WeightSource
    if job.random_weights is not None:
        config = MODELS[job.random_weights]
        weights = {part: RandomWeights(config, part, RANDOM_SEED) for part in PARTS}
        source = RandomSource(RANDOM_SEED)
        tokenizer = byte_tokenizer(config.text.vocabulary, config.text.length)
        progress(Note("The weights are random, so the picture is noise."))
    else:
        config, checkpoints = load_weights(job.weights, job.weight_files)
        weights, source = checkpoints, FileSource(checkpoints)
        tokenizer = find_tokenizer(
            job.tokenizer, job.weights, checkpoints["text_encoder"], config.text.length
        )
    place = open_gpu(job.settings, progress)
    precision = choose_precision(job.settings, place[0] if place else None)
    plan = Plan(clips.width, clips.height, job.window, precision)
    if place is None:
        return open_on_cpu(config, plan, weights), tokenizer
    return open_on_gpu(config, plan, *place, source, weights, job.settings, guided, progress), tokenizer


def open_gpu(settings: Settings, progress: Progress) -> tuple[Gpu, Flavour] | None:
    """The GPU and its TensorRT, or None if the job runs on the CPU; says which and why."""
    if settings.executor == "onnxruntime":
        return None
    try:
        gpu = Gpu()
        flavour = choose_flavour(settings.flavour, gpu.capability)
    except EnvironmentBroken as error:
        if settings.executor == "tensorrt":
            raise
        progress(Note(f"executor = onnxruntime on the CPU ({error.message})"))
        return None
    progress(Note(f"executor = {flavour.name} {flavour.version} on {gpu.name} ({flavour.reason})"))
    return gpu, flavour


def choose_precision(settings: Settings, gpu: Gpu | None) -> Precision:
    """FP8 where the GPU has it, else bf16; float32 on the CPU, where nothing else runs."""
    if gpu is None:
        if settings.precision not in (None, "fp32"):
            raise UsageError(
                f"ONNX Runtime on the CPU runs fp32, not {settings.precision}.", "Leave --precision out."
            )
        return "fp32"
    if settings.precision is not None:
        return settings.precision
    return "fp8" if gpu.capability >= FP8_CAPABILITY else "bf16"


def open_on_cpu(config: ModelConfig, plan: Plan, weights: HostWeights) -> Model:
    require_memory(config, plan)
    return Model(config, plan, OnnxRuntimeExecutor(require_graphs(config, plan), weights), weights)


def open_on_gpu(
    config: ModelConfig,
    plan: Plan,
    gpu: Gpu,
    flavour: Flavour,
    source: WeightSource,
    weights: HostWeights,
    settings: Settings,
    guided: bool,
    progress: Progress,
) -> Model:
    """`weights` are what the host itself reads of them, `source` fills the GPU."""
    plans = engine_plans(config, plan, gpu, flavour, settings.tier, progress)
    passing = set(BEFORE_THE_STEPS)
    executor = GpuExecutor(gpu, open_engines(gpu, flavour, plans, home() / "kernels" / flavour.name))
    model = Model(config, plan, executor, weights)
    budget = gpu.free_bytes() if settings.vram is None else int(settings.vram * 1e9)
    arena = activation_bytes(config, plan, guided)
    residency = plan_residency(config, model.networks, arena, executor.scratch_bytes, budget)
    if residency.streamed:
        total = config.transformer.layers
        progress(
            Note(
                f"{len(residency.streamed) // 2} of {total} blocks stream from host memory "
                f"({budget / 1e9:.1f} GB)"
            )
        )
    executor.start(arena, DeviceWeights(gpu, source, residency.streamed, passing))
    return model


def engine_plans(
    config: ModelConfig, plan: Plan, gpu: Gpu, flavour: Flavour, tier: Tier, progress: Progress
) -> dict[str, bytes]:
    """The engine of every network, from the store or built now."""
    kind = GpuKind(gpu.name, gpu.driver)
    made = recipes(config, plan, "current", flavour, kind)
    if tier == "fast":
        if not PRECISIONS[plan.precision].fp8:
            raise UsageError(
                f"The tier fast needs FP8; the precision is {plan.precision}.", "Use --tier exact."
            )
        made["attention"] = made[ATTENTION_FP8]
    made.pop(ATTENTION_FP8, None)
    for (capability, name), target in BETTER_TARGETS.items():
        if capability == gpu.capability and name in made and not (name == "attention" and tier == "fast"):
            if flavour.name == "tensorrt_rtx":
                made[name] = recipes(config, plan, target, flavour)[name]
    return {name: _plan(recipe, progress) for name, recipe in made.items()}


def _plan(recipe: Recipe, progress: Progress) -> bytes:
    manifest, built = ensure(recipe.engine, lambda: recipe.compile(_ignore))
    if built:
        progress(Note(f"built {recipe.engine.title} in {manifest.build_seconds:.1f} s"))
    return open_checked(recipe.engine)


def _ignore(*progress: Any) -> None:
    """A run reports an engine when it is built, not while."""
