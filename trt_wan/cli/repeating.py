"""`run --from VIDEO` and `--resume`: the options of an earlier run, and the command line of this one.

A record has the options that were given to `run`, as they were typed, with those of a preset in its place.
`--from` puts them below the command line's (click's default_map), so an option that is given wins.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import note
from trt_wan.cli.options import is_given
from trt_wan.cli.preprocess import PREPARING_NAMES
from trt_wan.cli.report import Report
from trt_wan.cli.sections import SectionedCommand
from trt_wan.errors import InputError, UsageError, shown

if TYPE_CHECKING:
    from trt_wan.runtime.kept.record import Difference, Record

# Options that decide no bit, or belong to one run.
OWN = {
    *("output", "overwrite", "resume", "sidecar", "repeated", "dry_run", "as_json", "quiet", "build", "vram"),
    "frames",
    *("text_cache", "preset", "reference", "clip", *(PREPARING_NAMES - {"compat"})),
}
# Files that are found without being named.
SEARCHED = ("weights", "transformer", "vae", "text_encoder", "image_encoder", "tokenizer")
# The options that name the file of a role; `inputs` names those of all clips.
OPTION_OF = {"sound": "audio", "reference": "inputs", "pose": "inputs", "face": "inputs"}
OPTION_OF |= {"background": "inputs", "mask": "inputs"}
ARGUMENTS, GIVEN = "trt_wan.arguments", "trt_wan.given"
TYPED = (str, bool, list, tuple)  # click has a value of its own for an argument that is not there
MOST_TOLD = 5


@dataclass(frozen=True)
class Lasting:
    """The options for the record of a run, and the run that it repeats or resumes."""

    options: Mapping[str, Any] = field(default_factory=dict)  # names of files without folders
    paths: Mapping[str, Any] = field(default_factory=dict)  # options that name files, with folders
    resume: bool = False
    sidecar: bool = True
    repeated: "Repeated | None" = None


@dataclass(frozen=True)
class Repeated:
    path: Path
    record: "Record"

    def check(self, report: Report, now: "Record", given: Mapping[str, Any]) -> None:
        """Raises UsageError for differences that were not asked for; notes for the rest."""
        asked: list[Difference] = []
        unasked: list[Difference] = []
        for difference in self.record.differences(now):
            names = {difference.name.split()[0], OPTION_OF.get(difference.name, "weights")}
            is_asked = difference.group == "model" or not names.isdisjoint({*given, *_meant(given)})
            (asked if is_asked else unasked).append(difference)
        if unasked:
            raise UsageError(
                f"This would not repeat {self.path.name}: {_told(unasked)}.",
                "Give the same files, or the options that you want to change.",
            )
        if asked:
            text = f"Not the same as {self.path.name}: {_told(asked)}."
            note(report, text, "not_repeated", differences=[difference.text for difference in asked])
        if others := self.record.other_versions(now):
            text = f"{self.path.name} was made with {', '.join(others)}: bits may differ."
            note(report, text, "other_versions", versions=others)


def _meant(given: Mapping[str, Any]) -> set[str]:
    """A picture and a clip stand for --inputs; a preset for its settings."""
    from trt_wan.runtime.presets import RECIPE_FIELDS

    meant = {"inputs"} if "reference" in given else set()
    return meant | ({*RECIPE_FIELDS, "loras"} if "preset" in given else set())


def _told(differences: "Sequence[Difference]") -> str:
    more = len(differences) - MOST_TOLD
    told = "; ".join(difference.text for difference in differences[:MOST_TOLD])
    return f"{told}; and {more} more" if more > 0 else told


class RepeatableCommand(SectionedCommand):
    """Keeps the arguments as they were typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        if not ctx.resilient_parsing and "--help" not in args:
            typed, _, _ = self.make_parser(ctx).parse_args(list(args))
            ctx.meta[GIVEN] = {name: value for name, value in typed.items() if isinstance(value, TYPED)}
        return super().parse_args(ctx, args)


def this_command(*more: str) -> str:
    """The command line of this run with `more` options, to be pasted."""
    arguments = click.get_current_context().meta.get(ARGUMENTS, [])
    return shlex.join(("trt-wan", "run", *arguments, *(option for option in more if option not in arguments)))


def given_options() -> dict[str, Any]:
    """The typed options, by the parameters' names."""
    given: dict[str, Any] = click.get_current_context().meta.get(GIVEN, {})
    return given


