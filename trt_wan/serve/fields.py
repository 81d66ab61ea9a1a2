"""The fields of a request, and the command line that they stand for.

Every option of `trt-wan run` and `trt-wan preprocess` that concerns one video is a field of `extra_params`,
with the option's own name and its checks. Options about the machine, the model and places on the disk belong
to the server's operator.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import BaseModel, ConfigDict, Field

from trt_wan.cli.camera_options import MOVES
from trt_wan.cli.preprocess import preprocess
from trt_wan.cli.run import run
from trt_wan.errors import UsageError, shown
from trt_wan.serve.database import Kind
from trt_wan.serve.settings import MODEL, NETWORKS

COMMANDS: Mapping[Kind, click.Command] = {"video": run, "preparation": preprocess}
# Options that name files: a request gives the id of an upload.
FILE_OPTIONS = (
    *("clip_image_2", "identity", "init", "start_frame", "extend", "audio", "camera"),
    *("keypoints", "edited_reference", "edited_driving", "mask_paint"),
    *("reference_2", "reference_3", "reference_4"),
)
# Options that the server sets itself.
OWN = (
    *(
        "reference",
        "clip",
        "inputs",
        "output",
        "overwrite",
        "resume",
        "dry_run",
        "repeated",
        "redo",
        "sidecar",
    ),
    *("frames", "codec", "encoder", "loras", "as_json", "quiet", "mode", "build"),
    *("more_references", "step_cache_ratios"),
)


def names_file(name: str, value: Any) -> bool:
    """Whether a request gives the id of an upload there. `camera` may be a move."""
    return name in FILE_OPTIONS and not (name == "camera" and value in MOVES)


Name = str  # an option's, with underscores
Value = str | int | float | bool | list[str | int | float]


class FieldError(UsageError):
    """`param` is the name of the field or option at fault."""

    def __init__(self, param: str, message: str, hint: str = "Correct it.") -> None:
        super().__init__(message, hint)
        self.param = param


class Fields(BaseModel):
    """Named as in the clients of vLLM-Omni and SGLang (POST /v1/videos)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    control_type: Literal["animate", "replace"] | None = Field(
        None, description="The mode. Default: animate."
    )
    input_reference: str | None = Field(
        None, description="The character: an upload, the id of a file, or a data: URL."
    )
    control_reference: str | None = Field(
        None, description="The driving video, or a .zip of prepared clips: an upload, an id, or a data: URL."
    )
    size: str | None = Field(None, description="Width and height of the video, such as 832x480.")
    extra_params: dict[str, Any] | None = Field(
        None, description='Options of the command line by their names, such as {"grow": 20}.'
    )
    source: str | None = Field(
        None, description="A job of the same kind: its files and settings, changed by this one."
    )
    model: str | None = Field(None, description="The name in /v1/models.")
    user: str | None = Field(None, description="Not used.")


class VideoFields(Fields):
    prompt: str | None = None
    negative_prompt: str | None = None
    preparation: str | None = Field(None, description="Prepared clips: the id of a finished preparation.")
    preset: str | None = None
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    flow_shift: float | None = None
    fps: float | None = Field(None, gt=0, description="Frames per second, for clips that are prepared.")
    num_frames: int | None = Field(None, ge=1, description="Frames of the driving clip that are used.")
    seconds: str | None = Field(None, description="Seconds of the driving clip that are used at most.")
    lora: str | dict[str, Any] | list[Any] | None = Field(
        None, description='LoRAs that the server has: "name", {"name", "scale"}, or a list of them.'
    )
    redo: list[int] | None = Field(None, description="With source: render only these windows again, from 1.")


OPTION_OF = {
    "control_type": "mode",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "flow_shift": "shift",
    "fps": "rate",
    **{name: name for name in ("prompt", "negative_prompt", "preset", "seed", "size")},
}


def options_of(kind: Kind) -> dict[Name, click.Option]:
    """The options that a request may give."""
    closed = {*OWN, *MODEL, *NETWORKS}
    return {
        str(option.name): option
        for option in COMMANDS[kind].params
        if isinstance(option, click.Option) and option.name not in closed
    }


def options_given(kind: Kind, fields: Fields) -> dict[Name, Value]:
    """The options in a request's fields and in its extra_params. Raises UsageError."""
    known = options_of(kind)
    given: dict[Name, Value] = {}
    for field, option in OPTION_OF.items():
        if (value := getattr(fields, field, None)) is not None:
            given[option] = value
    for name, value in (fields.extra_params or {}).items():
        option = name.replace("-", "_").lstrip("_")
        if option not in known:
            near = get_close_matches(option, known, 3)
            hint = f"Nearest: {', '.join(near)}." if near else "GET /v1/options lists them."
            raise FieldError(name, f"There is no option {shown(name)!r} for a {kind}.", hint)
        if option in given:
            raise FieldError(name, f"{shown(name)} is given twice.", "Give it in one place.")
        given[option] = _checked(name, value)
    return given


def _checked(name: str, value: Any) -> Value:
    values = value if isinstance(value, list) else [value]
    if len(values) <= 1000 and all(isinstance(one, str | int | float) for one in values):
        return value  # type: ignore[no-any-return]
    raise FieldError(name, f"{shown(name)} is no text, number, true or false, or list of these.")


