"""`trt-wan build`: graphs, and engines for this machine's GPU or for named targets.

On this machine's GPU it also measures the candidates. Without a GPU and without a target it exports the
graphs only, which ONNX Runtime runs on the CPU.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report, Result, readable_bytes, table
from trt_wan.cli.sizes import size as size_option
from trt_wan.errors import GraphError, UsageError, shell_command, shown, with_commands
from trt_wan.install import install_command

if TYPE_CHECKING:
    from trt_wan.build.check import Checked
    from trt_wan.build.compile import CompileReport, EngineRow
    from trt_wan.build.goals import Goal
    from trt_wan.engines.gpu import Target
    from trt_wan.engines.lynx import Kind
    from trt_wan.engines.precision import Precision
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.measurements import Figure

Data = dict[str, Any]

SIZE, WINDOW = (832, 480), 77


def _targets(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        return ()
    from trt_wan.engines.gpu import TARGETS

    names = dict.fromkeys(name.strip().lower() for value in values for name in value.split(","))
    for name in names:
        if name not in TARGETS:
            raise click.BadParameter(f"{name!r} is no target; there are {', '.join(TARGETS)}.")
    return tuple(names)


@click.command(short_help="Build engines, or export the graphs, for a size.")
@click.option("--model", type=click.Choice(["14b", "tiny"]), default="14b", show_default=True)
@click.option(
    "--size",
    callback=size_option,
    metavar="WxH",
    show_default="832x480; with --check 128x128",
    help="Width x height of the video.",
)
@click.option("--window", type=int, show_default="77; with --check 9", help="Frames per window, 4k+1.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8", "int8"]),
    help="Default: fp8 where the GPU has it, else bf16; fp32 for graphs alone.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    callback=_targets,
    metavar="sm89,sm120",
    help="GPUs to build for; they may be in another machine. Default: this machine's.",
)
@click.option(
    "--flavour",
    type=click.Choice(["tensorrt", "tensorrt_rtx"]),
    help="Default: the one that suits the GPU; tensorrt_rtx for named targets.",
)
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Measure all candidates again, or none. Default: those without a figure for this GPU.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Compare every engine with ONNX Runtime, or without a GPU every graph with torch, at a small size.",
)
@click.option(
    "--sam2",
    metavar="NAME|FILE",
    help="Build SAM2's engines instead, for a model such as base_plus or for the model in a file.",
)
@click.option(
    "--vae-tiles",
    is_flag=True,
    help="Build the VAE in two tiles instead, for jobs that do not fit into GPU memory otherwise.",
)
@click.option(
    "--camera-control",
    metavar="FILE|CHANNELS",
    help="Build Uni3C's engines instead, for the model in a file, or for that many channels of its FFN.",
)
@click.option(
    "--lynx",
    type=click.Choice(["full", "lite"]),
    help="Build the networks of Lynx (run --identity) instead, for this kind of its IP adapter.",
)
@click.option(
    "--gpus",
    type=int,
    default=1,
    help="Above 1, build a GPU's share of the transformer's blocks instead, for run --gpus.",
)
@click.option("--dry-run", is_flag=True, help="List what exists and what would be built; build nothing.")
@command
def build(
    *,
    report: Report,
    model: str,
    size: tuple[int, int] | None,
    window: int | None,
    precision: "Precision | None",
    targets: "tuple[Target, ...]",
    flavour: str | None,
    measure: bool | None,
    check: bool,
    sam2: str | None,
    vae_tiles: bool,
    camera_control: str | None,
    lynx: "Kind | None",
    gpus: int,
    dry_run: bool,
) -> Any:
    """Build the engines of one size and window length for this machine's GPU, or for named ones.

    On this machine's GPU it measures the candidates for attention and for the other parts of a block; a run
    takes the fastest accurate one.

    Without a GPU and without --target it exports the graphs, which ONNX Runtime runs on the CPU. It needs no
    weights. Existing engines stay, so a build that was stopped goes on with the next one.

    \b
    trt-wan build --size 832x480 --window 77
    trt-wan build --size 832x480 --window 77 --target sm89,sm120
    trt-wan build --check
    trt-wan build --sam2 base_plus
    """
    if check:
        others = vae_tiles or camera_control or lynx or gpus != 1
        if sam2 is not None or targets or measure is not None or others or dry_run:
            raise UsageError(
                "--check compares the engines of this machine, and builds those that it needs.",
                "Leave out --sam2, --target, --measure, --vae-tiles, --camera-control, --lynx, --gpus and "
                "--dry-run.",
            )
        return _check(report, model, size, window, precision, flavour)
    if sam2 is not None:
        from trt_wan.cli.build_sam2 import build_sam2_for

        if precision is not None or measure or vae_tiles or camera_control or lynx or gpus != 1:
            raise UsageError(
                "SAM2's engines are fp16 for one GPU; it has no VAE, Uni3C, Lynx or candidate to measure.",
                "Leave out --precision, --measure, --vae-tiles, --camera-control, --lynx and --gpus.",
            )
        return build_sam2_for(report, sam2, targets, flavour, dry_run)
    window = WINDOW if window is None else window
    camera_ffn = None if camera_control is None else _camera_ffn(model, camera_control)
    if vae_tiles and camera_ffn is not None:
        raise UsageError(
            "Uni3C's engines and those of the VAE's tiles are built one by one.", "Leave one out."
        )
    return build_for(
        *(report, model, size or SIZE, window, precision, targets, flavour, measure, dry_run, vae_tiles),
        *(camera_ffn, lynx, gpus),
    )


def build_for(
    report: Report,
    model: str,
    size: tuple[int, int],
    window: int,
    precision: "Precision | None" = None,
    targets: "Sequence[Target]" = (),
    flavour: str | None = None,
    measure: bool | None = None,
    dry_run: bool = False,
    vae_tiles: bool = False,
    camera_ffn: int | None = None,
    lynx: "Kind | None" = None,
    gpus: int = 1,
) -> tuple[Result, Data]:
    """The result and the data of `trt-wan build`. `measure`: see build/goals.py."""
    from trt_wan.build.goals import goals_here, named_goal
    from trt_wan.engines.lynx import Lynx, lynx_plans
    from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan
    from trt_wan.runtime.settings import require_gpus

    require_gpus(gpus)
    if gpus > 1 and (measure or vae_tiles or camera_ffn is not None or lynx is not None):
        raise UsageError(
            "A GPU's share has the candidates that were measured for the whole, and no VAE, Uni3C or Lynx.",
            "Leave out --measure, --vae-tiles, --camera-control and --lynx.",
        )
    plan = Plan(*size, window)  # refuses a bad size before anything is looked for
    if vae_tiles:
        plan = _tile_of(plan)
    plans: tuple[Plan, ...] = (plan,)
    if camera_ffn is not None:
        plans = (CameraPlan.beside(plan, camera_ffn),)
    if lynx is not None:
        if measure or vae_tiles or camera_ffn is not None:
            raise UsageError(
                "Lynx has no candidates to measure, no VAE and no Uni3C.",
                "Leave out --measure, --vae-tiles and --camera-control.",
            )
        plans, measure = lynx_plans(plan, Lynx(ip=True, ref=True, kind=lynx)), False
    if gpus > 1:
        plans, measure = (ShardPlan.of(plan, gpus),), False
    goals = [
        goal
        for each in plans
        for goal in (
            [named_goal(each, precision, target, flavour) for target in targets]
            if targets
            else goals_here(each, precision, flavour, report.progress)
        )
    ]
    if measure and not any(goal.gpu for goal in goals):
        raise UsageError("Candidates are measured on the GPU that they are for.", "Leave --measure out.")
    if not goals:
        made = [_graphs(report, model, replace(p, precision=precision or "fp32"), dry_run) for p in plans]
        if lynx is None:
            return made[0]
        return "\n".join(str(folder) for folder, _ in made), {"plans": [data for _, data in made]}
    return _engines(report, model, goals, measure, dry_run)


def _camera_ffn(model: str, which: str) -> int:
    """Raises UsageError, and WeightsError for a file that is not Uni3C's."""
    from trt_wan.engines.config import MODELS
    from trt_wan.runtime.events import silent
    from trt_wan.runtime.weights.load import load_camera

    if which.isdecimal():
        channels = int(which) if len(which) < 9 else 0
        if 16 <= channels <= 1 << 16 and channels % 16 == 0:
            return channels
        raise UsageError(
            f"{shown(which)} channels are not possible in Uni3C's FFN: give a multiple of 16 up to 65536.",
            f"Name its file, or {MODELS[model].camera.ffn_dim}, the usual number.",
        )
    if not Path(which).exists():
        raise UsageError(f"There is no file {shown(which)}.", "Name Uni3C's file: --camera-control FILE")
    return load_camera((), Path(which), MODELS[model], "bf16", silent)[0].camera.ffn_dim


