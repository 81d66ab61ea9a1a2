"""From a picture and any video to prepared clips; settings are fields of `PreprocessJob` and `Networks`."""

from collections.abc import Mapping
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from trt_wan.api.names import unknown_setting
from trt_wan.preprocess import stages
from trt_wan.preprocess.clips.sizes import Size
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.preprocess import preprocess
from trt_wan.preprocess.stages import Networks
from trt_wan.runtime.events import Progress
from trt_wan.runtime.job import Mode

OWN = {"reference", "clip", "output", "mode", "size", "overwrite"}  # arguments of `prepare`


def prepare(
    reference: Path,
    clip: Path,
    output: Path,
    mode: Mode,
    size: Size,
    options: Mapping[str, Any],
    progress: Progress,
) -> Path:
    """Makes the folder `output` of prepared clips and returns it. Raises TrtWanError."""
    networks = {field.name for field in fields(Networks)}
    known = {field.name for field in fields(PreprocessJob)} - OWN
    if unknown := options.keys() - known - networks:
        raise unknown_setting(unknown, sorted(known | networks))
    settings = dict(options)
    if settings.get("rate") is not None:
        settings["rate"] = Fraction(settings["rate"]).limit_denominator(1001)
    chosen = Networks(**{name: settings.pop(name) for name in networks & settings.keys()})
    job = PreprocessJob(reference, clip, output, mode=mode, size=size, **settings)
    opened = stages.open_stages(chosen, mode, job.compat, needs_people=job.needs_people, progress=progress)
    return preprocess(job, opened, progress)
