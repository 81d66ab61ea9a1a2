"""The options of `trt-wan run` about context windows."""

from typing import Any

import click

from trt_wan.cli.options import group, is_given, refuse_without
from trt_wan.runtime.context.settings import FUSES, SCHEDULES, Context


def _rows(table: Any) -> str:
    return "; ".join(f"{name}: {about}" for name, about in table.items()) + "."


OPTIONS = (
    click.option(
        "--context",
        type=click.Choice(list(SCHEDULES)),
        help="Denoise the whole video, or with --window that many frames of it, as one latent in parts that "
        f"overlap. {_rows(SCHEDULES)}",
    ),
    click.option(
        "--context-frames", type=int, default=Context.frames, show_default=True, help="Frames per part, 4k+1."
    ),
    click.option(
        "--context-stride",
        type=int,
        default=Context.stride,
        show_default=True,
        help="Frames from one latent of a part to the next: 4 to 7 mean consecutive ones.",
    ),
    click.option(
        "--context-overlap",
        type=int,
        default=Context.overlap,
        show_default=True,
        help="Frames that neighbouring parts share at least, in steps of 4.",
    ),
    click.option(
        "--context-fuse",
        type=click.Choice(list(FUSES)),
        default=Context.fuse,
        show_default=True,
        help=_rows(FUSES),
    ),
    click.option(
        "--freenoise/--no-freenoise",
        default=True,
        show_default=True,
        help="Later parts start from the noise of earlier ones, in another order.",
    ),
)
NAMES = {
    **{f"context_{name}": name for name in ("frames", "stride", "overlap", "fuse")},
    "freenoise": "freenoise",
}


context_options = group(OPTIONS)


def take_context(given: dict[str, Any]) -> Context | None:
    """Takes the options out of `given`. Raises UsageError for those that would do nothing."""
    schedule = given.pop("context")
    settings = {field: given.pop(name) for name, field in NAMES.items()}
    if schedule is None:
        named = [
            f"no_{name}" if settings[field] is False else name
            for name, field in NAMES.items()
            if is_given(name)
        ]
        refuse_without("context windows", named, "--context static_standard")
        return None
    return Context(schedule, **settings, whole=not is_given("window"))
