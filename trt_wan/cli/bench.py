"""`trt-wan bench`: how fast, against whom, how far from the limit. Tables go to stderr; the last line of
stdout is one JSON document with everything.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from trt_wan.cli.bench_preprocess import bench_preprocess
from trt_wan.cli.bench_report import finished, keeping, require_writable, show_tables
from trt_wan.cli.bench_scaling import scale, scaling_options, take_scaling
from trt_wan.cli.calibrate_cache import calibrate_cache
from trt_wan.cli.command import Group, command, note
from trt_wan.cli.report import Report
from trt_wan.cli.sizes import Size, size_of
from trt_wan.cli.sizes import size as size_option
from trt_wan.errors import TrtWanError, UsageError, shown

if TYPE_CHECKING:
    from trt_wan.benchmarks.measure.quality import Wanted
    from trt_wan.benchmarks.peers.shape import Shape

FOLDER = click.Path(path_type=Path, file_okay=False)
THERE = click.Path(path_type=Path, file_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
ON_A_GPU: tuple[Size, int] = (832, 480), 77
ON_A_CPU: tuple[Size, int] = (64, 48), 13
COUNT = click.IntRange(1, 1000)  # noise levels of the model, and enough for any repetition
PEER_NAMES = ("diffusers_eager", "diffusers_compiled", "diffusers_fp8", "lightx2v")


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    sizes = (size_of(part) for part in (value or "").split(",") if part)
    return tuple(f"{width}x{height}" for width, height in sizes)


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in (value or "").split(",") if part]
    if not all(re.fullmatch("[1-9][0-9]{0,3}", part) for part in parts):
        raise click.BadParameter(f"{shown(value)!r} is not a list of numbers such as 5,77,161.")
    return tuple(map(int, parts))


def _peers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = {"all": PEER_NAMES, "none": ()}.get(value, tuple(value.split(",")))
    unknown = [name for name in names if name not in PEER_NAMES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PEER_NAMES)}, all, none.")
    return names


def _segments(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if any(not candidate for candidate in pairs.values()):
        raise click.BadParameter("name them as NETWORK=CANDIDATE, such as attention=cudnn.")
    return pairs


def _rows(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Settings by row: "fast; attention=cudnn fp8" has the tier and a candidate, "vram=12" a number."""
    if not values:
        return {}
    from trt_wan.runtime.settings import Settings

    found = {}
    for value in values:
        settings: dict[str, Any] = {}
        for part in filter(None, map(str.strip, value.split(";"))):
            name, given, text = (piece.strip() for piece in part.partition("="))
            if not given:
                settings["tier"] = name
            elif (field := name.replace("-", "_")) in Settings.__dataclass_fields__:
                number = int if text.isdecimal() else float
                settings[field] = number(text) if re.fullmatch("[0-9]*[.]?[0-9]+", text) else text
            else:
                settings.setdefault("segments", {})[name] = text
        found[value] = settings
    return found


_SHAPE = (
    click.option("--model", type=click.Choice(["14b", "tiny"]), help="Default: 14b on a GPU, else tiny."),
    click.option("--size", callback=size_option, metavar="WxH", help="Default: 832x480, or 64x48 for tiny."),
    click.option("--window", type=int, help="Frames per window, 4k+1. Default: 77, or 13 for tiny."),
    click.option("--weights", type=THERE, help="Folder with the checkpoints. Default: random weights."),
)
_SETTINGS = (
    click.option("--executor", type=click.Choice(["auto", "onnxruntime", "tensorrt"])),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp8", "int8"]),
        help="Default: the best the GPU has.",
    ),
    click.option(
        "--tier",
        type=click.Choice(["exact", "fast", "turbo"]),
        help="exact: bf16 attention; fast: 8 bits; turbo: block-sparse too.",
    ),
    click.option("--attention-keep", type=float, metavar="SHARE", help="turbo: of the key blocks kept."),
    click.option("--flavour", type=click.Choice(["tensorrt", "tensorrt_rtx"])),
    click.option("--vram", type=float, help="GB of GPU memory to use at most."),
    click.option(
        "--segment",
        "segments",
        multiple=True,
        callback=_segments,
        metavar="NETWORK=CANDIDATE",
        help="Take this candidate, such as attention=cudnn; may be repeated.",
    ),
)
_GPUS = click.option("--gpus", type=int, help="GPUs that share a job. Default: 1.")  # `bench` takes several
_ROWS = click.option(
    "--row",
    "rows",
    multiple=True,
    callback=_rows,
    metavar="TIER;NETWORK=CANDIDATE;…",
    help="A row, such as 'fast; attention=cudnn fp8' or 'exact; precision=bf16'; may be repeated.",
)
_BUDGET = click.option(
    "--budget",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Measure no longer: rows that do not fit are named with the reason.",
)
_OUT = click.option("--out", type=FOLDER, help="Folder for JSON, CSV and plots (PNG and SVG).")
_OUT_WITHOUT_PLOTS = click.option("--out", type=FOLDER, help="Folder for JSON and CSV.")