def _tile_of(plan: "Plan") -> "Plan":
    if plan.vae_tile is None:
        raise UsageError(
            f"The VAE of {plan.width}x{plan.height} cannot be cut: a tile would be as large as the whole.",
            "Leave --vae-tiles out.",
        )
    return plan.vae_tile


def _graphs(report: Report, model: str, plan: "Plan", dry_run: bool) -> tuple[Result, Data]:
    """The graphs' folder; torch is imported only if a graph is missing."""
    from trt_wan.build.compile import export_graphs
    from trt_wan.engines.config import MODELS
    from trt_wan.engines.store.graphs import graph_set

    if plan.precision != "fp32":
        again = shell_command((*plan.build_command(model), "--target", "sm89"))
        text = (
            f"Graphs in {plan.precision} are for GPUs; the CPU runs fp32. Engines made of them, for example:"
        )
        note(report, with_commands(text, again), "graphs_for_gpus", precision=plan.precision)
    graphs = graph_set(MODELS[model], plan)
    if dry_run:
        missing = list(graphs.missing())
        text = f"{len(missing)} graphs would be exported" if missing else "the graphs are there"
        return f"{text}: {graphs.folder}", {"missing_graphs": missing, "engines": []}
    start = time.perf_counter()
    count = export_graphs(MODELS[model], plan, report.progress)
    seconds, memory = round(time.perf_counter() - start, 2), _peak_memory_gb()
    if count:
        note(report, f"{count} graphs in {seconds} s, {memory} GB of memory at most")
    data = {"graphs": count, "engines": [], "seconds": seconds, "peak_memory_gb": memory}
    return graphs.folder, data


