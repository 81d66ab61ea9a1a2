"""The weights: where they are searched, which file each part would be and why, LoRAs, the pose networks."""

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from trt_wan.checks.check import Check, of_error, ok
from trt_wan.engines.checkpoint import PARTS
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.errors import TrtWanError, WeightsError, shell_command
from trt_wan.install import install_command
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.opening.model import open_weights
from trt_wan.runtime.preset_loras import loras_by_kind
from trt_wan.runtime.presets import LoraKind
from trt_wan.runtime.published.files import FILES
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.find_files import files_below, missing_parts, spoken
from trt_wan.runtime.weights.load import load_camera
from trt_wan.runtime.weights.lynx import find_lynx
from trt_wan.runtime.weights_folders import searched_folders

PULL = shell_command(("pull",))
USES: dict[LoraKind, str] = {
    "distill": "presets of 4 to 8 steps",
    "relight": "presets, mostly in the mode replace",
}


def weights_checks(named: Sequence[Path], precision: Precision) -> tuple[list[Check], ModelConfig | None]:
    """The checks, and the model if all of its files are there."""
    try:
        folders = searched_folders(named)
    except WeightsError as error:
        return [of_error("weights", error)], None
    if not folders:
        text = "There are none: no --weights, no TRT_WAN_WEIGHTS, nothing that was pulled."
        return [Check("weights", "fault", text, "Fetch them:", (PULL,)), *_people([])], None
    searched = ok("weights", f"searched in {', '.join(map(str, folders))}")
    files = list(files_below(folders))
    parts, config = _parts(folders, precision)
    camera = [] if config is None else _camera(folders, config, precision)
    lynx = [] if config is None else lynx_check(folders, config)
    return [searched, *parts, *camera, *_loras(files), *lynx, *_people(files)], config


def _parts(folders: Sequence[Path], precision: Precision) -> tuple[list[Check], ModelConfig | None]:
    """The file of every part as a run would choose it. Where one is missing, which."""
    notes: list[Note] = []

    def keep(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event)

    try:
        opened = open_weights(WeightFiles(tuple(folders)), precision, keep)
    except TrtWanError as error:
        return [*_missing(folders), *_unusable(notes), of_error("weights", error)], None
    chosen = [
        ok(str(note.data["part"]).replace("_", " "), note.text.partition(" = ")[2])
        for note in notes
        if note.code == "weights_file"
    ]
    return [*chosen, *_unusable(notes)], opened.config


def _unusable(notes: Sequence[Note]) -> list[Check]:
    fix = "Download them again if they are meant for this model; what is wrong with one:"
    command = shell_command(("weights", "show", "FILE"))
    return [
        Check("weights", "warning", note.text, fix, (command,))
        for note in notes
        if note.code == "unusable_files"
    ]


def _missing(folders: Sequence[Path]) -> list[Check]:
    return [
        Check(spoken(part), "fault", "No file holds it.", "Fetch it:", (PULL,))
        for part in missing_parts(folders, PARTS)
    ]


def _camera(folders: Sequence[Path], config: ModelConfig, precision: Precision) -> list[Check]:
    """Uni3C's file. No other job needs it, so that none is no fault."""
    name = spoken("camera_control")
    part: tuple[Part, ...] = ("camera_control",)
    if missing_parts(folders, part):
        return [ok(name, "none, which only --camera needs")]
    try:
        _, file = load_camera(folders, None, config, precision)
    except WeightsError as error:
        return [of_error(name, error)]
    return [ok(name, f"{file.path} (Uni3C)")]


def _loras(files: Sequence[Path]) -> list[Check]:
    found = loras_by_kind(files)
    return [
        ok(f"{kind} LoRA", ", ".join(map(str, paths)))
        if (paths := found.get(kind))
        else Check(f"{kind} LoRA", "warning", f"Not found; {use} need it.", "Fetch it:", (PULL,))
        for kind, use in USES.items()
    ]


def lynx_check(folders: Sequence[Path], config: ModelConfig) -> list[Check]:
    """The adapters of `run --identity`, if some are here."""
    try:
        found = find_lynx(config, folders)
    except WeightsError as error:
        return [dataclasses.replace(of_error("identity", error), state="warning")]
    if not found.parts:
        return []
    ip = f"the {found.kind} IP adapter (with --face-embedder)"
    adapters = [*([ip] if found.ip else []), *(["the ref adapter"] if found.ref else [])]
    return [ok("identity", f"{' and '.join(adapters)} of Lynx")]


def _people(files: Sequence[Path]) -> list[Check]:
    """The networks that find people are named to `run` and `preprocess`; MediaPipe needs no file."""
    there = {path.name: path for path in files}
    parts = {"detector": "--detector", "pose": "--pose", "sam2": "--sam2"}
    options = [
        f"{parts[file.part]} {there[file.name]}"
        for file in FILES
        if file.part in parts and file.name in there and not file.name.endswith(".bin")
    ]
    if options:
        return [ok("people", f"can be named: {', '.join(options)}")]
    if find_spec("mediapipe") is not None:
        return [ok("people", "MediaPipe, unless --detector and --pose are given")]
    text = "Neither MediaPipe nor the published networks are here, so clips need files that are named."
    return [Check("people", "warning", text, "One of:", (PULL, install_command("mediapipe")))]
