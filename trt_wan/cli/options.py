"""Groups of options, and whether one was given."""

from collections.abc import Callable, Sequence
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


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
