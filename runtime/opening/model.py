"""A model that stays open: weights, engines and memory for any number of jobs, one after another.

    with open_model(WeightFiles(folders=(Path("models"),)), Settings()) as model:
        for frame in model.stream(job):
            ...

Weights belong to the model. Segments belong to a size: they are opened when a job first needs that size and
are kept. The arena and the scratch are shared by all sizes and grow with the largest job. Each decision
(executor, precision, candidates, streaming) is reported with its reason. On a GPU, missing TensorRT-RTX
engines are built on the spot.
"""

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from trt_wan.engines.checkpoint import LYNX_PARTS, PARTS
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import GRAPHS_VERSION, networks
from trt_wan.engines.flavour import Flavour, choose_flavour
from trt_wan.engines.lynx import Lynx, lynx_plans
from trt_wan.engines.precision import Precision, best_precision, require_fp8
from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan
from trt_wan.errors import EnvironmentBroken, UsageError, shown
from trt_wan.runtime.closing import Closing
from trt_wan.runtime.conditioning import Pixels
from trt_wan.runtime.context.parts import ContextPlan
from trt_wan.runtime.device.driver import has_nvidia_gpu
from trt_wan.runtime.device.gpu import Gpu, device_count
from trt_wan.runtime.events import Note, Progress, StageStarted, silent
from trt_wan.runtime.executors import Array, Observe
from trt_wan.runtime.executors.onnxruntime import require_memory
from trt_wan.runtime.finite import Broken, explained, is_finite
from trt_wan.runtime.job import Job, Load, Lora
from trt_wan.runtime.loras.lora_file import open_lora
from trt_wan.runtime.loras.loras import Loras
from trt_wan.runtime.networks.model import ALONE, Model
from trt_wan.runtime.networks.text_encoder import encode_texts
from trt_wan.runtime.networks.tokenizer import Tokenizer, byte_tokenizer
from trt_wan.runtime.opening.cpu_sizes import CpuSizes
from trt_wan.runtime.opening.gpu_sizes import (
    ExportTiles,
    GpuSizes,
    build_engines,
    chosen_candidates,
    require_tier,
)
from trt_wan.runtime.opening.lynx import LynxSearch, acting_adapters
from trt_wan.runtime.parallel.group import Group
from trt_wan.runtime.parallel.planner import Choice, choose_split
from trt_wan.runtime.parallel.ranks import RankLost, Ranks
from trt_wan.runtime.parallel.relay import empty_copy, giving
from trt_wan.runtime.parallel.trace import traced
from trt_wan.runtime.pipeline import Keep, ShouldStop, stream_pieces, to_pixels
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.step_ratios import with_ratios
from trt_wan.runtime.text_cache import TextCache
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.weights.camera_weights import CameraWeights
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.find_tokenizer import find_tokenizer
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.random import RandomWeights
from trt_wan.runtime.weights.sources import FileSource, RandomSource, WeightSource
from trt_wan.runtime.weights.stored import Tensors
from trt_wan.runtime.window_state import WindowState

RANDOM_SEED = 0
MOST_EXPANSION = 18  # tokens of a character: U+FDFA becomes 18 letters
HostWeights = Mapping[Part, Mapping[str, Array]]
TEXT_ENCODER = "text_encoder_layer"
IMAGE_ENCODER = ["image_encoder_embed", "image_encoder_layer"]
MOST_TEXTS = 16  # encoded at a time: more would take more memory than the contexts, for which there is room


class Sizes(Protocol):
    """The model at every size that jobs have asked for."""

    @property
    def numerics(self) -> tuple[str, ...]:
        """Names everything beside weights and graphs that decides the bits of a result."""
        ...

    def begin(
        self,
        plan: Plan,
        load: Load,
        context: ContextPlan | None,
        skip: Collection[str],
        progress: Progress,
        ranks: Ranks = ALONE,
        share: ShardPlan | None = None,
    ) -> Model:
        """The model at a size, with memory for a job. The job does not run the networks `skip`; `context` is
        of its longest window. `share` is a rank's part of a job that is split by tokens.
        """
        ...

    def take(self, parts: Mapping[Part, Tensors]) -> None:
        """Takes the weights of parts that are no part of every model. Call between jobs, before `begin`."""
        ...

    def change(self, transformer: Tensors, changed: Collection[str]) -> None:
        """Takes the transformer's weights from `transformer`, which differs in the tensors `changed`. Call
        between jobs, before `begin`.
        """
        ...

    def abandon(self) -> None:
        """Ends all waits for other ranks, of which one is lost. Any thread may call it."""
        ...

    def resume(self) -> None:
        """Call in the thread that computes next."""
        ...

    def close(self) -> None:
        """Frees everything."""
        ...


