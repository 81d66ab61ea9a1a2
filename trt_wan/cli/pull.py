"""`trt-wan pull`: fetches the published files of a preset."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report, table
from trt_wan.runtime.presets import PRESETS
from trt_wan.runtime.published.files import EXTRAS, FAST4, LYNX, files_of, spoken_size

if TYPE_CHECKING:
    from trt_wan.runtime.published.places import Place


NO_EMBEDDER = (
    "The IP adapter also needs --face-embedder, ArcFace IR-SE50 as ONNX, which is not fetched: the usual "
    "weights are for non-commercial use, and none are published as ONNX under a known name. The ref adapter "
    "needs none."
)


@click.command(short_help="Fetch the model's files from the Hugging Face Hub.")
@click.argument("preset", type=click.Choice([*PRESETS, *EXTRAS]), default=FAST4)
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="A ComfyUI, or its models/: each file goes into the folder where ComfyUI looks for it. "
    "Default: the cache of huggingface_hub.",
)
@click.option("--dry-run", is_flag=True, help="Say what is there and what would be fetched.")
@command
def pull(*, report: Report, preset: str, into: Path | None, dry_run: bool) -> Any:
    """Fetch the files that the preset PRESET needs: models, LoRAs, and the networks that find people.

    \b
    trt-wan pull                       the set of fast4
    trt-wan pull quality20 --into ~/ComfyUI
    trt-wan pull camera                the camera control Uni3C, for run --camera
    trt-wan pull lynx                  the adapters of run --identity

    A stopped download goes on with the next call. Files that are there stay as they are. What is in the cache
    is found by `trt-wan run` without --weights.
    """
    from trt_wan.runtime.published.places import comfy_folder, hub_cache

    place: Place = hub_cache() if into is None else comfy_folder(into)
    root = hub_cache().root if into is None else comfy_folder(into).models
    files = files_of(preset)
    if preset == LYNX:
        note(report, NO_EMBEDDER, "no_embedder")
    if dry_run:
        rows = [(file, place.find(file)) for file in files]
        text = [
            (file.part, spoken_size(file.size), str(path or f"missing: {file.name}"), file.licence)
            for file, path in rows
        ]
        missing = [file for file, path in rows if path is None]
        data = [
            {"part": file.part, "name": file.name, "bytes": file.size, "path": str(path) if path else None}
            for file, path in rows
        ]
        known = [file.size for file in missing if file.size is not None]
        total = sum(known) if len(known) == len(missing) else None
        size = "of unknown size" if total is None else spoken_size(total)
        noun = "file" if len(missing) == 1 else "files"
        note(report, f"{len(missing)} {noun} to fetch, {size}, into {root}.", "to_fetch")
        return table([("part", "size", "file", "licence"), *text]), {"files": data, "bytes": total}

    from trt_wan.runtime.published.fetch import fetch

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the report has one of its own
    paths = fetch(files, place, endpoint=os.environ.get("HF_ENDPOINT") or None, progress=report.progress)
    return root, {"preset": preset, "files": [str(path) for path in paths]}
