"""From a job's settings to a model that runs: executor, precision, candidates, memory, each with its reason.

Everything is decided before the first stage. On a GPU, TensorRT-RTX engines that are missing or damaged are
built on the spot; a second each at most.
"""

from collections.abc import Mapping

from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.choice.candidates import Candidate, Engine, Machine, candidates, tiers
from trt_wan.engines.choice.choose import choose, figures_of
from trt_wan.engines.choice.recipes import Recipe, recipes_here
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.engines.tensorrt import Flavour, choose_flavour
from trt_wan.errors import EnvironmentBroken, UsageError
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor, require_memory
from trt_wan.runtime.job import Job, Settings
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.tokenizer import Tokenizer, byte_tokenizer
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.residency import BEFORE_THE_STEPS, plan_residency
from trt_wan.runtime.opening.segments import machine_of, missing, open_segments
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.weights.checkpoint import load_weights
from trt_wan.runtime.weights.find_tokenizer import find_tokenizer
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.random import RandomWeights
from trt_wan.runtime.weights.sources import FileSource, RandomSource, WeightSource

RANDOM_SEED = 0
HostWeights = Mapping[Part, Mapping[str, Array]]
FP8_CAPABILITY = (8, 9)


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
        config, checkpoints = load_weights([job.weights], job.weight_files)
        weights, source = checkpoints, FileSource(checkpoints)
        tokenizer = find_tokenizer(
            job.tokenizer, [job.weights], checkpoints["text_encoder"], config.text.length
        )
    place = open_gpu(job.settings, progress)
    precision = choose_precision(job.settings, place[0] if place else None)
    plan = Plan(clips.width, clips.height, job.window, precision)
    if place is None:
        if job.settings.segments:
            raise UsageError("ONNX Runtime on the CPU has no candidates.", "Leave --segment out.")
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
    machine = machine_of(gpu, flavour)
    recipes = recipes_here(config, plan, machine)
    chosen = choose_segments(config, plan, machine, recipes, settings, progress)
    passing = set(BEFORE_THE_STEPS)
    executor = GpuExecutor(gpu, open_segments(chosen, config, plan, gpu, flavour, recipes, progress))
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
    held = DeviceWeights(gpu, source, passing)
    held.plan(residency.streamed)
    executor.start(arena, held)
    return model


def choose_segments(
    config: ModelConfig,
    plan: Plan,
    machine: Machine,
    recipes: Mapping[Engine, Recipe],
    settings: Settings,
    progress: Progress,
) -> dict[str, Candidate]:
    """The candidate for every network; says which and why where there is a choice."""
    if settings.tier not in tiers(plan.precision):
        raise UsageError(
            f"The tier {settings.tier} needs FP8; the precision is {plan.precision}.", "Use --tier exact."
        )
    chosen = {}
    for network in networks(config, plan):
        rows = candidates(network, plan.precision, machine)
        engines = [recipes[row.engine].engine for row in rows if row.engine is not None]
        choice = choose(
            network,
            plan.precision,
            settings.tier,
            machine,
            figures_of(engines, machine),
            lambda row: missing(row, machine.capability),
            settings.segments.get(network),
        )
        if len(rows) > 1:
            progress(Note(choice.text))
        chosen[network] = choice.candidate
    return chosen
