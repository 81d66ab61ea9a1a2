"""From a request to a job in the queue: its folder, its options, its command line.

    jobs/ID/reference.png clip.mp4    the uploads, under fixed names; files of options too
    jobs/ID/inputs/                   prepared clips, of a .zip, a preparation or an earlier video
    jobs/ID/source.mp4                the video whose windows are rendered again
    jobs/ID/out.mp4, out.inputs/      the result
    jobs/ID/prepared/                 the result of a preparation

Files are hard links: a job needs no other one's folder.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trt_wan.cli.preprocess import PREPARING_NAMES
from trt_wan.cli.sizes import Size
from trt_wan.errors import TrtWanError, shown
from trt_wan.runtime.presets import RECIPE_FIELDS
from trt_wan.serve.database import Job, Kind
from trt_wan.serve.fields import (
    FILE_OPTIONS,
    FieldError,
    Fields,
    VideoFields,
    arguments,
    lora_argument,
    loras_given,
    options_given,
    options_of,
    require_possible,
    require_text,
)
from trt_wan.serve.lora_files import loras
from trt_wan.serve.settings import Limits, ServeSettings

OUTPUT, PREPARED, INPUTS, SOURCE = "out.mp4", "prepared", "inputs", "source.mp4"
PREFIX: Mapping[Kind, str] = {"video": "video_", "preparation": "prep_"}
CHARACTER, DRIVING = "input_reference", "control_reference"
REFERENCES = ("reference_2", "reference_3", "reference_4")  # beside the character's
KIND_OF = {
    CHARACTER: ("picture",),
    DRIVING: ("clip", "prepared"),
    "keypoints": ("keypoints",),
    "audio": ("sound", "clip"),
    **dict.fromkeys(
        (
            *("clip_image_2", "identity", "start_frame", "mask_paint", "edited_reference", "edited_driving"),
            *REFERENCES,
        ),
        ("picture",),
    ),
    **dict.fromkeys(("init", "extend"), ("clip",)),
    "camera": ("clip", "picture"),
}
NOUNS = {
    "picture": "a picture",
    "clip": "a video",
    "prepared": "a .zip of prepared clips",
    "sound": "a sound",
}
NAME_OF = {CHARACTER: "reference", DRIVING: "clip"}
MOST_WINDOWS = 10_000
# Options of the preprocessing: with one of them, an earlier job's prepared clips cannot be used again.
SHAPES_CLIPS = ("mode", "size", "fit", "rate", "start", "end", "reference_background", "compat")


@dataclass(frozen=True)
class Given:
    """An upload, or a file that was uploaded before."""

    facts: dict[str, Any]
    content: Path
    clips: Path
    filename: str = ""
    id: str | None = None  # None: the file goes with the request


@dataclass
class Order:
    """A job before it exists."""

    kind: Kind
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # by the name in the job's folder
    inputs: Path | None = None  # a folder of prepared clips
    uploaded: bool = False  # whether these came as a .zip
    facts: dict[str, Any] = field(default_factory=dict)  # width, height, frames, fps of the clip
    names: dict[str, str] = field(default_factory=dict)  # the uploads' names on the client's disk
    uploads: dict[str, str] = field(default_factory=dict)  # ids of the files among them
    loras: list[dict[str, Any]] = field(default_factory=list)
    redo: list[int] = field(default_factory=list)
    source: str | None = None
    preparation: str | None = None


def new_id(kind: Kind) -> str:
    return PREFIX[kind] + secrets.token_hex(12)


def order_of(
    kind: Kind,
    fields: Fields,
    given: Mapping[str, Given],
    settings: ServeSettings,
    source: tuple[Job, Path] | None,
    preparation: tuple[Job, Path] | None,
) -> Order:
    """`given` are uploads by field. `source` and `preparation` come with folders. Raises TrtWanError."""
    for name, value in fields.model_dump().items():
        if name not in (CHARACTER, DRIVING):  # looked up already
            require_text(name, value, settings.limits.text)
    _require_kinds(given)
    order = Order(kind)
    options = options_given(kind, fields)
    if source is not None:
        _take_over(order, *source)
    if isinstance(fields, VideoFields):
        if fields.redo is not None:
            return _redone(order, fields, given, source)
        _read_end(options, fields)
        if fields.lora is not None:
            order.loras = loras_given(fields.lora)
    if preparation is not None:
        _from_preparation(order, *preparation)
    _choose_clips(order, given, options)
    order.options |= options
    for name in given:
        order.options.pop(name, None)
    if source is None:
        own_recipe = RECIPE_FIELDS if "preset" in options else ()
        for name, value in settings.defaults.items():
            if name in _known(kind, order) and name not in order.options and name not in own_recipe:
                order.options[name] = value
    _require_clips(order)
    return order


def _shapes_clips(name: str) -> bool:
    return name in SHAPES_CLIPS or name in PREPARING_NAMES


def _known(kind: Kind, order: Order) -> set[str]:
    """The defaults that a job of that kind can take."""
    known = set(options_of(kind))
    return {name for name in known if not _shapes_clips(name)} if order.inputs is not None else known


def _require_kinds(given: Mapping[str, Given]) -> None:
    for name, upload in given.items():
        kinds = KIND_OF[name]
        if upload.facts["kind"] not in kinds:
            wanted = " or ".join(NOUNS.get(kind, kind) for kind in kinds)
            raise FieldError(
                name,
                f"{name} is {NOUNS.get(upload.facts['kind'], 'a file of keypoints')}.",
                f"Give {wanted}.",
            )


def _take_over(order: Order, source: Job, folder: Path) -> None:
    request = source.request
    order.options |= request["options"]
    order.loras, order.names = request["loras"], dict(request["names"])
    order.uploads = dict(request["uploads"])
    order.facts, order.source = request["facts"], source.id
    order.preparation, order.uploaded = request["preparation"], request["uploaded"]
    order.files |= {name: folder / name for name in request["files"] if name != SOURCE}
    if request["inputs"]:
        order.inputs = folder / INPUTS
    elif order.kind == "video" and (folder / "out.inputs").is_dir():
        order.inputs = folder / "out.inputs"


def _read_end(options: dict[str, Any], fields: VideoFields) -> None:
    """num_frames and seconds are other words for the option end."""
    given = [name for name in ("num_frames", "seconds") if getattr(fields, name) is not None]
    if len(given) + ("end" in options) > 1:
        raise FieldError(
            given[0], "num_frames, seconds and end all say where the clip ends.", "Give one of them."
        )
    if fields.num_frames is not None:
        options["end"] = str(fields.num_frames)
    if fields.seconds is not None:
        try:
            seconds = float(fields.seconds)
        except ValueError as error:
            raise FieldError(
                "seconds", f"seconds is no number: {shown(fields.seconds)}.", "Such as 4."
            ) from error
        if not 0.001 <= seconds < 1e5:
            raise FieldError("seconds", f"{seconds:g} seconds are not possible.", "Such as 4.")
        options["end"] = f"{seconds:.3f}s"


def _redone(
    order: Order, fields: VideoFields, given: Mapping[str, Given], source: tuple[Job, Path] | None
) -> Order:
    """The source with single windows rendered again."""
    if source is None or source[0].status != "completed":
        state = "is not named" if source is None else f"is {source[0].status.replace('_', ' ')}"
        raise FieldError(
            "redo", f"redo renders windows of a finished video again: source {state}.", "Name one."
        )
    changed = fields.model_fields_set - {"redo", "source", "seed", "model", "user"}
    changed -= set() if fields.prompt else {"prompt"}  # which OpenAI's client always sends
    if other := sorted({*changed, *given}):
        raise FieldError(
            other[0],
            f"redo changes the seed of windows and nothing else: {', '.join(other)}.",
            "Leave it out.",
        )
    # 0: the server died before it noted how many there are; then the command refuses a wrong number.
    windows = source[0].result.get("windows") or MOST_WINDOWS
    numbers = fields.redo or []
    if not numbers or not all(1 <= number <= windows for number in numbers):
        raise FieldError("redo", f"The video has the windows 1 to {windows}.", "Such as [1].")
    order.redo = sorted(set(numbers))
    order.options.pop("seed", None)
    if fields.seed is not None:
        order.options["seed"] = fields.seed
    order.files[SOURCE] = source[1] / OUTPUT
    return order


def _from_preparation(order: Order, job: Job, folder: Path) -> None:
    if job.status != "completed":
        hint = "Prepare the clips again." if job.has_ended else "Wait until it is completed."
        raise FieldError("preparation", f"{job.id} is {job.status.replace('_', ' ')}.", hint)
    order.preparation, order.inputs, order.uploaded = job.id, folder / PREPARED, False
    order.options["mode"] = job.request["options"].get("mode", "animate")
    order.facts = {name: job.result[name] for name in ("width", "height", "frames", "fps")}
    order.names, order.uploads = dict(job.request["names"]), dict(job.request["uploads"])
    order.files = {}


def _choose_clips(order: Order, given: Mapping[str, Given], options: Mapping[str, Any]) -> None:
    """Prepared clips, or the files to prepare them from: the request's own win over those of the source.
    Raises FieldError for uploads and options that would do nothing.
    """
    driving = given.get(DRIVING)
    if driving is not None and driving.facts["kind"] == "prepared":
        if order.preparation is not None and order.source is None:
            raise FieldError(DRIVING, "preparation and control_reference are given together.", "Give one.")
        _forget_shaping(order)
        order.inputs, order.facts = driving.clips, driving.facts
        order.uploaded, order.preparation = True, None
        order.files = {name: path for name, path in order.files.items() if _is_beside(Path(name).stem)}
    elif order.inputs is not None:
        stems = {Path(name).stem for name in order.files}
        stems |= {NAME_OF[name] for name in given if name in NAME_OF}
        changed = [name for name in given if not _is_beside(name)]
        changed += [
            name for name in options if _shapes_clips(name) and options[name] != order.options.get(name)
        ]
        if changed and {"reference", "clip"} <= stems:
            order.inputs, order.preparation, order.uploaded = None, None, False
        elif not order.uploaded:
            _forget_shaping(order)
    if order.inputs is not None:
        _require_use(order, given, options)
    for name, upload in given.items():
        order.names[name] = upload.filename
        order.uploads.pop(name, None)
        if upload.id is not None:
            order.uploads[name] = upload.id
        if upload.facts["kind"] == "prepared":
            continue
        file = f"{NAME_OF.get(name, name)}{upload.facts['suffix']}"
        order.files = {key: path for key, path in order.files.items() if Path(key).stem != Path(file).stem}
        order.files[file] = upload.content
        if name == DRIVING:
            order.facts = upload.facts


def _is_beside(name: str) -> bool:
    """Whether the file of that name is used beside prepared clips."""
    return name in FILE_OPTIONS and not _shapes_clips(name)


def _forget_shaping(order: Order) -> None:
    """The options that made the prepared clips, which have their effect already."""
    order.options = {
        name: value
        for name, value in order.options.items()
        if name in ("mode", "compat") or not _shapes_clips(name)
    }


def _require_use(order: Order, given: Mapping[str, Given], options: Mapping[str, Any]) -> None:
    unused = [
        name for name, upload in given.items() if not _is_beside(name) and upload.facts["kind"] != "prepared"
    ]
    unused += [name for name in options if name in PREPARING_NAMES - {"compat"}]
    if unused:
        raise FieldError(
            unused[0],
            f"The clips are prepared, so {unused[0]} would do nothing.",
            f"Leave it out, or give {CHARACTER} and {DRIVING}, a picture and a clip.",
        )
    mode = options.get("mode")
    possible = order.facts.get("modes") if order.uploaded else [order.options.get("mode", "animate")]
    if mode is not None and possible is not None and mode not in possible:
        raise FieldError(
            "control_type", f"The clips were not prepared for the mode {shown(mode)}.", "Prepare them for it."
        )


def _require_clips(order: Order) -> None:
    stems = {Path(name).stem for name in order.files}
    if order.inputs is not None:
        if order.kind == "preparation":
            raise FieldError(DRIVING, "These clips are prepared already.", "Give them to /v1/videos.")
        return
    for stem, name, noun in (("reference", CHARACTER, "a picture"), ("clip", DRIVING, "a driving video")):
        if stem not in stems:
            raise FieldError(
                name, f"There is no {name}.", f"Give {noun}: an upload, the id of a file, or a data: URL."
            )


def require_limits(
    params: Mapping[str, Any], options: Any, facts: Mapping[str, Any], size: Size | None, limits: Limits
) -> None:
    """Raises FieldError. `params` are the parsed options, `options` those of run with its preset's. `size` is
    that of the video; None: an earlier job was allowed to prepare the clips in it.
    """
    if options is not None:
        context = options.context.frames if options.context is not None else 0
        for name, value, most in (
            ("steps", max(options.steps or 0, len(options.sigmas)), limits.steps),
            ("window", options.window or 0, limits.window),
            ("context_frames", context, limits.window),
            ("clip_tiles", options.clip_vision.tiles, 2),
        ):
            if value > most:
                raise FieldError(name, f"{name} {value} is more than this server's {most}.", "Use less.")
    if size is not None and size[0] * size[1] > limits.pixels:
        raise FieldError(
            "size",
            f"{size[0]}x{size[1]} is more than this server's {limits.pixels} pixels.",
            "Use a smaller size.",
        )
    frames = facts.get("frames", 0)
    if params["rate"] is not None:
        frames = frames / facts.get("fps", 30) * float(params["rate"])
    if frames > limits.frames:
        raise FieldError(
            "rate", f"The clip has {frames:.0f} frames, and the server takes {limits.frames}.", "Cut it."
        )


def place(order: Order, folder: Path) -> dict[str, Any]:
    """Links the order's files into `folder` and returns the request for the database. Raises OSError."""
    folder.mkdir(parents=True)
    for name, path in order.files.items():
        os.link(path, folder / name)
    if order.inputs is not None:
        shutil.copytree(order.inputs, folder / INPUTS, copy_function=os.link)
    return {
        "options": order.options,
        "files": sorted(order.files),
        "inputs": order.inputs is not None,
        "uploaded": order.uploaded,
        "facts": order.facts,
        "names": order.names,
        "uploads": order.uploads,
        "loras": order.loras,
        "redo": order.redo,
        "source": order.source,
        "preparation": order.preparation,
    }