Decorator = Callable[[Any], Any]


def _options(*rows: Decorator) -> Decorator:
    def decorate(function: Any) -> Any:
        for row in reversed(rows):
            function = row(function)
        return function

    return decorate


@click.command("measure", hidden=True)
@_options(*_SHAPE, *_SETTINGS)
@click.option("--steps", type=COUNT, default=20, show_default=True, help="Timed steps per round.")
@click.option(
    "--rounds",
    type=COUNT,
    default=1,
    show_default=True,
    help="Rounds in which we and the peers take turns.",
)
@click.option("--job-steps", type=COUNT, default=4, show_default=True, help="Steps of a whole job.")
@click.option("--jobs", type=COUNT, help="Whole jobs from a warm start. Default: 3, or 5 with --repeat.")
@click.option(
    "--peers",
    default="none",
    show_default=True,
    callback=_peers,
    help=f"all, none, or of {', '.join(PEER_NAMES)}.",
)
@click.option("--peer-steps", type=COUNT, help="Timed steps of a peer. Default: as many as ours.")
@click.option("--lightx2v", type=THERE, help="A checkout of LightX2V, for the peer of that name.")
@click.option("--cold/--no-cold", default=True, show_default=True, help="Measure a cold start as well.")
@click.option("--repeat", type=COUNT, default=1, show_default=True, help="Runs in a row: the spread.")
@scaling_options(_sizes)
@_OUT
@command
def measure(
    *,
    report: Report,
    model: str | None,
    size: Size | None,
    window: int | None,
    weights: Path | None,
    steps: int,
    rounds: int,
    job_steps: int,
    jobs: int | None,
    peers: tuple[str, ...],
    peer_steps: int | None,
    lightx2v: Path | None,
    cold: bool,
    repeat: int,
    out: Path | None,
    **settings: Any,
) -> Any:
    """Measure a job: the card, ceilings and lower bound, starts, stages, steps, memory, and peers beside it.

    \b
    trt-wan bench --out bench/
    trt-wan bench --peers all --rounds 3 --out bench/
    trt-wan bench --gpus 1,2,4 --tier fast --out scaling/
    trt-wan bench compare before/bench.json after/bench.json
    """
    from trt_wan.benchmarks.bench import Options, run_bench
    from trt_wan.benchmarks.peers.contest import Contest
    from trt_wan.benchmarks.report.repeat import JOBS, Repeats

    scaling = take_scaling(settings)
    _refuse_on_cpu(_given(settings))
    if scaling is not None:
        sizes = map(size_of, scaling["sizes"])
        shapes = [_shape(model, each, window) for each in sizes] or [_shape(model, size, window)]
        return scale(report, shapes, _given(settings), scaling, job_steps, weights, out)
    options = Options(
        shape=_shape(model, size, window),
        settings=_given(settings),
        weights=str(weights) if weights else None,
        contest=Contest(steps, rounds, peers, peer_steps, {"lightx2v": _lightx2v(lightx2v, weights)}),
        job_steps=job_steps,
        jobs=jobs or (JOBS if repeat > 1 else Options.jobs),
        cold=cold,
    )
    if repeat == 1:
        require_writable(out)
        return finished(report, run_bench(options, report.progress), out)
    results = []
    with keeping(out, report) as keep:
        for n in range(repeat):
            note(report, f"run {n + 1} of {repeat}")
            results.append(run_bench(options, report.progress))
            show_tables(report, results[-1])
            keep(Repeats(results))
    return finished(report, Repeats(results), out)


@click.command("compare", short_help="Compare two results.")
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@command
def compare_results(*, report: Report, first: Path, second: Path) -> Any:
    """Ratios of the headline figures of two bench.json, with their spread. Both must be of the same job."""
    from trt_wan.benchmarks.report.compare import compare

    return finished(report, compare(first, second))