def lasting(made: Mapping[str, Any], inputs: Path, **chosen: Any) -> Lasting:
    """`made` are the values of all options, with those of a preset. Equal runs get equal options, also where
    one names a default or has its files in other folders.
    """
    from trt_wan.runtime.presets import RECIPE_FIELDS

    context = click.get_current_context()
    values = {name: value for name, value in {**(context.default_map or {}), **given_options()}.items()}
    if "reference" in given_options():  # the prepared clips have these frames alone
        values = {name: value for name, value in values.items() if name not in ("start", "end")}
    if "preset" in given_options():
        values |= {name: made[name] for name in RECIPE_FIELDS}
        values["loras"] = [f"{lora.file}:{lora.strength!r}" for lora in made["loras"]]
    paths: dict[str, Any] = {"inputs": str(inputs.absolute())}
    options = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in values or name in {*OWN, *paths}:
            continue
        if _names_files(parameter):
            paths[name] = _absolute(values[name])
            if name not in SEARCHED:
                options[name] = _without_folder(values[name])
        elif (value := parameter.type_cast_value(context, values[name])) != parameter.default or (
            name == "window" and "context" in values and is_given(name)  # with context windows it says more
        ):
            options[name] = list(value) if isinstance(value, tuple) else value
    return Lasting(options, paths, **chosen)


def _names_files(parameter: click.Parameter) -> bool:
    return parameter.name == "loras" or isinstance(parameter.type, click.Path)


def _absolute(value: Any) -> Any:
    return (
        [_absolute(item) for item in value]
        if isinstance(value, list | tuple)
        else str(Path(value).absolute())
    )


def _without_folder(value: Any) -> Any:
    return [_without_folder(item) for item in value] if isinstance(value, list | tuple) else Path(value).name


def repeat(ctx: click.Context, param: click.Parameter, value: Path | None) -> Repeated | None:
    """The callback of --from, before all others. Raises BadParameter for files that are nowhere."""
    if value is None or ctx.resilient_parsing:
        return None
    from trt_wan.runtime.kept.record import read_record

    try:
        record = read_record(value)
    except InputError as error:
        raise click.BadParameter(f"{error.message} {error.hint}", ctx, param) from error
    given = ctx.meta.get(GIVEN, {})
    with_folders = record.paths.get("options", {})
    folders = [value.parent, Path(), *(Path(folder) for folder in given.get("weights") or ())]
    values: dict[str, Any] = {}
    missing = []
    known = {parameter.name: parameter for parameter in ctx.command.params}
    skipped = OWN | set(given) | ({"inputs"} if given.get("reference") else set())
    prepared = {"inputs": f"{value.stem}.inputs"}
    for name, typed in {**prepared, **record.options, **with_folders}.items():
        if name in skipped or name not in known:
            continue
        names = typed if isinstance(typed, list) else [typed]
        if not _can_be(known[name], typed, names, ctx):
            text = f"{value.name} has a value of {known[name].opts[0]} that it cannot have: {shown(typed)}."
            raise click.BadParameter(text, ctx, param)
        if not _names_files(known[name]):
            values[name] = typed
            continue
        found = [_found(file, name == "loras", folders) for file in names]
        if None not in found:
            values[name] = found if isinstance(typed, list) else found[0]
        elif name not in SEARCHED:
            lost = [Path(file).name for file, place in zip(names, found, strict=True) if place is None]
            missing.append(f"{shown(', '.join(lost))} ({known[name].opts[0]})")
    if missing:
        raise click.BadParameter(
            f"Not found: {'; '.join(missing)}. Name what is in another place with these options.", ctx, param
        )
    ctx.default_map = values
    return Repeated(value, record)


def _can_be(parameter: click.Parameter, typed: Any, values: list[Any], ctx: click.Context) -> bool:
    """False for a value of a kind that a command line does not give: the record has been changed."""
    if _names_files(parameter):
        return all(isinstance(value, str) for value in values)
    try:
        return parameter.type_cast_value(ctx, typed) is not None
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False


def _found(file: str, with_strength: bool, folders: Sequence[Path]) -> str | None:
    """`file` where it was, else by its name in one of `folders`."""
    path, colon, strength = (
        file.rpartition(":") if with_strength and not os.path.exists(file) else (file, "", "")
    )
    places = [Path(path), *(folder / Path(path).name for folder in folders)]
    return next((f"{place}{colon}{strength}" for place in places if os.path.exists(place)), None)
