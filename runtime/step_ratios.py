"""Files of the ratios of a step cache: `trt-wan bench calibrate-cache` writes them, jobs find or name them.

    {"trt_wan_step_cache": 1, "made_for": {…}, "made_with": {…}, "prompt": [1, …], "negative": []}

The file `<hash of made_for>-<steps>.json` in the folder `step_cache` of TRT_WAN_HOME is for jobs with the
same `made_for`: weights, LoRAs, sampler, grid, shift, and whether there is guidance. The number of steps may
be another: ratios are read at the nearest steps, and a note says so. Size and window may be others too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trt_wan.engines.store.files import replace_atomically
from trt_wan.engines.store.home import home
from trt_wan.errors import InputError, UsageError, shell_command, shown, with_commands
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.job import Job
from trt_wan.runtime.kept.identity import identity
from trt_wan.runtime.step_cache import Ratios
from trt_wan.runtime.video.target import explained

FORMAT, KEY, FOLDER = 1, "trt_wan_step_cache", "step_cache"
COMMAND = ("bench", "calibrate-cache")
MOST_BYTES = 1 << 20


class NotCalibrated(UsageError):
    """There are no ratios for a job."""


@dataclass(frozen=True)
class Calibration:
    """`made_for` decides for which jobs it is; `made_with` is told."""

    made_for: Mapping[str, Any]
    made_with: Mapping[str, Any]
    ratios: Ratios

    def write(self, path: Path | None = None) -> Path:
        """Into `path`, or where jobs find it. Raises OutputError."""
        path = path or _folder() / f"{_hash(self.made_for)}-{self.made_with['steps']}.json"
        values = {KEY: FORMAT, "made_for": self.made_for, "made_with": self.made_with}
        sides = {"prompt": self.ratios.prompt, "negative": self.ratios.negative}
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(path, json.dumps({**values, **sides}, indent=1) + "\n")
        return path


def made_for(job: Job, model: str, transformer: Sequence[Path]) -> dict[str, Any]:
    """`transformer` are the files of the model named `model`; random weights have none. Raises OutputError
    for a file that cannot be read.
    """
    loras = [{**_content(lora.file), "strength": lora.strength} for lora in job.loras if lora.strength]
    levels = {"sigmas": list(job.sigmas)} if job.sigmas else {"grid": job.grid, "shift": job.shift}
    return {
        "model": model,
        "transformer": [_content(path) for path in transformer],
        "loras": sorted(loras, key=json.dumps),
        "sampler": job.sampler,
        **levels,
        "guided": job.guided,
    }


def with_ratios(job: Job, model: str, transformer: Sequence[Path], progress: Progress) -> Job:
    """`job` with the ratios of its step cache. Raises NotCalibrated, InputError for a file that has none, and
    UsageError for one of another model.
    """
    cache = job.step_cache
    if cache is None or not cache.threshold or cache.ratios is not None:
        return job
    asked, steps = made_for(job, model, transformer), job.whole_schedule.steps
    if cache.file is not None:
        found, name = read(cache.file), cache.file.name
        if found.made_for.get("model") != model:
            raise UsageError(
                f"{name} has ratios of the model {shown(found.made_for.get('model'))}, not of {model}.",
                "Make others with `bench calibrate-cache`.",
            )
    elif (kept := _nearest(asked, steps)) is not None:
        found, name = kept, "The calibration"
    else:
        raise NotCalibrated(
            "The step cache has no ratios for these weights, LoRAs, sampler and noise levels.",
            with_commands(
                "Make them once, in the time of one window without a cache, with the options of this job:",
                shell_command(COMMAND),
            ),
            COMMAND,
        )
    if job.guided and not found.ratios.negative:
        raise NotCalibrated(
            f"The ratios of {name} were made without guidance, so the negative prompt has none.",
            with_commands(
                "Make others with the options of this job, or use --guidance 1:", shell_command(COMMAND)
            ),
            COMMAND,
        )
    other = [
        key for key in dict.fromkeys((*asked, *found.made_for)) if asked.get(key) != found.made_for.get(key)
    ]
    if other:
        text = (
            f"{name} was not made for this job, from which it differs in: {', '.join(other)}. The steps it "
            "skips may be wrong."
        )
        progress(Note(text, "step_cache_of_another", {"differ": other}))
    if (count := len(found.ratios.prompt)) != steps:
        text = f"{name} has {count} steps and this job {steps}: ratios of the nearest steps are taken."
        progress(Note(text, "step_cache_steps", {"calibrated": count, "steps": steps}))
    return replace(job, step_cache=replace(cache, file=None, ratios=found.ratios))


def read(path: Path) -> Calibration:
    """Raises InputError."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MOST_BYTES))
        if values[KEY] != FORMAT:
            raise ValueError(f"its format is {values[KEY]!r}")
        ratios = Ratios(tuple(values["prompt"]), tuple(values["negative"]))
        return Calibration(dict(values["made_for"]), dict(values["made_with"]), ratios)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error
    except (ValueError, RecursionError, KeyError, TypeError, UsageError) as error:
        raise InputError(
            f"{path} is no file of ratios for a step cache.",
            "Name one that `bench calibrate-cache` has written.",
        ) from error


def _nearest(asked: Mapping[str, Any], steps: int) -> Calibration | None:
    """The calibration for jobs like `asked` with the nearest number of steps, of two the larger."""
    found = [read(path) for path in _folder().glob(f"{_hash(asked)}-*.json")]
    return min(found, key=lambda one: (abs((n := len(one.ratios.prompt)) - steps), -n), default=None)


def _folder() -> Path:
    return home() / FOLDER


def _hash(made_for: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:16]


def _content(path: Path) -> dict[str, Any]:
    with explained(path):
        return {key: value for key, value in identity(path, weights=True).items() if key != "name"}
