"""Makes the record of a run from its job, its open clips and its model."""

import dataclasses
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trt_wan import __version__
from trt_wan.engines.shape import Plan
from trt_wan.runtime.job import Job
from trt_wan.runtime.kept.identity import Identity, identity
from trt_wan.runtime.kept.record import Record, as_values
from trt_wan.runtime.opening.model import Basis
from trt_wan.runtime.video.clips import Clips
from trt_wan.runtime.video.target import explained

PACKAGES = ("numpy", "opencv-python-headless", "opencv-python", "av", "cuda-bindings")
LORAS = "loras"


def record_of(
    job: Job,
    clips: Clips,
    basis: Basis,
    sound: Path | None,
    written: Mapping[str, Any],
    options: Mapping[str, Any],
    option_paths: Mapping[str, Any],
) -> Record:
    """`sound` is the file of the video's sound. `written` are settings of the writing that decide bits.
    `options` name files without folders, and `option_paths` has the same with folders (cli/repeating.py).

    Call when the graphs exist. Raises OutputError for a file that cannot be read.
    """
    plan = Plan(clips.width, clips.height, job.model_window, basis.precision)
    model = {
        "name": basis.weights.config.name,
        "precision": basis.precision,
        **basis.choices(plan, job),
    }
    video = {"frames": clips.frames, "width": clips.width, "height": clips.height, "rate": str(clips.rate)}
    paths: dict[str, list[Path]] = {role: [path] for role, path in _files(job)}
    paths |= {} if sound is None else {"sound": [sound]}
    weights = {part: list(files) for part, files in basis.weights.files_of(job).items()}
    identities: dict[str, list[Identity]] = {}
    for role, files in (*paths.items(), *weights.items()):
        large = role in weights or role.startswith(LORAS)
        for path in files:
            with explained(path):
                identities.setdefault(role, []).append(identity(path, large))
    whole = {role: [str(path.absolute()) for path in files] for role, files in (paths | weights).items()}
    return Record(
        versions(basis),
        as_values(job),
        model,
        identities,
        {**video, **written},
        options,
        {"files": whole, "options": option_paths},
    )


def versions(basis: Basis) -> dict[str, str]:
    """Versions of everything that may decide bits."""
    found = {"trt-wan": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if basis.place is None:
        import onnxruntime

        return {**found, "onnxruntime": onnxruntime.__version__, "CPU": platform.machine()}
    gpu, flavour = basis.place
    return {**found, flavour.name: flavour.version, "GPU": gpu.name, "driver": str(gpu.driver)}


def _files(made: Any, name: str = "") -> Iterator[tuple[str, Path]]:
    """The files of a dataclass, by their fields' names."""
    if isinstance(made, Path):
        yield name, made
    elif dataclasses.is_dataclass(made):
        for field in dataclasses.fields(made):
            inside = name if field.name == "file" else field.name
            yield from _files(getattr(made, field.name), inside)
    elif isinstance(made, tuple):
        for number, value in enumerate(made, 1):
            yield from _files(value, f"{name} {number}")
