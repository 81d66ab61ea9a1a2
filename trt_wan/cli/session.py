"""A process that runs many commands gives each of them a report, and all of them a model that stays open.

A process of the command line runs one command and has no session. trt_wan/worker/child.py has one.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import click

from trt_wan.cli.report import Report

if TYPE_CHECKING:
    from trt_wan.runtime.events import Progress
    from trt_wan.runtime.opening.gpu_sizes import ExportTiles
    from trt_wan.runtime.opening.model import Basis, OpenModel
    from trt_wan.runtime.settings import Settings, WeightFiles


class Models(Protocol):
    def basis(self, files: "WeightFiles", settings: "Settings", progress: "Progress") -> "Basis": ...

    def opened(
        self, basis: "Basis", export_tiles: "ExportTiles | None"
    ) -> "AbstractContextManager[OpenModel]": ...

    def make_room(self) -> None:
        """Call before other networks are opened on the GPU."""
        ...


@dataclass(frozen=True)
class Session:
    report: Report
    models: Models


class OneModel:
    """Opens a model for one command, and closes it."""

    def basis(self, files: "WeightFiles", settings: "Settings", progress: "Progress") -> "Basis":
        from trt_wan.runtime.opening.model import open_basis

        return open_basis(files, settings, progress)

    @contextmanager
    def opened(self, basis: "Basis", export_tiles: "ExportTiles | None") -> "Iterator[OpenModel]":
        with basis.open(export_tiles=export_tiles) as model:
            yield model

    def make_room(self) -> None:
        pass


def current_session() -> Session | None:
    context = click.get_current_context(silent=True)
    return context.find_object(Session) if context is not None else None


def current_models() -> Models:
    session = current_session()
    return session.models if session is not None else OneModel()
