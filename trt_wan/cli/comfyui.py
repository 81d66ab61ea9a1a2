"""`trt-wan comfyui`: the nodes for ComfyUI."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report


@click.group(short_help="Install the nodes for ComfyUI.")
def comfyui() -> None:
    """The nodes for ComfyUI: TrtWan Load Model, Preprocess, Animate and Build."""


@comfyui.command(short_help="Write the folder of the nodes into a ComfyUI.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@command
def install(*, report: Report, folder: Path) -> Any:
    """Write the folder `trt-wan` into the custom_nodes of the ComfyUI in DIR. ComfyUI has to run with the
    Python that has trt-wan.

    \b
    trt-wan comfyui install ~/ComfyUI
    """
    from trt_wan.comfyui.install import install, own_python
    from trt_wan.errors import with_commands
    from trt_wan.install import install_command

    target = install(folder)
    python = own_python(folder)
    if python is not None:
        text = f"ComfyUI's own Python ({python}) has not this version of trt-wan. Install it there:"
        command = install_command("build", python)
        note(report, with_commands(text, command), "another_python", python=str(python), command=command)
    note(report, "Start ComfyUI again to load the nodes.")
    return target, {"folder": str(target), "python": None if python is None else str(python)}
