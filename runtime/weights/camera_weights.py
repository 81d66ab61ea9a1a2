"""The weights of Uni3C, found and opened when a job first asks for them: other jobs need no such file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.config import CameraConfig, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.errors import WeightsError, shell_command, with_commands
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.load import load_camera
from trt_wan.runtime.weights.random import RandomWeights
from trt_wan.runtime.weights.stored import Stored

PART: Part = "camera_control"
RANDOM_SEED = 0


class CameraTensors(Protocol):
    def stored(self, name: str) -> Stored: ...
    def __getitem__(self, name: str) -> NDArray[np.float32]: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


class CameraWeights(Mapping[str, NDArray[np.float32]]):
    """The `Tensors` of the part. Every method opens the file, `opened` with its notes."""

    def __init__(self, model: ModelConfig, weights: WeightFiles, precision: Precision) -> None:
        self._model, self._weights, self._precision = model, weights, precision
        self._found: tuple[CameraConfig, CameraTensors] | None = None

    def opened(self, progress: Progress = silent) -> CameraConfig:
        """The sizes in the file. Raises WeightsError if there is none, or none that fits."""
        if self._found is None:
            self._found = self._open(progress)
        return self._found[0]

    @property
    def files(self) -> tuple[Path, ...]:
        """None for random weights."""
        tensors = self._tensors
        if not isinstance(tensors, Checkpoint):
            return ()
        return tuple(sorted({entry.file for entry in tensors.file.entries.values()}))

    def stored(self, name: str) -> Stored:
        return self._tensors.stored(name)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def _tensors(self) -> CameraTensors:
        self.opened()
        assert self._found is not None
        return self._found[1]

    def _open(self, progress: Progress) -> tuple[CameraConfig, CameraTensors]:
        weights, model = self._weights, self._model
        if weights.random is not None:
            return model.camera, RandomWeights(model, PART, RANDOM_SEED)
        try:
            found, file = load_camera(
                weights.folders, weights.files.get(PART), model, self._precision, progress
            )
        except WeightsError as error:
            pull = with_commands("Or fetch it:", shell_command(("pull", "camera")))
            raise WeightsError(error.message, f"{error.hint} {pull}") from error
        return found.camera, file