@dataclass(frozen=True)
class OpenWeights:
    """Weights of every part, and the tokenizer. `source` fills a GPU, the CPU reads `host`. Those of `camera`
    are looked for when a job first needs them.
    """

    config: ModelConfig
    host: HostWeights
    source: WeightSource
    tokenizer: Tokenizer
    camera: CameraWeights
    tokenizer_file: Path | None = None  # None: inside the text encoder's file, or made for random weights
    lynx: LynxSearch = field(default_factory=LynxSearch)

    @property
    def files(self) -> dict[str, tuple[Path, ...]]:
        """By part, and for the tokenizer. Random weights have none."""
        found: dict[str, tuple[Path, ...]] = {
            part: tuple(sorted({entry.file for entry in weights.file.entries.values()}))
            for part, weights in self.host.items()
            if isinstance(weights, Checkpoint)
        }
        if self.tokenizer_file is not None:
            found["tokenizer"] = (self.tokenizer_file,)
        return found

    @property
    def text_files(self) -> tuple[Path, ...]:
        """The files of text encoder and tokenizer; none for random weights."""
        files = self.files
        return tuple(sorted({*files.get("text_encoder", ()), *files.get("tokenizer", ())}))

    @property
    def transformer(self) -> Tensors:
        tensors: Any = self.host["transformer"]
        return cast(Tensors, tensors)

    def load_of(self, job: Job, progress: Progress) -> Load:
        """Raises WeightsError for a job with a camera or a face whose weights are not there, UsageError for a
        face that no adapter could take.
        """
        load = job.load
        if job.acting_camera is not None:
            load = replace(load, camera_ffn=self.camera.opened(progress).ffn_dim)
        if job.acting_identity is not None:
            load = replace(load, lynx=self.lynx.adapters(self.config, job.acting_identity))
        return load

    def files_of(self, job: Job) -> dict[str, tuple[Path, ...]]:
        """`files`, with those of Uni3C for a job with a camera, and of the adapters that act for one with a
        face.
        """
        found = self.files
        if job.acting_camera is not None and self.camera.files:
            found["camera_control"] = self.camera.files
        if job.acting_identity is not None and not self.lynx.random:
            adapters = self.lynx.adapters(self.config, job.acting_identity)
            used = {"lynx_ip": adapters.ip, "lynx_resampler": adapters.ip, "lynx_ref": adapters.ref}
            parts = self.lynx.files(self.config).parts
            found |= {part: (checkpoint.path,) for part, checkpoint in parts.items() if used[part]}
        return found

    def require_no_loras_of_noise(self, loras: Sequence[Lora]) -> None:
        if loras and isinstance(self.source, RandomSource):
            raise UsageError(
                "Random weights take no LoRA.", "Name files with --weights DIR, or leave --lora out."
            )


def open_model(
    weights: WeightFiles,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    progress: Progress = silent,
    observe: Observe | None = None,
) -> "OpenModel":
    """Opens the files and the GPU. Raises TrtWanError. `observe` wraps the executor of every size."""
    return open_basis(weights, settings, progress).open(observe)