@click.command("sweep", short_help="Measure how the cost grows.")
@_options(*_SHAPE, *_SETTINGS, _GPUS)
@click.option(
    "--axes", default="size,window", show_default=True, help="Of size, window, steps, precision, vram."
)
@click.option("--sizes", callback=_sizes, metavar="WxH,…", help="Default: 480p, 720p, square, portrait.")
@click.option("--windows", callback=_numbers, metavar="N,…", help="Default: 5 to 161 frames.")
@click.option("--job-steps", callback=_numbers, metavar="N,…", help="Of the axis steps. Default: 4,10,20.")
@click.option("--steps", type=COUNT, default=6, show_default=True, help="Timed at each point.")
@_BUDGET
@_OUT
@command
def sweep_shapes(
    *,
    report: Report,
    model: str | None,
    size: Size | None,
    window: int | None,
    weights: Path | None,
    axes: str,
    sizes: tuple[str, ...],
    windows: tuple[int, ...],
    job_steps: tuple[int, ...],
    steps: int,
    budget: float | None,
    out: Path | None,
    **settings: Any,
) -> Any:
    """Time steps over sizes, window lengths, step counts, precisions and memory limits, and fit a law."""
    from trt_wan.benchmarks.measure import sweep
    from trt_wan.benchmarks.measure.budget import Budget

    names = axes.split(",")
    unknown = [name for name in names if name not in sweep.AXES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(sweep.AXES)}.")
    _refuse_on_cpu(_given(settings))
    points = sweep.asks(
        _shape(model, size, window),
        _given(settings),
        [cast(sweep.Axis, name) for name in names],
        sizes or sweep.SIZES,
        windows or sweep.WINDOWS,
        job_steps or sweep.STEPS,
    )
    files, limit = str(weights) if weights else None, Budget(budget)
    with keeping(out, report) as keep:
        result = sweep.run_sweep(points, steps, files, report.progress, keep=keep, budget=limit)
    return finished(report, result, out, result.lost)


@click.command("quality", short_help="Measure what a precision or tier costs in quality.")
@_options(*_SHAPE, *_SETTINGS, _GPUS, _ROWS)
@click.option("--steps", type=COUNT, default=4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--peers", is_flag=True, help="diffusers too, on the same weights and inputs; all tiers of ours."
)
@click.option("--frames/--no-frames", default=True, show_default=True, help="Compare the videos as well.")
@_BUDGET
@_OUT
@command
def quality_of(
    *,
    report: Report,
    model: str | None,
    size: Size | None,
    window: int | None,
    weights: Path | None,
    steps: int,
    seed: int,
    rows: dict[str, dict[str, Any]],
    peers: bool,
    frames: bool,
    budget: float | None,
    out: Path | None,
    **settings: Any,
) -> Any:
    """Compare our output with the bf16 reference on the same seed, beside the reference's noise floor.

    \b
    trt-wan bench quality --row fast --row 'fast; attention=cudnn fp8'
    trt-wan bench quality --weights models/ --peers
    """
    from trt_wan.benchmarks.measure.quality import Wanted, measure_quality

    shape, files, given = _shape(model, size, window), str(weights) if weights else None, _given(settings)
    if not rows and peers and "tier" not in given:
        wanted = [Wanted(f"trt-wan {tier}", _given({**given, "tier": tier})) for tier in _tiers(given)]
    else:
        wanted = _wanted(rows, settings)
    _refuse_on_cpu(*(one.settings for one in wanted))
    with keeping(out, report) as keep:
        result = measure_quality(
            shape, wanted, steps, seed, files, peers, frames, report.progress, keep, budget
        )
    return finished(report, result, out, result.lost)