def _engines(
    report: Report, model: str, goals: "list[Goal]", measure: bool | None, dry_run: bool
) -> tuple[Result, Data]:
    """The engines' folder, or a table of the engines to build."""
    from trt_wan.build.goals import compile_goal, tune_goal
    from trt_wan.engines.config import MODELS
    from trt_wan.engines.store.manifest import folder

    start = time.perf_counter()
    reports: list[CompileReport] = []
    figures: list[Figure] = []
    for goal in goals:
        flavour = goal.flavour
        text = f"{goal.plan.precision}, {flavour.name} {flavour.version} ({flavour.reason})"
        note(report, f"{goal.target}: {text}")
        done = compile_goal(MODELS[model], goal, dry_run, report.progress)
        reports.append(done)
        if not dry_run:
            note(report, _summary(goal.target, done))
            figures += tune_goal(MODELS[model], goal, done, measure, report.progress)
    engines = [_row(goal, row) for goal, done in zip(goals, reports, strict=True) for row in done.engines]
    if dry_run:
        missing = {goal.plan: done.missing_graphs for goal, done in zip(goals, reports, strict=True)}
        names = [f"{name} ({plan.precision})" for plan, lacking in missing.items() for name in lacking]
        if names:
            note(report, f"{len(names)} graphs would be exported first.")
        return _table(engines), {"missing_graphs": names, "engines": engines}
    return folder(), {
        "graphs": sum(done.graphs for done in reports),
        "engines": engines,
        "candidates": [vars(figure) for figure in figures],
        "removed": sum(done.removed for done in reports),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gb": _peak_memory_gb(),
    }


def _summary(target: str, report: "CompileReport") -> str:
    made = [row for row in report.engines if row.manifest]
    built = [row for row in made if row.state == "built"]
    size = readable_bytes(sum(row.bytes for row in made))
    text = (
        f"{target}: {len(made)} engines, {size}; {len(built)} built in "
        f"{sum(row.seconds for row in built):.1f} s, {len(made) - len(built)} were there"
    )
    return f"{text}; {report.removed} older ones made room" if report.removed else text


def _row(goal: "Goal", row: "EngineRow") -> Data:
    return {
        "name": row.name,
        "target": row.target,
        "precision": goal.plan.precision,
        "state": row.state,
        "problem": row.problem,
        "seconds": row.seconds,
        "bytes": row.bytes,
        "key": row.manifest.key if row.manifest else None,
    }


def _table(engines: Sequence[Data]) -> str:
    rows = [("ENGINE", "TARGET", "PRECISION", "STATE", "SIZE", "BUILT IN")]
    for e in engines:
        name = (e["name"], e["target"], e["precision"])
        if e["state"] == "there":
            rows.append((*name, "there", readable_bytes(e["bytes"]), f"{e['seconds']:.1f} s"))
        else:
            rows.append((*name, "would be built", "", ""))
    return table(rows)


def _check(
    report: Report,
    model: str,
    size: tuple[int, int] | None,
    window: int | None,
    precision: "Precision | None",
    flavour: str | None,
) -> tuple[Result, Data]:
    """The table of comparisons, the worst first. Raises GraphError, which names the layer, if one fails."""
    from trt_wan.build.goals import goals_here
    from trt_wan.engines.config import MODELS
    from trt_wan.engines.shape import Plan

    try:
        from trt_wan.build.check import CHECK_SIZE, CHECK_WINDOW, check_graphs, require_right
        from trt_wan.build.check_engines import check_engines
    except ImportError as error:
        raise UsageError(
            f"--check needs packages that are not here ({error}).",
            with_commands("Run:", install_command("build")),
        ) from error
    plan = Plan(*(size or CHECK_SIZE), frames=CHECK_WINDOW if window is None else window)
    goals = goals_here(plan, precision, flavour, report.progress)
    if goals:
        checked = check_engines(MODELS[model], goals[0], report.progress)
    else:
        checked = check_graphs(MODELS[model], replace(plan, precision=precision or "fp32"), report.progress)
    text = _check_table(checked)
    try:
        require_right(checked)
    except GraphError:
        note(report, text)  # the table is no result, but it shows the right rows
        raise
    return text, {"checks": [vars(row) for row in checked]}


def _check_table(checked: "Sequence[Checked]") -> str:
    rows = [("NETWORK", "COMPUTED BY", "ERROR", "TOLERANCE", "VERDICT")]
    rows += [
        (row.network, row.computed_by, f"{row.error:.1e}", f"{row.tolerance:.1e}", row.verdict)
        for row in checked
    ]
    return table(rows)


def _peak_memory_gb() -> float | None:
    from trt_wan.runtime.host_memory import peak_bytes

    peak = peak_bytes()
    return None if peak is None else round(peak / 1e9, 2)