def require_text(name: str, value: Any, most: int) -> None:
    """Raises FieldError for texts in `value` that are too long, or that no file or process can have."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            require_text(name, key, most)
            require_text(str(key), inner, most)
    elif isinstance(value, list):
        for inner in value:
            require_text(name, inner, most)
    elif isinstance(value, str):
        if len(value) > most:
            raise FieldError(
                name,
                f"{shown(name)} has {len(value)} characters, and the server takes {most}.",
                "Shorten it.",
            )
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise FieldError(name, f"{shown(name)} has characters that are no text.")


def typed(option: click.Option, value: Value) -> Iterator[str]:
    """The arguments that give `option` this value. `--name=value`: a value may begin with a dash."""
    long = max(option.opts, key=len)
    if option.is_flag:
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise FieldError(str(option.name), f"{long} is true or false, not {shown(value)}.")
        if value != option.default:
            # A flag with one name is off unless it is given, as --no-text-cache turns something off.
            yield long if value or not option.secondary_opts else option.secondary_opts[0]
        return
    if isinstance(value, bool):
        raise FieldError(str(option.name), f"{long} needs a value, not {str(value).lower()}.")
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple and any(isinstance(one, str) for one in value):
        raise FieldError(str(option.name), f"{long} takes one value, not a list of texts.")
    for text in values if option.multiple else [",".join(map(_text, values))]:
        yield f"{long}={_text(text)}"


def _text(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:.17g}" if isinstance(value, float) else str(value)


def arguments(kind: Kind, options: Mapping[Name, Value]) -> list[str]:
    known = options_of(kind) | {
        str(option.name): option
        for option in COMMANDS[kind].params
        if isinstance(option, click.Option) and option.name in ("mode", "redo")
    }
    return [text for name, value in options.items() for text in typed(known[name], value)]


def loras_given(value: Any) -> list[dict[str, Any]]:
    """`{"name", "strength"}` each. Raises UsageError."""
    if isinstance(value, str):
        text = value.strip()
        value = parsed(text, "lora") if text[:1] in ("{", "[") else text
    made = []
    for one in value if isinstance(value, list) else [value]:
        entry = {"name": one} if isinstance(one, str) else one
        if not isinstance(entry, Mapping):
            raise UsageError(
                "lora is no name, and no list of names.", 'Such as {"name": "distill", "scale": 1}.'
            )
        name = next((entry[key] for key in ("name", "lora_name", "path", "lora_path") if key in entry), None)
        strength = next((entry[key] for key in ("strength", "scale", "weight") if key in entry), 1.0)
        if not isinstance(name, str) or isinstance(strength, bool) or not isinstance(strength, int | float):
            raise UsageError("A LoRA has a name and a scale.", 'Such as {"name": "distill", "scale": 1}.')
        made.append({"name": name, "strength": float(strength)})
    return made


def lora_argument(lora: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """Raises UsageError for a LoRA that the server does not have."""
    name = lora["name"]
    found = files.get(name) or next((file for key, file in files.items() if Path(key).stem == name), None)
    if found is None:
        near = get_close_matches(name, files, 3) or list(files)[:3]
        hint = f"It has: {', '.join(near)}." if near else "It has none: they lie in the folders of --weights."
        raise FieldError("lora", f"The server has no LoRA {shown(name)!r}.", hint)
    return f"--lora={found}:{lora['strength']!r}"


def parsed(text: str, name: str) -> Any:
    """A value of JSON. Raises UsageError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(name, f"{name} is not JSON.") from error


def fields_from(kind: Kind, values: Mapping[str, Any]) -> Fields:
    """From a form or JSON. A form has texts alone. Raises UsageError."""
    model: type[Fields] = VideoFields if kind == "video" else Fields
    made = {}
    for name, value in values.items():
        if name not in model.model_fields:
            near = get_close_matches(name, model.model_fields, 3)
            raise FieldError(
                name,
                f"There is no field {shown(name)!r}.",
                f"Nearest: {', '.join(near)}."
                if near
                else "Options of the command line go into extra_params.",
            )
        made[name] = _from_text(name, value) if isinstance(value, str) else value
        if name == "redo" and isinstance(value, list):  # a form's are texts
            made[name] = [int(one) if isinstance(one, str) and one.isdecimal() else one for one in value]
    try:
        return model.model_validate(made)
    except ValueError as error:
        raise _told(error) from error


def _from_text(name: str, text: str) -> Any:
    if name in ("extra_params", "redo"):
        return parsed(text, name) if text.strip() else None
    if name in ("seed", "num_inference_steps", "num_frames", "guidance_scale", "flow_shift", "fps"):
        number: type[int] | type[float] = float if name in ("guidance_scale", "flow_shift", "fps") else int
        try:
            return number(text)
        except ValueError as error:
            raise FieldError(name, f"{name} is no number: {shown(text)!r}.") from error
    return text


def _told(error: ValueError) -> FieldError:
    """The first fault that pydantic found."""
    from pydantic import ValidationError

    assert isinstance(error, ValidationError)
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return FieldError(place, f"{shown(place)}: {first['msg']}.")


def require_possible(kind: Kind, argv: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """The parsed options, and of a video the RunOptions with the preset's. Raises UsageError as the command
    would for its options alone. Reads headers of LoRAs, nothing else.
    """
    from trt_wan.cli.preprocess import refuse_impossible as refuse_preparing
    from trt_wan.cli.run import refuse_impossible

    try:
        with COMMANDS[kind].make_context(f"trt-wan {COMMANDS[kind].name}", list(argv)) as context:
            if kind == "video":
                return context.params, refuse_impossible(context.params)
            refuse_preparing(context.params)
            return context.params, None
    except click.UsageError as error:
        param = getattr(error, "param", None)
        raise FieldError(getattr(param, "name", None) or "", error.format_message(), "") from error