def command_of(
    kind: Kind,
    request: Mapping[str, Any],
    folder: Path,
    settings: ServeSettings,
    again: bool,
) -> list[str]:
    """The arguments of trt-wan that do the job. Raises UsageError."""
    files = {Path(name).stem: folder / name for name in request["files"]}
    options = dict(request["options"])
    made: list[str] = []
    if kind == "preparation":
        made += ["preprocess", str(files["reference"]), str(files["clip"]), "-o", str(folder / PREPARED)]
        made += _networks(settings, options, files)
        return made + arguments(kind, options) + _file_arguments(files)
    made += ["run"]
    if request["redo"]:
        made += ["--from", str(files["source"]), f"--redo={','.join(map(str, request['redo']))}"]
        made += [f"--inputs={folder / INPUTS}", "-o", str(folder / OUTPUT), *settings.model]
        seed = options.get("seed")
        return made + ([] if seed is None else [f"--seed={seed}"]) + ["--no-sidecar"]
    if request["inputs"]:
        made += [f"--inputs={folder / INPUTS}"]
        files = {name: path for name, path in files.items() if not _shapes_clips(name)}
    else:
        made += [str(files["reference"]), str(files["clip"]), *_networks(settings, options, files)]
    model = settings.model if "identity" in files else settings.plain_model
    made += ["-o", str(folder / OUTPUT), *model, "--no-sidecar"]
    made += arguments(kind, options) + _file_arguments(files)
    if request["loras"]:  # searching reads the headers of all files
        found = loras(settings)
        made += [lora_argument(lora, found) for lora in request["loras"]]
    return made + (["--resume"] if again else [])


