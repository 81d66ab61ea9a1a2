"""`trt-wan bench --gpus 1,2,4`: how one job scales over the GPUs of this machine."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.bench_report import finished, keeping
from trt_wan.cli.options import Decorator, group, refuse_without
from trt_wan.cli.report import Report
from trt_wan.errors import UsageError, shown

if TYPE_CHECKING:
    from trt_wan.benchmarks.peers.shape import Shape

OWN = ("sizes", "budget", "throughput", "dry_run")
OTHERS = ("size", "steps", "rounds", "jobs", "peers", "peer_steps", "lightx2v", "cold", "repeat")


def _gpus(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in (value or "").split(",")] if value is not None else []
    if not all(re.fullmatch("[1-9][0-9]{0,3}", part) for part in parts):
        raise click.BadParameter(f"{shown(value)!r} is not a list of numbers of GPUs such as 1,2,4.")
    numbers = sorted(map(int, parts))
    twice = [n for n, next_one in zip(numbers, numbers[1:], strict=False) if n == next_one]
    if twice:
        raise click.BadParameter(f"{twice[0]} is there twice; each number of GPUs is measured once.")
    return tuple(numbers)


def scaling_options(sizes: Callable[..., Any]) -> Decorator:
    """`sizes` is the callback of --sizes."""
    return group(
        (
            click.option(
                "--gpus",
                callback=_gpus,
                metavar="N,…",
                help="Measure how a job scales instead, over 1,2,4 GPUs.",
            ),
            click.option("--sizes", callback=sizes, metavar="WxH,…", help="With --gpus: several sizes."),
            click.option(
                "--budget",
                type=click.FloatRange(min=1),
                metavar="SECONDS",
                help="With --gpus: start nothing that would take longer.",
            ),
            click.option(
                "--throughput/--no-throughput",
                default=True,
                help="With --gpus: also time a job on each GPU, all at once. Default: yes.",
            ),
            click.option("--dry-run", is_flag=True, help="With --gpus: say what would be measured."),
        )
    )


def _is_typed(name: str) -> bool:
    """`bench` itself has parsed the command line, and has invoked the command behind it."""
    context: click.Context | None = click.get_current_context()
    while context is not None:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            return True
        context = context.parent
    return False


def take_scaling(options: dict[str, Any]) -> dict[str, Any] | None:
    """Takes the options of `scaling_options` out of `options`; None without --gpus. Raises UsageError for
    options that would do nothing.
    """
    gpus, own = options.pop("gpus"), {name: options.pop(name) for name in OWN}
    if not gpus:
        refuse_without("--gpus", [name for name in OWN if _is_typed(name)], "--gpus 1,2")
        return None
    both = own["sizes"] and _is_typed("size")
    idle = [name for name in OTHERS if _is_typed(name) and (name != "size" or both)]
    if idle:
        option = f"--{idle[0].replace('_', '-')}"
        use = {"size": "--sizes alone", "steps": "--job-steps, the steps of a window"}.get(idle[0])
        raise UsageError(
            f"With --gpus {option} would do nothing.", f"Use {use}." if use else f"Leave {option} out."
        )
    return {"gpus": gpus, **own}


def scale(
    report: Report,
    shapes: "Sequence[Shape]",
    settings: Mapping[str, Any],
    scaling: Mapping[str, Any],
    steps: int,
    weights: Path | None,
    out: Path | None,
) -> Any:
    from trt_wan.benchmarks.measure.scaling import Wanted, announced, measure_scaling
    from trt_wan.benchmarks.report.scaling import gpus_text
    from trt_wan.runtime.settings import Settings

    assert Settings(**{**settings, "gpus": max(scaling["gpus"])}), "UsageError for too many"
    wanted = Wanted(
        *(shapes, scaling["gpus"], settings, steps, str(weights) if weights else None),
        *(scaling["budget"], scaling["throughput"]),
    )
    if scaling["dry_run"]:
        plan = announced(wanted)
        lines = [
            f"{gpus_text(row['gpus'])}: {', '.join(row['sizes'])}, {steps} steps"
            + ("" if row["possible"] else " (not here: this machine has fewer)")
            for row in plan
        ]
        return "\n".join(lines), {"plan": plan}

    with keeping(out, report) as keep:
        measured = measure_scaling(wanted, report.progress, keep)
    there = {(row.gpus, row.shape) for row in measured.rows}
    possible = [row["gpus"] for row in announced(wanted) if row["possible"]]
    missing = [str(n) for n in possible if any((n, shape) not in there for shape in shapes)]
    again = f"Run it again with --gpus {','.join(missing)}" if missing else "Run it again"
    return finished(report, measured, out, measured.lost, again)
