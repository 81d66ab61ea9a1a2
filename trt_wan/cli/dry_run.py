"""`run --dry-run`: a forecast from files and figures that exist already. Nothing is computed or written.

Memory of a GPU is counted as before a job, without the scratch of the engines, which they tell when they are
opened. Time is that of the networks alone: the measured time of each chosen candidate as often as a job calls
it. Networks without a measurement are named, and without any there is no time: nothing is guessed.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trt_wan.cli.report import readable_bytes, table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from trt_wan.engines.shape import Plan, VaeTile
    from trt_wan.runtime.events import Note
    from trt_wan.runtime.job import Job
    from trt_wan.runtime.opening.model import Basis
    from trt_wan.runtime.redo import Again


@dataclass(frozen=True)
class Needs:
    """The needs on one machine. None where it cannot be known before graphs and engines are made."""

    place: str
    memory: int  # bytes
    streamed_blocks: int = 0
    vae_tiles: bool = False
    engines: tuple[str, ...] | None = ()  # that would be built
    seconds: float | None = None  # the measured networks'
    unmeasured: tuple[str, ...] | None = None  # networks


Told = tuple[str, dict[str, Any]]  # a table for people, and its data


def forecast(
    basis: "Basis",
    job: "Job",
    width: int,
    height: int,
    frames: int,
    rate: "Fraction | None" = None,
    again: "Sequence[Again] | None" = None,
) -> Told:
    """`rate` is that of the clips. `again`: the only windows that are rendered, if a finished video has the
    others. Raises MemoryShort, and InputError as `frames_before`.
    """
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.graphs import graph_set
    from trt_wan.runtime.pipeline import references_note, short_last_window
    from trt_wan.runtime.video.continued import frames_before

    before = frames_before(job.inputs, job.overlap, width, height, rate)
    known = 0 if before is None else len(before)
    windows = job.windows(known + frames)
    frames = windows.kept_frames - known
    numbers = range(windows.total) if again is None else [one.j for one in again]
    lengths = [windows.length(j) for j in numbers]
    plan, config = Plan(width, height, job.model_window, basis.precision), basis.weights.config
    identity, choice = _identity(basis, job), basis.split(job, known + frames)
    graphs = graph_set(config, plan).missing()
    for beside in basis.beside(plan, job):
        graphs += graph_set(config, beside).missing()
    needs = (
        _on_cpu(basis, plan, job, windows.length(0))
        if basis.place is None
        else _on_gpu(basis, plan, job, windows.length(0), lengths, not graphs)
    )
    if needs.vae_tiles and plan.vae_tile is not None:
        graphs += graph_set(config, plan.vae_tile).missing()
    data = {
        **{"frames": frames, "width": width, "height": height, "windows": windows.total},
        **{"window": windows.length(0), "overlap": job.overlap, "steps": job.schedule.steps},
        "evaluations": _evaluations(job, lengths),
        **{"model_window": job.model_window, "tokens": plan.tokens},
        **{"precision": basis.precision, "missing_graphs": list(graphs)},
        **_step_cache(job, plan, windows.length(0), config.transformer.dim),
        **(
            {} if choice is None else {"gpus": basis.settings.gpus, "split": choice.split, "why": choice.text}
        ),
        **({} if identity is None else {"identity": {**identity.data, "text": identity.text}}),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(needs).items()},
    }
    if again is not None:
        data["redo"] = [
            {
                "window": one.j + 1,
                "frames": [one.frames.start, one.frames.stop],
                "seed": one.seed,
                "tied": one.tied,
            }
            for one in again
        ]
    carried = f", {job.overlap} of them carried on" if windows.total > 1 else ""
    per_window = f"{windows.length(0)} frames{carried}, {job.schedule.steps} steps"
    rows = [
        ("what", "forecast"),
        ("video", f"{frames} frames, {width}x{height}"),
        ("windows", f"{windows.total} of {per_window}"),
        *([("references", note.text)] if (note := references_note(job)) else []),
        *([("", note.text)] if again is None and (note := short_last_window(windows)) else []),
        *(("again", one.text) for one in again or ()),
        ("transformer", f"{data['evaluations']} evaluations, {plan.tokens} tokens each, {basis.precision}"),
        *([("step cache", _skips(job, data))] if job.skips else []),
        *([] if identity is None else [("identity", identity.text.removeprefix("identity: "))]),
        *([] if choice is None else [("split", choice.text)]),
        ("graphs", f"{len(graphs)} would be exported" if graphs else "are there"),
        ("engines", _engines(needs)),
        ("memory", _memory(needs, basis.settings.gpus)),
        ("time", _time(needs)),
    ]
    return table(rows), data


def _identity(basis: "Basis", job: "Job") -> "Note | None":
    """The adapters of Lynx that act. Raises as `load_of`."""
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.opening.lynx import acting_adapters

    face, adapters = job.acting_identity, basis.weights.load_of(job, silent).lynx
    return None if face is None or adapters is None else acting_adapters(adapters, face)


def _step_cache(job: "Job", plan: "Plan", longest: int, dim: int) -> dict[str, Any]:
    """The skipped steps of every side, from 1, and the bytes of their residuals at most. Empty without it."""
    if not (skips := job.skips):
        return {}
    from trt_wan.runtime.step_cache import numbers

    context = job.context_plan(longest)
    parts = 1 if context is None else len(context.parts(0))
    held = sum(map(any, skips)) * parts * plan.tokens * dim * 4
    skipped = [numbers(side) for side in skips]
    return {"skipped_steps": skipped, "step_cache_bytes": held}


def _skips(job: "Job", data: dict[str, Any]) -> str:
    from trt_wan.runtime.step_cache import told_skips

    text = f"skips {told_skips(job.skips)}"
    held = data["step_cache_bytes"]
    return f"{text}; holds {readable_bytes(held)}, counted below" if held else text


def _evaluations(job: "Job", lengths: "Sequence[int]", first: int = 0, with_skipped: bool = False) -> int:
    """Calls of the transformer's blocks: for each step from `first` on, prompt and context window of windows
    of `lengths` frames. `with_skipped`: also those that the step cache skips.
    """
    total = 0
    computed = [step.passes for step in job.step_settings] if with_skipped else job.computed
    for length in lengths:
        plan = job.context_plan(length)
        for step, passes in enumerate(computed[first:], first):
            total += passes * (1 if plan is None else len(plan.parts(step)))
    return total


def _engines(needs: Needs) -> str:
    if needs.engines is None:
        return "known when the graphs are exported"
    return f"{len(needs.engines)} would be built" if needs.engines else "are there, or not needed"


def _memory(needs: Needs, gpus: int) -> str:
    streamed = f"; {needs.streamed_blocks} blocks stream from the host" if needs.streamed_blocks else ""
    tiles = "; the VAE computes in two tiles" if needs.vae_tiles else ""
    each = f", on each of {gpus} GPUs" if gpus > 1 else ""
    return f"at least {readable_bytes(needs.memory)} of {needs.place}{each}{streamed}{tiles}"


def _time(needs: Needs) -> str:
    if needs.seconds is None:
        return "unknown: no network of this shape was measured here"
    without = f", and more for {', '.join(needs.unmeasured)}" if needs.unmeasured else ""
    return f"{needs.seconds:.0f} s of networks{without}"


def _on_cpu(basis: "Basis", plan: "Plan", job: "Job", longest: int) -> Needs:
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.executors.onnxruntime import least_memory

    config, load = basis.weights.config, basis.weights.load_of(job, silent)
    held = _step_cache(job, plan, longest, config.transformer.dim).get("step_cache_bytes", 0)
    return Needs("host memory", least_memory(config, plan, load.camera_ffn) + held)


def _on_gpu(
    basis: "Basis",
    plan: "Plan",
    job: "Job",
    longest: int,
    lengths: "Sequence[int]",
    with_graphs: bool,
) -> Needs:
    from trt_wan.engines.choice.candidates import Engine
    from trt_wan.engines.choice.choose import place_of
    from trt_wan.engines.choice.recipes import recipes_here
    from trt_wan.engines.contracts import networks
    from trt_wan.engines.shape import ShardPlan
    from trt_wan.engines.store.engines import find
    from trt_wan.engines.store.measurements import read_figures
    from trt_wan.errors import MemoryShort
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.opening.activation_memory import activation_bytes
    from trt_wan.runtime.opening.gpu_sizes import camera_of, choose_segments, networks_for
    from trt_wan.runtime.opening.residency import CONTEXT_BYTES, Residency, lynx_bytes, plan_residency
    from trt_wan.runtime.opening.segments import machine_of
    from trt_wan.runtime.parallel.peer_sequence import block_bytes
    from trt_wan.runtime.parallel.shards import Shards

    assert basis.place is not None, "a job on the CPU"
    (gpu, flavour), config, settings = basis.place, basis.weights.config, basis.settings
    context, load = job.context_plan(longest), basis.weights.load_of(job, silent)
    contracts = networks_for(config, plan, load)
    budget = int(gpu.free_bytes() if settings.vram is None else settings.vram * 1e9) - CONTEXT_BYTES
    share = next((each for each in basis.beside(plan, job) if isinstance(each, ShardPlan)), None)
    exchanged = 0
    if share is not None:
        dtype = networks(config, share)["attention"].inputs[0].dtype
        exchanged = block_bytes(Shards.of(config, share), dtype, 4 * plan.tokens * config.transformer.dim)
        budget -= exchanged

    spare = 0 if load.lynx is None else lynx_bytes(config, plan, load.lynx)

    def planned(tile: "VaeTile | None") -> Residency:
        arena = activation_bytes(config, plan, load, context, tile)
        keep, tiled = settings.keep_encoders, tile is not None
        return plan_residency(config, contracts, arena, 0, budget, keep, spare, tiled)

    tiles = False
    try:
        residency = planned(None)
    except MemoryShort:
        if not (tiles := plan.vae_tile is not None):
            raise
        residency = planned(plan.vae_tile)
    memory = residency.total + CONTEXT_BYTES + exchanged
    streamed = len({pack.n for pack in residency.streamed})
    if not with_graphs:
        return Needs(gpu.name, memory, streamed, tiles, None)
    machine = machine_of(gpu, flavour)
    recipes = recipes_here(config, plan, machine)
    chosen = choose_segments(config, plan, machine, recipes, settings, silent)
    if (camera := camera_of(plan, load)) is not None:
        of_camera = recipes_here(config, camera, machine)
        chosen |= choose_segments(config, camera, machine, of_camera, settings, silent)
        recipes |= of_camera
    if share is not None:
        recipes |= recipes_here(config, share, machine)
    ids = [recipes[row.engine].engine for row in chosen.values() if row.engine is not None]
    missing = tuple(engine.network for engine in dict.fromkeys(ids) if find(engine) is None)
    if settings.gpus > 1:  # what a GPU of several computes is not measured
        return Needs(gpu.name, memory, streamed, tiles, missing)
    times = {}
    for network, row in chosen.items():
        figure = read_figures(place_of(recipes[Engine(network)].engine.source, machine)).get(row.name)
        if figure is not None and figure.ms is not None:
            times[network] = figure.ms / 1000
    seconds, unmeasured = _seconds(basis, plan, job, lengths, times)
    if load.lynx is not None:
        unmeasured += load.lynx.networks
    return Needs(gpu.name, memory, streamed, tiles, missing, seconds, unmeasured)


def _seconds(
    basis: "Basis",
    plan: "Plan",
    job: "Job",
    lengths: "Sequence[int]",
    times: dict[str, float],
) -> tuple[float | None, tuple[str, ...]]:
    """The time of the networks in `times`, seconds a call, and the others that run in steps or windows."""
    from trt_wan.benchmarks.work.cost import Calls, calls

    total, unmeasured = 0.0, []
    evaluations, all_steps = (_evaluations(job, lengths, with_skipped=skipped) for skipped in (False, True))
    sparse = {} if basis.settings.keep is None else _sparse_calls(basis, job, lengths)
    spans = sum(-(-length // job.video_window) for length in lengths)
    counts = calls(basis.weights.config, plan, job.schedule.steps)
    extra = {**sparse, **_camera_calls(basis, job, lengths)}
    for network, count in {**dict.fromkeys(extra, Calls()), **counts}.items():
        times_each = all_steps if network in ("patch_embed", "head") else evaluations
        in_steps = count.step * times_each + extra.get(network, 0)
        if network in times:
            total += times[network] * (in_steps + count.window * spans + count.job)
        elif in_steps or count.window:
            unmeasured.append(network)
    return (total if times else None), tuple(unmeasured)


def _camera_calls(basis: "Basis", job: "Job", lengths: "Sequence[int]") -> dict[str, int]:
    """Calls of Uni3C's networks in the steps in which the camera acts. Both sides of the guidance share all
    but the additions.
    """
    if job.acting_camera is None:
        return {}
    layers = basis.weights.config.camera.layers
    once = both = 0
    for length in lengths:
        plan = job.context_plan(length)
        for step, settings in enumerate(job.step_settings):
            parts = 1 if plan is None else len(plan.parts(step))
            once += settings.camera * parts
            both += settings.camera * parts * settings.passes
    in_blocks = dict.fromkeys(("uni3c_in", "uni3c_attention", "uni3c_out"), layers * once)
    return {"uni3c_patch": once, **in_blocks, "uni3c_add": layers * both}


def _sparse_calls(basis: "Basis", job: "Job", lengths: "Sequence[int]") -> dict[str, int]:
    """Calls of block-sparse attention in the tier `turbo`; as many fewer of dense attention."""
    from trt_wan.runtime.denoise import dense_steps
    from trt_wan.runtime.networks.transformer import DENSE_BLOCKS

    blocks = basis.weights.config.transformer.layers - DENSE_BLOCKS
    count = blocks * _evaluations(job, lengths, dense_steps(job.schedule.steps))
    return {"attention": -count, "sparse_attention": count}
