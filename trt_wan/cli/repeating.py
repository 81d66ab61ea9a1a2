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

from trt_wan.cli import (
    camera_options,
    context_options,
    guidance_options,
    identity_options,
    reference_options,
    step_cache_options,
)
from trt_wan.cli.command import note
from trt_wan.cli.options import is_given
from trt_wan.cli.preprocess import PREPARING_NAMES
from trt_wan.cli.report import Report
from trt_wan.cli.sections import SectionedCommand
from trt_wan.errors import InputError, UsageError, shell_command, shown, with_commands

if TYPE_CHECKING:
    from trt_wan.runtime.kept.record import Difference, Record
    from trt_wan.runtime.kept.redone import Redone

# Options that decide no bit, or belong to one run.
OWN = {
    *("output", "overwrite", "resume", "sidecar", "repeated", "dry_run", "as_json", "quiet", "build", "vram"),
    "frames",
    *("text_cache", "preset", "reference", "clip", "redo", *(PREPARING_NAMES - {"compat"})),
}
# Files that are found without being named.
SEARCHED = (
    *("weights", "transformer", "vae", "text_encoder", "image_encoder", "camera_control"),
    *("lynx", "tokenizer"),
)
# The options that decide a part of a record, where its name is not the option's.
CUT = ("start", "end")
LYNX = ("lynx_resampler", "lynx_ip", "lynx_ref")  # engines.checkpoint.LYNX_PARTS, whose import is slow
OPTIONS_OF: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("reference", "pose", "face", "width", "height", "rate"), ("inputs",)),
    **dict.fromkeys(("background", "mask"), ("inputs", "mode")),
    **dict.fromkeys(SEARCHED, ("weights", "random_weights")),
    **dict.fromkeys(("clip_vision", "second"), tuple(guidance_options.CLIP_VISION)),
    **dict.fromkeys(("identity", "picture", "embedder"), identity_options.NAMES),
    **dict.fromkeys(LYNX, (*identity_options.NAMES, "lynx", "weights")),
    **dict.fromkeys(("references", "pictures"), reference_options.NAMES),
    "frames": ("inputs", "trim_to_shortest", *CUT),
    "sound": ("inputs", "audio"),
    "kind": ("output",),
    "cut": CUT,
    "cfg_zero_star": ("guidance",),  # it does nothing without
    "behind": ("reference_background",),
    "nag": ("nag_prompt", *guidance_options.NAG),
    "colour": ("colour_match", "colour_anchor"),
    **dict.fromkeys(("camera", "render"), ("camera", *camera_options.FIELDS)),
    "context": (*context_options.NAMES, "window"),
    # Its ratios follow from the weights and the levels.
    "step_cache": (
        *(*step_cache_options.FIELDS, *SEARCHED, "random_weights", "loras", "guidance"),
        *("steps", "sampler", "grid", "shift", "sigmas"),
    ),
}
# Options that leave no room for each other: one that is given takes the place of the video's.
EITHER: Sequence[tuple[Sequence[str], Sequence[str]]] = (
    (("sigmas",), ("steps", "grid", "shift")),
    (("start_frame",), ("extend",)),
    (("denoise_strength",), ("start_step",)),
    (("random_weights",), SEARCHED),
    (("no_clip",), [name for name in guidance_options.CLIP_VISION if name != "no_clip"]),
)
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

    def check(self, report: Report, now: "Record", given: Mapping[str, Any], redo: bool = False) -> None:
        """Raises UsageError for differences that were not asked for, with `redo` for all. Notes others."""
        from trt_wan.runtime.kept.redone import plain, redone_of

        steps = redone_of(self.record)
        numbers = ", ".join(map(str, sorted({number for step in steps for number in step.seeds})))
        asked: list[Difference] = []
        unasked: list[Difference] = []
        for difference in plain(self.record).differences(now):
            is_asked = not deciding(difference.name).isdisjoint({*_displaced(given), *_meant(given)})
            is_asked |= difference.group == "model"
            (asked if is_asked else unasked).append(difference)
        if redo and (other := [each for each in (*asked, *unasked) if each.group != "model"]):
            raise UsageError(
                f"--redo changes the seed of windows and nothing else of {self.path.name}: {_told(other)}.",
                "Give the same files and no other options, or leave out --redo.",
            )
        if unasked:
            raise UsageError(
                f"This would not repeat {self.path.name}: {_told(unasked)}.",
                "Give the same files, or the options that you want to change.",
            )
        if steps and not redo:
            if not asked and "seed" not in given:
                raise self._not_at_once(numbers, steps)
            text = (
                f"{self.path.name} has windows that were rendered again ({numbers}): here all are of one run."
            )
            note(report, text, "at_once", windows=numbers)
        if asked:
            text = f"Not the same as {self.path.name}: {_told(asked)}."
            note(report, text, "not_repeated", differences=[difference.text for difference in asked])
        if others := self.record.other_versions(now):
            text = f"{self.path.name} was made with {', '.join(others)}: bits may differ."
            note(report, text, "other_versions", versions=others)

    def _not_at_once(self, numbers: str, steps: "Sequence[Redone]") -> UsageError:
        """The hint has the commands that do repeat it, in order."""
        last = self.path.stem
        files = [f"{last}.{k}{self.path.suffix}" for k in range(len(steps))] + [
            f"{last}.again{self.path.suffix}"
        ]
        seed = str(self.record.job.get("seed", 0))
        commands: list[tuple[str, ...]] = [("run", "--from", str(self.path), "--seed", seed, "-o", files[0])]
        for step, before, after in zip(steps, files, files[1:], strict=False):
            redo: tuple[str, ...] = ("--redo", ",".join(map(str, step.seeds)))
            seeds = {str(seed) for seed in step.seeds.values()}
            if len(seeds) == 1:  # else they follow from those before
                redo += ("--seed", *seeds)
            commands.append(("run", "--from", before, *redo, "-o", after))
        return UsageError(
            f"{self.path.name} has windows that were rendered again ({numbers}): one run cannot repeat it.",
            with_commands("Repeat the runs that made it:", *map(shell_command, commands)),
        )