def _networks(settings: ServeSettings, options: Mapping[str, Any], files: Mapping[str, Path]) -> list[str]:
    """The operator's networks that this job uses: the others would be refused."""
    unused = set()
    if "keypoints" in files and options.get("retarget", "off") == "off":
        unused |= {"--detector", "--pose"}
    if options.get("mode", "animate") == "animate" or options.get("segmenter") in ("box", "mediapipe"):
        unused.add("--sam2")
    return [argument for argument in settings.preparing if argument.partition("=")[0] not in unused]


def _file_arguments(files: Mapping[str, Path]) -> list[str]:
    named = {name: "reference" if name in REFERENCES else name for name in FILE_OPTIONS}
    return [f"--{named[name].replace('_', '-')}={path}" for name, path in files.items() if name in named]


def require_possible_order(
    kind: Kind, command: list[str], request: Mapping[str, Any], limits: Limits
) -> None:
    """Raises TrtWanError for options that are wrong for every clip, and for those above the limits."""
    if not request["redo"]:  # its options are in the video
        params, options = require_possible(kind, command[1:])
        facts, size = request["facts"], params["size"]
        if request["inputs"]:
            size = (facts["width"], facts["height"]) if request["uploaded"] else None
        require_limits(params, options, facts, size, limits)


def told(error: TrtWanError, folder: Path, data: Path) -> dict[str, Any]:
    """An error for clients, without the server's folders."""

    message, hint = (text.replace(f"{folder}/", "") for text in (error.message, error.hint))
    # Commands in a hint that name other folders cannot be run by a client.
    lines = [line for line in hint.splitlines() if str(data) not in line]
    return {"code": error.code, "message": message.replace(str(data), "…"), "hint": "\n".join(lines)}