@dataclass(frozen=True)
class Basis:
    """All that is decided before a size is known: weights, GPU and precision, checked against each other."""

    weights: OpenWeights
    place: tuple[Gpu, Flavour] | None  # None: the CPU
    precision: Precision
    settings: Settings
    files: WeightFiles

    def open(
        self,
        observe: Observe | None = None,
        export_tiles: ExportTiles | None = None,
        ranks: Ranks | None = None,
    ) -> "OpenModel":
        """Call when nothing else takes GPU memory: the model counts the free bytes. `export_tiles` is called
        for a job that fits with the VAE in tiles alone; without it such a job raises MemoryShort where the
        tile's graphs are missing. `ranks` are those of a process that another one has started.
        """
        opened = self.weights
        sizes: Sizes
        if self.place is None:
            sizes = CpuSizes(opened.config, opened.host, observe, self.settings.gpus)
        else:
            config, host, source = opened.config, opened.host, opened.source
            sizes = GpuSizes(*self.place, config, host, source, self.settings, observe, export_tiles)
        start = (
            partial(Group, self.files, self.settings) if ranks is None and self.settings.gpus > 1 else None
        )
        return OpenModel(opened, self.precision, sizes, self.settings, ranks or ALONE, start)

    def require_loras(self, loras: Sequence[Lora]) -> None:
        """Raises WeightsError, from their headers, for LoRAs that this model cannot take."""
        self.weights.require_no_loras_of_noise(loras)
        for lora in loras:
            open_lora(lora.file, self.weights.config)

    def beside(self, plan: Plan, job: Job, progress: Progress = silent) -> tuple[Plan, ...]:
        """The networks that the job has beside the model's at the shape `plan`: a rank's, Uni3C's, Lynx's.
        Raises as `load_of`.
        """
        load = self.weights.load_of(job, progress)
        camera = (CameraPlan.beside(plan, load.camera_ffn),) if load.camera_ffn else ()
        return (*self._share(plan, job), *camera, *(() if load.lynx is None else lynx_plans(plan, load.lynx)))

    def _share(self, plan: Plan, job: Job) -> tuple[ShardPlan, ...]:
        """The share of a GPU, if there are several and the steps may be split by tokens."""
        count = self.settings.gpus
        if count == 1 or _take_all_tokens(job):
            return ()
        if job.context is None and split_of(job, None, count).split != "tokens":
            return ()
        return (ShardPlan.of(plan, count),)

    def split(self, job: Job, frames: int) -> Choice | None:
        """How the GPUs share the steps of a job over clips of that many frames; None for one GPU. Raises
        UsageError for a job that cannot be shared.
        """
        if self.settings.gpus == 1:
            return None
        context = job.context_plan(job.windows(frames).length(0))
        return split_of(job, context, self.settings.gpus, self.place is not None)

    def with_ratios(self, job: Job, progress: Progress) -> Job:
        """`job` with the ratios of its step cache. Raises as step_ratios.py."""
        return _with_ratios(job, self.weights, progress)

    def require_possible(self, plan: Plan) -> None:
        """Raises MemoryShort if no job of that shape fits in this machine's memory."""
        if self.place is None:
            require_memory(self.weights.config, plan, self.settings.gpus)

    def choices(self, plan: Plan, job: Job) -> dict[str, str]:
        """The executor, and on a GPU the tier and the candidate of every network at that shape. Its graphs
        must exist.
        """
        if self.place is None:
            return {"executor": "onnxruntime"}
        gpu, flavour = self.place
        chosen: dict[str, str] = {}
        for each in self._chosen(plan, job):
            chosen |= chosen_candidates(self.weights.config, each, gpu, flavour, self.settings)
        keep, gpus = self.settings.keep, self.settings.gpus
        more = {} if keep is None else {"attention_keep": f"{keep:g}"}
        more |= {} if gpus == 1 else {"gpus": str(gpus)}
        return {"executor": flavour.name, "tier": self.settings.tier, **more, **chosen}

    def _chosen(self, plan: Plan, job: Job) -> list[Plan]:
        """The plans whose networks have candidates: those of Lynx are TensorRT's."""
        return [plan, *(each for each in self.beside(plan, job) if isinstance(each, CameraPlan))]

    def make_engines(self, plan: Plan, job: Job, progress: Progress) -> None:
        """Builds the missing engines of that shape and finishes their kernels, ahead of the first job, which
        does the same. Its graphs must exist.
        """
        if self.place is not None:
            gpu, flavour = self.place
            config, shares = self.weights.config, self._share(plan, job)
            divided = {name for share in shares for name in networks(config, share)}
            for each in (*self._chosen(plan, job), *shares):
                without = () if each in shares else divided
                build_engines(config, each, gpu, flavour, self.settings, progress, without)


def open_basis(weights: WeightFiles, settings: Settings, progress: Progress, rank: int = 0) -> Basis:
    """Reads headers, tokenizer and GPU; computes nothing. Of several GPUs the one with the number `rank` is
    taken. Raises TrtWanError.
    """
    place = open_gpu(settings, progress, rank)
    precision = choose_precision(settings, place[0] if place else None)
    opened = open_weights(weights, precision, progress)
    if place is not None:
        require_tier(settings.tier, precision, place[0].capability)
    return Basis(opened, place, precision, settings, weights)


