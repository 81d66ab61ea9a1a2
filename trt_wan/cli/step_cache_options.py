"""The options of `run` about the step cache, and the command that makes the ratios that it needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.options import group, is_typed
from trt_wan.errors import UsageError, shell_command, with_commands

if TYPE_CHECKING:
    from trt_wan.runtime.events import Progress
    from trt_wan.runtime.job import Job
    from trt_wan.runtime.opening.model import Basis
    from trt_wan.runtime.step_cache import StepCache

FIELDS = {"step_cache_most": "most", "step_cache_retention": "retention", "step_cache_ratios": "file"}
# Options of `run` that `bench calibrate-cache` has too: they decide the weights, the steps or the machine.
SHARED = (
    *("weights", "transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "random_weights"),
    *("executor", "precision", "tier", "attention_keep", "flavour", "segments", "vram", "text_cache"),
    *("mode", "preset", "loras", "prompt", "negative_prompt", "steps", "guidance", "seed", "sampler", "grid"),
    *("shift", "sigmas", "window", "build"),
)

step_cache_options = group(
    [
        click.option(
            "--step-cache",
            type=float,
            metavar="THRESHOLD",
            show_default="0, off",
            help="MagCache: skip the blocks in steps that change little, 0.06 for example. For 15 steps and "
            "more, with ratios from `trt-wan bench calibrate-cache`.",
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
    if not threshold and (typed := [name for name in FIELDS if is_typed(name)]):
        option = f"--{typed[0].replace('_', '-')}"
        raise UsageError(
            f"Without --step-cache {option} would do nothing.",
            f"Add --step-cache 0.06, or leave out {option}.",
        )
    if not threshold:
        return None
    from trt_wan.runtime.step_cache import StepCache

    return StepCache(threshold, **values)


def with_ratios(basis: "Basis", job: "Job", width: int, height: int, progress: "Progress") -> "Job":
    """`job` with the ratios of its step cache. Raises TrtWanError; without any the hint has the command that
    makes them, with the options of this one.
    """
    if job.step_cache is None:
        return job
    from trt_wan.runtime.step_ratios import COMMAND, NotCalibrated

    try:
        return basis.with_ratios(job, progress)
    except NotCalibrated as error:
        more = [f"--size={width}x{height}", f"--window={job.model_window}", *_typed_again()]
        hint = with_commands(error.hint.partition("\n")[0], shell_command((*COMMAND, *more)))
        raise NotCalibrated(error.message, hint, (*COMMAND, *more)) from error


def _typed_again() -> list[str]:
    """The shared options of this command, as they were typed here or for the video of --from."""
    from trt_wan.cli.repeating import given_options

    context = click.get_current_context()
    typed = {**(context.default_map or {}), **given_options()}
    made = []
    for option in context.command.params:
        if option.name not in SHARED or option.name not in typed or not isinstance(option, click.Option):
            continue
        value = typed[option.name]
        if not option.is_flag and option.name != "window":
            values = value if isinstance(value, list | tuple) else [value]
            made += [f"{max(option.opts, key=len)}={one}" for one in values]
    return made
