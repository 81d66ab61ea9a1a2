"""The options of `run` about several pictures of the character (runtime/references.py)."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.options import group
from trt_wan.runtime.references import MOST, USES, References

NAMES = ("more_references", "reference_as")
OPTIONS = [
    click.option(
        "--reference",
        "more_references",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        multiple=True,
        metavar="PICTURE",
        help="Another picture of the character; the main one is REFERENCE or src_ref.png. May be repeated: "
        f"{MOST} in all are possible.",
    ),
    click.option(
        "--reference-as",
        type=click.Choice(list(USES)),
        show_default=References.use,
        help="; ".join(f"{use}: {about}" for use, about in USES.items()) + ".",
    ),
]


reference_options = group(OPTIONS)


def take_references(given: dict[str, Any]) -> References | None:
    """Takes the options out of `given`. Raises UsageError, and InputError for unreadable ones."""
    pictures, use = (given.pop(name) for name in NAMES)
    if not pictures and use is None:
        return None
    references = References(pictures, use or References.use)
    for path in pictures:
        from trt_wan.runtime.video.pictures import read_transparent

        read_transparent(path)
    return references


def require_others(references: References | None, main: Path | None) -> None:
    """Raises UsageError for a picture that is REFERENCE too."""
    if references is not None and main is not None:
        references.require_others(main)
