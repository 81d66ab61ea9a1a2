"""The options of `run` about the step cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.options import group, is_typed, refuse_without

if TYPE_CHECKING:
    from trt_wan.runtime.step_cache import StepCache

FIELDS = {"step_cache_most": "most", "step_cache_retention": "retention", "step_cache_ratios": "file"}

step_cache_options = group(
    [
        click.option(
            "--step-cache",
            type=float,
            metavar="THRESHOLD",
            show_default="0, off",
            help="MagCache: skip the blocks in steps that change little, 0.06 for example. For 15 steps and "
            "more, with the ratios that `bench calibrate-cache` makes.",
        ),
        click.option(
            "--step-cache-most", type=int, show_default="2", help="Steps that it skips in a row at most."
        ),
        click.option(
            "--step-cache-retention",
            type=float,
            show_default="0.2",
            metavar="SHARE",
            help="Share of the steps, from the first, that it never skips.",
        ),
        click.option(
            "--step-cache-ratios",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            help="File of its ratios. Default: those that were made for these weights, LoRAs and steps.",
        ),
    ]
)


def take_step_cache(given: dict[str, Any]) -> "StepCache | None":
    """Takes its options out of `given`. None: it is off. Raises UsageError."""
    threshold = given.pop("step_cache")
    values = {field: value for name, field in FIELDS.items() if (value := given.pop(name)) is not None}
    if not threshold:
        refuse_without("--step-cache", [name for name in FIELDS if is_typed(name)], "--step-cache 0.06")
        return None
    from trt_wan.runtime.step_cache import StepCache

    return StepCache(threshold, **values)