class OpenModel(Closing):
    """Runs one job at a time. `close` frees all GPU memory; the end of a `with` block closes too."""

    def __init__(
        self,
        weights: OpenWeights,
        precision: Precision,
        sizes: Sizes,
        settings: Settings,
        ranks: Ranks = ALONE,
        start: Callable[[], Group] | None = None,
    ) -> None:
        """`start` starts the other ranks, of which this process is the first."""
        self.ranks, self._start = ranks, start
        self.config, self.precision, self.settings = weights.config, precision, settings
        self._weights, self._sizes = weights, sizes
        self._running = self._closed = False
        text, numbers = self.config.text, (self.config.name, precision, str(GRAPHS_VERSION), *sizes.numerics)
        cached = settings.text_cache and bool(weights.text_files)
        self._cache = TextCache(cached, weights.text_files, numbers, (text.length, text.dim))
        self._features: dict[str, Array] = {}  # by prompt of the job, as far as they are known
        self._loras = Loras(weights.config, weights.transformer)
        self._group = start() if start is not None else None  # they open the model meanwhile

    def stream(
        self,
        job: Job,
        *,
        clips: Clips | None = None,
        progress: Progress = silent,
        should_stop: ShouldStop = lambda: False,
    ) -> Iterator[Pixels]:
        """Yields the video's frames, uint8 [H, W, 3], as many as the driving clip has.

        `clips` are the job's, if they are open already. `should_stop` ends the stream with `Stopped`; the
        model stays usable. Raises TrtWanError.
        """
        for piece in self.pieces(job, clips=clips, progress=progress, should_stop=should_stop):
            yield from to_pixels(piece)

    def pieces(
        self,
        job: Job,
        *,
        clips: Clips | None = None,
        progress: Progress = silent,
        should_stop: ShouldStop = lambda: False,
        begin_from: WindowState | None = None,
        keep: Keep | None = None,
    ) -> Iterator[Array]:
        """`stream` in pieces, before clamping to [-1, 1] and rounding: float32 [3, n, H, W]. It can begin
        between two windows (`stream_pieces`).
        """
        if self._closed:
            raise UsageError("This model is closed.", "Open it again with open_model().")
        if self._running:
            raise UsageError("This model is running another job.", "Wait for it, or open a second model.")
        self._running = True
        finished = False
        try:
            self._sizes.resume()
            clips, should_stop = self._with_others(job, clips, begin_from, should_stop)
            progress = traced(progress, self.ranks)
            for piece in stream_pieces(
                _with_ratios(job, self._weights, progress),
                self,
                clips=clips,
                progress=progress,
                should_stop=should_stop,
                begin_from=begin_from,
                keep=keep,
            ):
                yield piece
                self._sizes.resume()  # the consumer may go on in another thread
            finished = True
        except RankLost as lost:
            raise lost if self._group is None else self._group.reason(lost) from None
        finally:
            self._running = False
            if not finished:  # the others are in the middle of the job
                self._end_group()

    def _with_others(
        self, job: Job, clips: Clips | None, begin_from: WindowState | None, should_stop: ShouldStop
    ) -> tuple[Clips | None, ShouldStop]:
        """Has the other ranks begin a job. Returns clips whose frames they get, if no file has them, and
        `should_stop` that raises when a rank is lost.
        """
        if self._start is None:
            return clips, should_stop
        if self._group is not None and self._group.was_lost():
            self._end_group()
        group = self._group = self._group or self._start()
        self.ranks, group.abandon = group.ranks, self._sizes.abandon
        live = None
        if clips is not None and clips.coming is not None:
            live, clips = empty_copy(clips, job.history), giving(clips, group.ranks)
        group.begin(job, begin_from, {} if clips is None else clips.endings, live)

        def stop() -> bool:
            group.check()
            return should_stop()

        return clips, stop

    def _end_group(self) -> None:
        if self._group is not None:
            group, self._group = self._group, None
            group.close()

    def begin(self, job: Job, width: int, height: int, frames: int, progress: Progress) -> Model:
        plan = Plan(width, height, job.model_window, self.precision)
        found = {text: self._cache.find(text) for text in job.encoded_texts}
        self._features = {text: features for text, features in found.items() if features is not None}
        for text in found:
            self._report_cut(text, progress)
        skip = [TEXT_ENCODER] if len(self._features) == len(found) or self.ranks.rank else []
        skip += IMAGE_ENCODER if job.clip_vision.off else []
        self._merge(job.loras, progress)
        context = job.context_plan(job.windows(frames).length(0))
        load = self._weights.load_of(job, progress)
        if load.lynx is not None:
            self._take_lynx(job, load.lynx, progress)
        if self.ranks.count == 1:
            return self._sizes.begin(plan, load, context, skip, progress)
        choice = split_of(job, context, self.ranks.count, not isinstance(self._sizes, CpuSizes))
        progress(Note(choice.text, "split", {"gpus": self.ranks.count, "split": choice.split}))
        share = ShardPlan.of(plan, self.ranks.count) if choice.split == "tokens" else None
        model = self._sizes.begin(plan, load, context, skip, progress, self.ranks, share)
        model.split = choice.split
        return model

    def _take_lynx(self, job: Job, adapters: Lynx, progress: Progress) -> None:
        """Takes the weights of Lynx, and says which of its adapters act."""
        search, identity = self._weights.lynx, job.acting_identity
        assert identity is not None
        if search.random:
            parts: Mapping[Part, Any] = {
                part: RandomWeights(self.config, part, RANDOM_SEED) for part in LYNX_PARTS
            }
        else:
            parts = search.files(self.config).parts
        self._sizes.take(parts)
        progress(acting_adapters(adapters, identity))

    def _merge(self, loras: Sequence[Lora], progress: Progress) -> None:
        """Everything that a job computes from the transformer's weights it computes anew, so that the weights
        are all that a change concerns.
        """
        self._weights.require_no_loras_of_noise(loras)
        merging = self._loras.merging(loras, progress)
        if merging.changed:
            self._sizes.change(merging.tensors, merging.changed)
            self._loras.done(merging)

    def _report_cut(self, prompt: str, progress: Progress) -> None:
        tokenizer = self._weights.tokenizer
        if len(prompt) * MOST_EXPANSION < tokenizer.length:
            return  # a known prompt need not import the packages for text
        tokens = tokenizer.count(prompt)
        if tokens > tokenizer.length:
            text = f"The prompt has {tokens} tokens, and the model reads the first {tokenizer.length}."
            data = {"tokens": tokens, "read": tokenizer.length, "prompt": prompt}
            progress(Note(f"{text} It begins: {shown(prompt)}", "prompt_cut", data))

    def texts(self, model: Model, job: Job, progress: Progress) -> Mapping[str, Array]:
        new = [text for text in job.encoded_texts if text not in self._features and not self.ranks.rank]
        if new:
            progress(StageStarted("text"))
        for start in range(0, len(new), MOST_TEXTS):
            self._encode(model, new[start : start + MOST_TEXTS])
        if self.ranks.count > 1:  # the store may have changed since another rank read it
            texts = job.encoded_texts
            made = self.ranks.of_first([] if self.ranks.rank else [self._features[text] for text in texts])
            self._features = dict(zip(texts, made, strict=True))
        return self._features

    def _encode(self, model: Model, texts: Sequence[str]) -> None:
        made = encode_texts(model, self._weights.tokenizer, texts)
        if not all(map(is_finite, made)):
            raise explained(
                model, Broken("the prompt", lambda model: encode_texts(model, self._weights.tokenizer, texts))
            )
        for text, features in zip(texts, made, strict=True):
            self._features[text] = features
            self._cache.store(text, features)

    def close(self) -> None:
        """Call between jobs. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._end_group()
        self._sizes.close()
        self._cache.close()
        gc.collect()  # TensorRT's objects and arrays free GPU memory when Python drops them


def split_of(job: Job, context: ContextPlan | None, count: int, on_gpus: bool = True) -> Choice:
    """How `count` GPUs share the steps of a job. Raises UsageError for a job that cannot be shared."""
    parts = 1 if context is None or context.is_one else len(context.parts(0))
    passes = [step.passes for step in job.step_settings]
    return choose_split(passes, parts, count, _take_all_tokens(job), on_gpus)


def _take_all_tokens(job: Job) -> list[str]:
    """The options of networks that are not split by tokens."""
    acting = (("--camera", job.acting_camera), ("--identity", job.acting_identity))
    return [option for option, acts in acting if acts is not None]


def _with_ratios(job: Job, weights: OpenWeights, progress: Progress) -> Job:
    return with_ratios(job, weights.config.name, weights.files.get("transformer", ()), progress)


def open_weights(weights: WeightFiles, precision: Precision, progress: Progress) -> OpenWeights:
    """The checkpoints and the tokenizer, checked from their headers. Of several files for a part the one that
    suits `precision` is taken. Raises WeightsError.
    """
    if weights.random is not None:
        config = MODELS[weights.random]
        camera = CameraWeights(config, weights, precision)
        host: HostWeights = {part: RandomWeights(config, part, RANDOM_SEED) for part in PARTS}
        host = {**host, "camera_control": camera}
        tokenizer = byte_tokenizer(config.text.vocabulary, config.text.length)
        progress(Note("The weights are random, so the picture is noise."))
        search = LynxSearch(random=True)
        return OpenWeights(config, host, RandomSource(RANDOM_SEED), tokenizer, camera, lynx=search)
    config, checkpoints = load_weights(weights.folders, weights.files, progress, precision)
    text_encoder = checkpoints["text_encoder"]
    tokenizer = find_tokenizer(weights.tokenizer, weights.folders, text_encoder, config.text.length)
    camera = CameraWeights(config, weights, precision)
    parts: dict[Part, Any] = {**checkpoints, "camera_control": camera}
    search = LynxSearch(weights)
    return OpenWeights(config, parts, FileSource(parts), tokenizer, camera, tokenizer.file, search)


def open_gpu(settings: Settings, progress: Progress, rank: int = 0) -> tuple[Gpu, Flavour] | None:
    """The GPU and its TensorRT, or None if jobs run on the CPU; reports which and why."""
    if settings.executor == "onnxruntime":
        _refuse_settings_of_a_gpu(settings, "it was asked for")
        return None
    try:
        gpu = Gpu(rank)
        flavour = choose_flavour(settings.flavour, gpu.capability)
        if settings.gpus > (count := device_count()):
            raise UsageError(
                f"--gpus asks for {settings.gpus}, and CUDA shows {count} here.",
                f"Use --gpus {count}, or let CUDA_VISIBLE_DEVICES name more.",
            )
    except EnvironmentBroken as error:
        if settings.executor == "tensorrt":
            raise
        why = error.message.rstrip(".")
        _refuse_settings_of_a_gpu(settings, why)
        text = f"executor = onnxruntime on the CPU ({why})"
        progress(Note(f"{text}\n{error.hint}", "gpu_unused") if has_nvidia_gpu() else Note(text))
        return None
    progress(Note(f"executor = {flavour.name} {flavour.version} on {gpu.name} ({flavour.reason})"))
    return gpu, flavour


def refuse_on_cpu(settings: Settings) -> None:
    """Raises the error of a job's start for settings with which no job starts, if this machine has no GPU or
    they leave it idle. Makes no CUDA context.
    """
    on_cpu = settings.executor == "onnxruntime" or not has_nvidia_gpu()
    if on_cpu and open_gpu(settings, silent) is None:
        choose_precision(settings, None)


def _refuse_settings_of_a_gpu(settings: Settings, why: str) -> None:
    """`why` the CPU computes. Raises UsageError for a setting that would do nothing there."""
    given = {
        "vram": settings.vram is not None,
        "tier": settings.tier != Settings.tier,
        "flavour": settings.flavour is not None,
        "segment": bool(settings.segments),
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise UsageError(
            f"ONNX Runtime runs on the CPU ({why}), and --{name} is for a GPU.", f"Leave --{name} out."
        )


def choose_precision(settings: Settings, gpu: Gpu | None) -> Precision:
    """FP8 where the GPU has it, else bf16. On the CPU float32, which is all that ONNX Runtime runs there."""
    if gpu is None:
        if settings.precision not in (None, "fp32"):
            raise UsageError(
                f"ONNX Runtime on the CPU runs fp32, not {settings.precision}.", "Leave --precision out."
            )
        return "fp32"
    if settings.precision is None:
        return best_precision(gpu.capability)
    require_fp8(settings.precision, gpu.capability)
    return settings.precision
