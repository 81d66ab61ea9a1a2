"""`run --from VIDEO --redo N`: renders windows of a finished video again (runtime/redo.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import note
from trt_wan.cli.options import is_typed
from trt_wan.cli.repeating import Repeated
from trt_wan.cli.report import Report
from trt_wan.errors import UsageError

if TYPE_CHECKING:
    from trt_wan.runtime.job import Job
    from trt_wan.runtime.kept.record import Record
    from trt_wan.runtime.redo import Again
    from trt_wan.runtime.video.clips import Clips

MOST_WINDOWS = 10**6
# Options that --redo leaves nothing to do for, and the reason.
UNUSED = {
    "reference": "the clips are those of the video",
    "clip": "the clips are those of the video",
    "resume": "a stopped one leaves the video as it was",
    "frames": "the other windows are in the video alone, encoded",
}


def _numbers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    numbers = [text.strip() for value in values for text in value.split(",")]
    for text in numbers:
        if not (text.isascii() and text.isdigit() and len(text) < len(str(MOST_WINDOWS))):
            raise click.BadParameter(
                f"{text!r} is not the number of a window, such as 3, or a list such as 3,5."
            )
    return tuple(sorted({int(text) for text in numbers}))


redo_option = click.option(
    "--redo",
    multiple=True,
    callback=_numbers,
    metavar="N[,N…]",
    help="With --from: render these windows of that video again (the first is 1), with --seed or the next "
    "seed, and copy the others. Without -o the video itself is replaced (-y). Each also ends with the frames "
    "that the next window goes on from: the model was not trained for that.",
)


@dataclass(frozen=True)
class Redo:
    video: Path
    record: "Record"
    seeds: Mapping[int, int]  # by the windows' numbers, from 1

    def planned(self, job: "Job", clips: "Clips") -> "list[Again]":
        """Raises TrtWanError for windows and videos with which it cannot be done."""
        from trt_wan.runtime.redo import require_redoable, windows_again
        from trt_wan.runtime.video.continued import frames_before

        before = frames_before(job.inputs, job.overlap, clips.width, clips.height, clips.rate)
        known = 0 if before is None else len(before)
        again = windows_again(job, self.seeds, clips.frames, known)
        require_redoable(job, self.video, again, clips, known)
        return again

    def tell(self, report: Report, again: "list[Again]") -> None:
        for one in again:
            text = f"Rendered again: {one.text}."
            data = {"window": one.j + 1, "frames": [one.frames.start, one.frames.stop], "seed": one.seed}
            note(report, text, "redo", **data, tied=one.tied)

    def in_record(self, record: "Record") -> "Record":
        """Raises OutputError."""
        from trt_wan.runtime.kept.redone import with_redone
        from trt_wan.runtime.video.target import explained

        with explained(self.video):
            return with_redone(record, self.record, self.seeds, self.video)


def redo_of(numbers: tuple[int, ...], repeated: Repeated | None, given: Mapping[str, Any]) -> Redo | None:
    """Raises UsageError for options that do not go together. The `given` seed is that of the windows."""
    if not numbers:
        return None
    if repeated is None:
        raise UsageError(
            "--redo renders windows of a finished video again, and none is named.", "Add --from VIDEO."
        )
    if repeated.path.suffix.lower() == ".json":
        raise UsageError(
            f"{repeated.path} is the record of a video; --redo copies the other windows from the video.",
            "Name the video itself with --from.",
        )
    context = click.get_current_context()
    for parameter in context.command.params:
        if (reason := UNUSED.get(str(parameter.name))) and is_typed(str(parameter.name)):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name).upper()
            raise UsageError(f"{name} would do nothing with --redo: {reason}.", f"Leave out {name}.")
    from trt_wan.runtime.kept.redone import seeds_of

    seed = given["seed"] if is_typed("seed") else None
    return Redo(repeated.path, repeated.record, seeds_of(repeated.record, dict.fromkeys(numbers, seed)))
