"""Folders that are written to, the room on their disks, and the graphs of the default size."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from trt_wan.checks.check import Check, State, ok
from trt_wan.cli.missing import lacking_exporters
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import graph_set
from trt_wan.engines.store.home import home
from trt_wan.errors import GraphError, MemoryShort, shell_command
from trt_wan.install import install_command

LITTLE = 5e9  # bytes; graphs, engines and a video of one size take about 1 GB


def place_checks() -> list[Check]:
    elsewhere = 'export TRT_WAN_HOME="$PWD/trt-wan-cache"'
    return [
        _folder("cache", home(), "Keep trt-wan's own files in another folder:", elsewhere),
        _folder("temp", Path(tempfile.gettempdir()), "Use another folder:", 'export TMPDIR="$PWD"'),
    ]


def _folder(topic: str, folder: Path, fix: str, command: str) -> Check:
    """Tried with a file, since the bits of a folder do not say it on every system."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        number, name = tempfile.mkstemp(prefix=".trt-wan-doctor-", dir=there)
        os.close(number)
        with suppress(OSError):
            os.unlink(name)
    except OSError as error:
        return Check(topic, "fault", f"{folder} cannot be written ({error.strerror}).", fix, (command,))
    free = shutil.disk_usage(there).free
    text = f"{folder}, {free / 1e9:.1f} GB free"
    if free < LITTLE:
        return Check(topic, "warning", f"{text}.", f"Free some space. {fix}", (command,))
    return ok(topic, text)


def graphs_check(config: ModelConfig, precision: Precision) -> Check:
    """Graphs of the default size; on the CPU also whether the model fits in memory."""
    plan = Plan(precision=precision)
    graphs = graph_set(config, plan)
    if precision == "fp32":
        from trt_wan.runtime.executors.onnxruntime import require_memory

        try:
            require_memory(config, plan)
        except MemoryShort as error:
            command = shell_command(("weights", "tiny", "models/"))
            return Check(
                "memory", "fault", error.message, "To try the pipeline, make tiny weights:", (command,)
            )
    try:
        graphs.require()
    except GraphError as error:
        text = f"Those of {plan.width}x{plan.height} are not there yet; the first run exports them."
        build = shell_command(error.command)
        if lacking_exporters():
            text = f"Those of {plan.width}x{plan.height} are not there, and cannot be exported here."
            state: State = "warning" if any((home() / "graphs").glob(f"{config.name}-*")) else "fault"
            commands = install_command("build"), build
            return Check("graphs", state, text, "Install what exports them, then:", commands)
        return Check("graphs", "warning", text, "To have them before:", (build,))
    return ok("graphs", f"of {plan.width}x{plan.height}, {plan.frames} frames a window")
