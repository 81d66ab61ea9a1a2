"""Graphs and engines that a job needs and that are not there: made on the spot, or refused with the commands.

Exporting needs torch, which a machine that only runs videos need not have.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trt_wan.errors import GraphError, shell_command, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.events import Note, Progress

if TYPE_CHECKING:
    from trt_wan.engines.config import ModelConfig
    from trt_wan.engines.shape import Plan, VaeTile
    from trt_wan.runtime.job import Job
    from trt_wan.runtime.opening.gpu_sizes import ExportTiles
    from trt_wan.runtime.opening.model import Basis

EXPORTERS = ("torch", "onnx", "onnxscript")


def require_graphs(
    progress: Progress, basis: "Basis", width: int, height: int, job: "Job", build: bool
) -> Callable[[], None]:
    """Checks that a job of that size can run here, and returns the function that exports missing graphs.

    Raises UsageError, MemoryShort, WeightsError for a camera without weights, and GraphError for graphs that
    are missing and cannot be exported, or must not be (`build` False).
    """
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.graphs import graph_set

    plan, config = Plan(width, height, job.model_window, basis.precision), basis.weights.config
    basis.require_possible(plan)
    plans = plan, *basis.beside(plan, job, progress)
    lacking = [each for each in plans if _lacks(config, each, build)]

    def export() -> None:
        for each in lacking:
            from trt_wan.build.compile import export_graphs

            text = f"The graphs of {graph_set(config, each).title}, are exported first, once."
            progress(Note(text, "exporting_graphs"))
            export_graphs(config, each, progress)

    return export


def _lacks(config: "ModelConfig", plan: "Plan", build: bool) -> bool:
    """Whether graphs are missing. Raises GraphError if they cannot be exported, or must not be."""
    from trt_wan.engines.store.graphs import graph_set

    try:
        graph_set(config, plan).require()
    except GraphError as error:
        if not build:
            raise
        require_exporters(error)
        return True
    return False


def tile_exporter(basis: "Basis", build: bool) -> "ExportTiles | None":
    """Exports the graphs of the VAE's tiles for a job that needs them. None where it cannot, or must not."""
    if not build or lacking_exporters():
        return None

    def export(tile: "VaeTile", progress: Progress) -> None:
        from trt_wan.build.compile import export_graphs

        text = (
            "The job fits into GPU memory with the VAE in two tiles. Their graphs are exported first, once."
        )
        progress(Note(text, "exporting_graphs"))
        export_graphs(basis.weights.config, tile, progress)

    return export


def require_exporters(missing: GraphError) -> None:
    """Raises GraphError if the packages that would mend `missing` are not installed."""
    if lacking := lacking_exporters():
        raise GraphError(
            f"{missing.message} The packages that export them are not installed: {', '.join(lacking)}.",
            with_commands(
                "Install them, and start again. Or run the second command on another machine, and copy the "
                "folder from there:",
                install_command("build"),
                shell_command(missing.command),
            ),
            missing.command,
        ) from missing


def lacking_exporters() -> list[str]:
    """The packages that export graphs and are not installed."""
    return [name for name in EXPORTERS if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
