"""Groups of options, and whether one was given."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from trt_wan.errors import UsageError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


gpus_option = click.option(
    "--gpus",
    type=int,
    default=1,
    show_default=True,
    help="GPUs that share each job, a process each: the first that CUDA_VISIBLE_DEVICES names. On the CPU, "
    "processes.",
)


def group(options: Sequence[Decorator]) -> Decorator:
    """A decorator that gives a command all options, in this order in its help."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def is_typed(name: str) -> bool:
    """Whether the option is on the command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def is_given(name: str) -> bool:
    """Whether it is typed, or comes from the video of `run --from`."""
    source = click.get_current_context().get_parameter_source(name)
    return is_typed(name) or source is click.core.ParameterSource.DEFAULT_MAP


def refuse_without(needed: str, options: Sequence[str], fix: str) -> None:
    """Raises UsageError if there are `options` (names): without `needed` they do nothing."""
    if options:
        option = f"--{options[0].replace('_', '-')}"
        raise UsageError(f"Without {needed} {option} would do nothing.", f"Add {fix}, or leave out {option}.")
