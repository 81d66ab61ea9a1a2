"""`--colour-match` and `--colour-anchor`, as one value of the job."""

from typing import TYPE_CHECKING

import click

from trt_wan.cli.options import group
from trt_wan.errors import UsageError

if TYPE_CHECKING:
    from trt_wan.runtime.colour import Colour

METHODS = (
    "mkl",
    "hm",
    "reinhard",
    "mvgd",
    "hm-mvgd-hm",
    "hm-mkl-hm",
)  # a test compares them with the runtime's


def _match(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, float] | None:
    """METHOD or METHOD:STRENGTH."""
    if value is None:
        return None
    method, colon, number = value.partition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:
        strength = 0.0
    if method not in METHODS or not 0 < strength <= 1:
        raise click.BadParameter(
            f"{value!r} is not METHOD or METHOD:STRENGTH, such as mkl:0.5, above 0 and up to 1. "
            f"Methods: {', '.join(METHODS)}."
        )
    return method, strength


COLOUR = (
    click.option(
        "--colour-match",
        callback=_match,
        metavar="METHOD[:STRENGTH]",
        help=f"Match the colours of every window: {', '.join(METHODS)}. Default: off.",
    ),
    click.option(
        "--colour-anchor",
        type=click.Choice(["first", "carried", "reference"]),
        help="Match to the first window, to the frames carried over, or each frame to the reference. "
        "Default: first.",
    ),
)


colour_options = group(COLOUR)


def colour_of(match: tuple[str, float] | None, anchor: str | None) -> "Colour | None":
    """Raises UsageError for an anchor without a match."""
    if match is None:
        if anchor is not None:
            raise UsageError(
                "Without a method --colour-anchor would do nothing.",
                "Add --colour-match mkl, or leave it out.",
            )
        return None
    from trt_wan.runtime.colour import Colour

    return Colour(*match, anchor or "first")  # type: ignore[arg-type]  # click has checked it
