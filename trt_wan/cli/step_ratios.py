"""The ratios of the step cache for a run, and the command that makes them where there are none."""

from typing import TYPE_CHECKING

import click

from trt_wan.cli.repeating import given_options
from trt_wan.errors import shell_command, with_commands

if TYPE_CHECKING:
    from trt_wan.runtime.events import Progress
    from trt_wan.runtime.job import Job
    from trt_wan.runtime.opening.model import Basis

# Options of `run` that `bench calibrate-cache` has too: they decide the weights, the steps or the machine.
SHARED = (
    *("weights", "transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "random_weights"),
    *("executor", "precision", "tier", "attention_keep", "flavour", "segments", "vram", "text_cache"),
    *("mode", "preset", "loras", "prompt", "negative_prompt", "steps", "guidance", "seed", "sampler", "grid"),
    *("shift", "sigmas", "window", "build"),
)


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