def deciding(name: str) -> set[str]:
    """The options that decide the part `name` of a record, such as "inputs cut start value"."""
    words = name.split()
    part = words[1] if words[0] == "inputs" and len(words) > 1 else words[0]
    return {part, *OPTIONS_OF.get(part, ())}


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
    """The typed options, by the parameters' names. With --redo the seed is no option of the whole video."""
    return _of_the_whole(click.get_current_context().meta.get(GIVEN, {}))


def _of_the_whole(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "seed" or not given.get("redo")}


def as_typed(name: str, value: str) -> None:
    """Counts an option that was left out, and has been decided, as if it had been given."""
    click.get_current_context().meta.setdefault(GIVEN, {})[name] = value


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
        if _names_files(parameter, values[name]):
            paths[name] = _absolute(values[name])
            if name not in SEARCHED:
                options[name] = _without_folder(values[name])
        elif (value := parameter.type_cast_value(context, values[name])) != parameter.default or (
            name == "window" and "context" in values and is_given(name)  # with context windows it says more
        ):
            options[name] = list(value) if isinstance(value, tuple) else value
    return Lasting(options, paths, **chosen)


def _names_files(parameter: click.Parameter, value: Any) -> bool:
    """--camera names a file or a move."""
    if isinstance(value, str) and value in camera_options.MOVES:
        return False
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
    """The callback of --from, before all others. Raises BadParameter for files that are nowhere, and for a
    record that was changed by hand to values which no option has.
    """
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
    skipped = OWN | _displaced(_of_the_whole(given)) | ({"inputs"} if given.get("reference") else set())
    prepared = {"inputs": f"{value.stem}.inputs"}
    written = [prepared, record.options, with_folders if isinstance(with_folders, dict) else {}]
    for name, typed in {name: typed for part in written for name, typed in part.items()}.items():
        if name in skipped or name not in known:
            continue
        option = known[name]
        if not _is_possible(ctx, option, typed):
            text = f"{value} has been changed: {shown(typed)!r} is no value of {option.opts[0]}."
            raise click.BadParameter(f"{text} Give {option.opts[0]} here, or name another video.", ctx, param)
        if not _names_files(option, typed):
            values[name] = typed
            continue
        names = typed if isinstance(typed, list) else [typed]
        found = [_found(file, name == "loras", folders) for file in names]
        if None not in found:
            values[name] = found if isinstance(typed, list) else found[0]
        elif name not in SEARCHED:
            lost = [Path(file).name for file, place in zip(names, found, strict=True) if place is None]
            missing.append(f"{shown(', '.join(lost))} ({option.opts[0]})")
    if missing:
        raise click.BadParameter(
            f"Not found: {'; '.join(missing)}. Name what is in another place with these options.", ctx, param
        )
    if given.get("redo") and "output" not in given:
        values["output"] = str(value)
    ctx.default_map = values
    return Repeated(value, record)


def _displaced(given: Mapping[str, Any]) -> set[str]:
    """The options that are given, and those of a record that they take the place of."""
    pairs = [*EITHER, *((two, one) for one, two in EITHER)]
    return {*given}.union(*(other for one, other in pairs if not given.keys().isdisjoint(one)))


def _is_possible(ctx: click.Context, option: click.Parameter, typed: Any) -> bool:
    """Whether a value of JSON is one that click can convert for `option`."""
    if _names_files(option, typed):
        names = typed if isinstance(typed, list) else [typed]
        return isinstance(typed, list) == option.multiple and all(isinstance(name, str) for name in names)
    try:
        return option.type_cast_value(ctx, typed) is not None
    except (TypeError, ValueError, ArithmeticError, AttributeError, click.BadParameter):
        return False


def _found(file: str, with_strength: bool, folders: Sequence[Path]) -> str | None:
    """`file` where it was, else by its name in one of `folders`."""
    path, colon, strength = file, "", ""
    if with_strength and not os.path.exists(file):
        path, colon, strength = file.rpartition(":")
    places = [Path(path), *(folder / Path(path).name for folder in folders)]
    # Path.exists raises OSError for a name that is too long.
    return next((f"{place}{colon}{strength}" for place in places if os.path.exists(place)), None)
