"""The option --size of all commands."""

import re

import click

from trt_wan.errors import shown

Size = tuple[int, int]  # width, height


def size_of(text: str) -> Size:
    """Raises BadParameter. Multiples of 16 and the largest size are checked where a size is used."""
    if match := re.fullmatch(r"([1-9][0-9]{0,5})[x×]([1-9][0-9]{0,5})", text):
        return int(match[1]), int(match[2])
    raise click.BadParameter(f"{shown(text)!r} is not a size such as 832x480.")


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> Size | None:
    """The callback of an option."""
    return None if value is None else size_of(value)
