"""`trt-wan doctor`: what is here, what is missing, what each automatic choice will be and why."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command
from trt_wan.cli.report import Report, TextReport, table
from trt_wan.errors import EnvironmentBroken

if TYPE_CHECKING:
    from trt_wan.checks.check import Check


@click.command(short_help="Check the machine, the packages and the weights.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder with the checkpoints, as for run; may be repeated.",
)
@command
def doctor(*, report: Report, weights: tuple[Path, ...]) -> Any:
    """Check what `trt-wan run` needs: GPU, packages, folders, weights. Each line is ok, a warning or a fault,
    the last two with what helps. Exit code 1 if a run cannot work.

    \b
    trt-wan doctor --weights ~/ComfyUI
    """
    from trt_wan.checks.machine import found_gpu, machine_checks, precision_check
    from trt_wan.checks.packages import package_checks
    from trt_wan.checks.places import graphs_check, place_checks
    from trt_wan.checks.weights import weights_checks
    from trt_wan.engines.config import ANIMATE_14B
    from trt_wan.runtime.events import Note

    gpu = found_gpu()
    machine, flavour = machine_checks(gpu)
    choice, precision = precision_check(gpu, flavour)
    checks = [*package_checks(None if isinstance(gpu, str) else gpu), *machine, choice]
    weights_found, config = weights_checks(weights, precision)
    checks += [*place_checks(), graphs_check(config or ANIMATE_14B, precision), *weights_found]
    for check in checks:
        if not isinstance(report, TextReport):
            report.progress(Note(check.text, "check", dataclasses.asdict(check)))
    text = described(checks)
    faults = [check.topic for check in checks if check.state == "fault"]
    if not faults:
        return text, {"warnings": sum(check.state == "warning" for check in checks)}
    if isinstance(report, TextReport):
        click.echo(text)
    topics = ", ".join(dict.fromkeys(faults))
    raise EnvironmentBroken(f"A run cannot work here: {topics}.", "What helps stands above.")


def described(checks: "Sequence[Check]") -> str:
    """The checks as a table, then the fixes, each with its commands."""
    rows = [
        (check.state if check.state == "ok" else check.state.upper(), check.topic, check.text)
        for check in checks
    ]
    helps = ["\n".join((f"{check.topic}: {check.fix}", *check.commands)) for check in checks if check.fix]
    return "\n\n".join([table(rows), *helps])