def _wanted(rows: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> "list[Wanted]":
    """The rows, or one of the settings that were given."""
    from trt_wan.benchmarks.measure.quality import Wanted

    wanted = [Wanted(name, _given({**settings, **row})) for name, row in rows.items()]
    return wanted or [Wanted("trt-wan", _given(settings))]


def _tiers(given: Mapping[str, Any]) -> Sequence[str]:
    """The tiers of the precision. The CPU has none: there our only row would be the reference."""
    from trt_wan.benchmarks.machine.card import read_gpu
    from trt_wan.engines.choice.candidates import tiers

    return () if read_gpu() is None else tiers(given.get("precision") or "fp8")


@click.command("window", short_help="Measure a window of a long video, part by part.")
@_options(*_SHAPE, *_SETTINGS, _GPUS)
@click.option("--steps", type=COUNT, default=4, show_default=True, help="Steps of a window.")
@click.option("--windows", type=click.IntRange(3, 20), default=4, show_default=True)
@_OUT_WITHOUT_PLOTS
@command
def window_of(
    *,
    report: Report,
    model: str | None,
    size: Size | None,
    window: int | None,
    weights: Path | None,
    steps: int,
    windows: int,
    out: Path | None,
    **settings: Any,
) -> Any:
    """Time the window before the last of a job: its parts, their shares, and their distance from a floor."""
    from trt_wan.benchmarks.measure.window_budget import measure_window

    shape, files = _shape(model, size, window), str(weights) if weights else None
    _refuse_on_cpu(_given(settings))
    with keeping(out, report) as keep:
        result = measure_window(shape, _given(settings), steps, windows, files, report.progress, keep)
    return finished(report, result, out)


@click.command("vae", short_help="Measure the VAE of a window beside diffusers'.")
@_options(*_SHAPE[:-1], *_SETTINGS, _ROWS)
@click.option("--weights", type=THERE, help="Folder with the checkpoints. Needed.")
@click.option("--repeats", type=COUNT, default=3, show_default=True)
@_BUDGET
@_OUT_WITHOUT_PLOTS
@command
def vae_of(
    *,
    report: Report,
    model: str | None,
    size: Size | None,
    window: int | None,
    weights: Path | None,
    rows: dict[str, dict[str, Any]],
    repeats: int,
    budget: float | None,
    out: Path | None,
    **settings: Any,
) -> Any:
    """Decode and encode a window: seconds, and the error against float32, ours and diffusers' in turn."""
    from trt_wan.benchmarks.measure.vae import measure_vae

    if weights is None:
        raise UsageError(
            "The VAE is measured with weights of files.", "Name their folder with --weights DIR."
        )
    shape, wanted = _shape(model, size, window), _wanted(rows, settings)
    _refuse_on_cpu(*(one.settings for one in wanted))
    with keeping(out, report) as keep:
        result = measure_vae(shape, wanted, str(weights), repeats, report.progress, keep, budget)
    return finished(report, result, out, result.lost)


@click.pass_context
def _bench(ctx: click.Context, /, **options: Any) -> None:
    if ctx.invoked_subcommand is None:
        ctx.invoke(measure, **options)


bench = Group(
    "bench",
    params=measure.params,
    callback=_bench,
    invoke_without_command=True,
    help=measure.help,
    short_help="Measure how fast this machine is.",
)
for subcommand in (
    compare_results,
    sweep_shapes,
    quality_of,
    window_of,
    vae_of,
    bench_preprocess,
    calibrate_cache,
):
    bench.add_command(subcommand)


def _shape(model: str | None, size: Size | None, window: int | None) -> "Shape":
    """The given shape, or the default for this machine."""
    from trt_wan.benchmarks.machine.card import read_gpu
    from trt_wan.benchmarks.peers.shape import Shape

    if model is None:
        model = "14b" if read_gpu() else "tiny"
    default_size, default_window = ON_A_GPU if model == "14b" else ON_A_CPU
    shape = Shape(model, *(size or default_size), default_window if window is None else window)
    assert shape.plan  # UsageError at once if there is no such shape
    return shape


def _lightx2v(checkout: Path | None, weights: Path | None) -> tuple[str, ...]:
    given = (("--path", checkout), ("--weights", weights))
    return tuple(text for name, path in given if path is not None for text in (name, str(path)))


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, checked at once. All others keep their defaults."""
    from trt_wan.runtime.settings import Settings

    given = {name: value for name, value in settings.items() if value not in (None, {})}
    assert Settings(**given), "UsageError for values that are not possible"
    return given


def _refuse_on_cpu(*rows: Mapping[str, Any]) -> None:
    """Raises the error of `trt-wan run` if the settings of no row can be run on the CPU, where they would be.
    One row that can is measured, and the others are told.
    """
    from trt_wan.runtime.opening.model import refuse_on_cpu
    from trt_wan.runtime.settings import Settings

    refused = []
    for row in rows:
        try:
            refuse_on_cpu(Settings(**row))
        except TrtWanError as error:
            refused.append(error)
    if refused and len(refused) == len(rows):
        raise refused[0]
