"""The model of the last command, which stays open for the next one with the same files and settings."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trt_wan.engines.store.files import stamp
from trt_wan.errors import InputError, Stopped, UsageError, WeightsError
from trt_wan.runtime.events import Event, Note, Progress
from trt_wan.runtime.opening.gpu_sizes import ExportTiles
from trt_wan.runtime.opening.model import Basis, OpenModel, open_basis
from trt_wan.runtime.settings import Settings, WeightFiles

HARMLESS = (Stopped, UsageError, InputError, WeightsError)  # the model stays usable after these
PREPROCESSING_BYTES = 4 * 10**9  # GPU memory for YOLO, ViTPose-H and SAM2 (an estimate)
Stamps = dict[Path, tuple[int, int]]


class KeptModel:
    """`Models` of trt_wan/cli/session.py. A checkpoint that changes on the disk is opened again."""

    def __init__(self) -> None:
        self._key: tuple[WeightFiles, Settings] | None = None
        self._basis: Basis | None = None
        self._stamps: Stamps = {}
        self._model: OpenModel | None = None

    def basis(self, files: WeightFiles, settings: Settings, progress: Progress) -> Basis:
        key = (files, replace(settings, keep_encoders=True))
        if self._basis is not None and (key != self._key or _stamps(self._basis) != self._stamps):
            self.close()
        if self._basis is None:
            self._basis = open_basis(*key, _logged)
            self._key, self._stamps = key, _stamps(self._basis)
        return self._basis

    @contextmanager
    def opened(self, basis: Basis, export_tiles: ExportTiles | None) -> Iterator[OpenModel]:
        assert basis is self._basis, "another basis was opened since"
        if self._model is None:
            self._model = basis.open(export_tiles=export_tiles)
        try:
            yield self._model
        except HARMLESS:
            raise
        except BaseException:
            self._close_model()
            raise

    def make_room(self) -> None:
        """Closes the model where it leaves no memory for the networks of the preprocessing."""
        place = self._basis.place if self._basis is not None else None
        if self._model is not None and place is not None and place[0].free_bytes() < PREPROCESSING_BYTES:
            self._close_model()

    def close(self) -> None:
        self._close_model()
        self._basis = self._key = None

    def _close_model(self) -> None:
        if self._model is not None:
            model, self._model = self._model, None
            model.close()


def _logged(event: Event) -> None:
    """Notes about the machine and the weights concern no single command."""
    if isinstance(event, Note):
        print(event.text, file=sys.stderr, flush=True)


def _stamps(basis: Basis) -> Stamps:
    """Size and time of change of every file of the weights."""
    files = {file for named in basis.weights.files.values() for file in named}
    return {file: stamp(file) for file in files}
