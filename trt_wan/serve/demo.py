"""`trt-wan serve --demo`: the tiny model and the sample, so that everything can be tried on any machine."""

import secrets
import shutil
from typing import TYPE_CHECKING

from trt_wan.cli.demo import DEMO_SAMPLE
from trt_wan.serve.check import check
from trt_wan.serve.uploads import Accepted

if TYPE_CHECKING:
    from trt_wan.serve.service import Service

PURPOSE = "sample"


def add_sample(service: "Service") -> dict[str, str]:
    """The ids of the sample's files, which are added on the first start."""
    files = service.store.database.files(10_000)
    known = {file.filename: file.id for file in files if file.purpose == PURPOSE}
    return {
        name: known.get(filename) or _add(service, filename)
        for name, filename in (
            ("reference", "character.png"),
            ("clip", "driving.mp4"),
            ("prepared", "prepared.zip"),
        )
    }


def _add(service: "Service", filename: str) -> str:
    folder = service.store.incoming / secrets.token_hex(8)
    (folder / "clips").mkdir(parents=True)
    source = folder / "content"
    if filename == "prepared.zip":
        made = shutil.make_archive(str(folder / "packed"), "zip", DEMO_SAMPLE)
        shutil.move(made, source)
    else:
        shutil.copy(DEMO_SAMPLE / ("src_ref.png" if filename == "character.png" else filename), source)
    limits = service.settings.limits
    facts = check(
        source,
        folder / "clips",
        {
            "upload": limits.upload,
            "frames": limits.frames,
            "pixels": limits.pixels,
            "clip_pixels": limits.clip_pixels,
        },
    )
    accepted = Accepted(folder, filename, facts)
    source.rename(accepted.content)
    return service.store.keep(accepted, f"file_{secrets.token_hex(12)}", PURPOSE).id
