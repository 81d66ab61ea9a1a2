"""The options of `trt-wan run` that choose noise levels one by one, and a part of the steps."""

from pathlib import Path

import click

from trt_wan.cli.options import group, is_typed
from trt_wan.errors import UsageError

REPLACED = ("steps", "grid", "shift")  # by --sigmas


def _levels(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        return tuple(map(float, value.split(","))) if value is not None else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,0.94,0.83,0.62,0.") from None


sampling_options = group(
    [
        click.option(
            "--sigmas",
            callback=_levels,
            metavar="A,B,…",
            help="Noise levels of your own, falling from at most 1, in place of --steps, --grid and --shift.",
        ),
        click.option(
            "--init",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            help="Start from this video, noised, of the length and size of the prepared clips.",
        ),
        click.option(
            "--denoise-strength",
            type=float,
            default=1.0,
            show_default=True,
            help="With --init, the share of the steps that is run.",
        ),
        click.option("--start-step", type=int, default=0, show_default=True, help="The first step to run."),
        click.option("--end-step", type=int, help="The step to stop before; noise stays in the picture."),
    ]
)


def refuse_unused_sampling() -> None:
    """Raises UsageError for options that --sigmas replaces."""
    given = [name for name in REPLACED if is_typed(name)]
    if given and click.get_current_context().params["sigmas"]:
        raise UsageError(
            f"--sigmas names every noise level, so --{given[0]} would do nothing.",
            f"Leave out --sigmas, or --{given[0]}.",
        )
