"""The weights of Uni3C, found and opened when a job first asks for them: other jobs need no such file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import CameraConfig, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.errors import WeightsError, shell_command, with_commands
from trt_wan.runtime.events import Progress, silent
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.load import load_camera
from trt_wan.runtime.weights.random import RandomWeights
from trt_wan.runtime.weights.stored import Stored, Tensors

PART: Part = "camera_control"
RANDOM_SEED = 0


class CameraWeights(Mapping[str, NDArray[np.float32]]):
    """The `Tensors` of the part. Every method opens the file, `opened` with its notes."""

    def __init__(self, model: ModelConfig, weights: WeightFiles, precision: Precision) -> None:
        self._model, self._weights, self._precision = model, weights, precision
        self._found: tuple[ModelConfig, Tensors] | None = None

    def opened(self, progress: Progress = silent) -> CameraConfig:
        """The sizes in the file. Raises WeightsError if there is none, or none that fits."""
        if self._found is None:
            self._found = self._open(progress)
        return self._found[0].camera

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
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, name: str, indices: Sequence[int]) -> NDArray[np.float32]:
        return self._tensors.rows(name, indices)

    @property
    def _names(self) -> dict[str, tuple[int, ...]]:
        self.opened()
        assert self._found is not None
        return required_tensors(self._found[0], PART)

    @property
    def _tensors(self) -> Tensors:
        self.opened()
        assert self._found is not None
        return self._found[1]

    def _open(self, progress: Progress) -> tuple[ModelConfig, Tensors]:
        weights, model = self._weights, self._model
        if weights.random is not None:
            return model, RandomWeights(model, PART, RANDOM_SEED)
        try:
            chosen = weights.files.get(PART)
            return load_camera(weights.folders, chosen, model, self._precision, progress)
        except WeightsError as error:
            pull = with_commands("Or fetch it:", shell_command(("pull", "camera")))
            raise WeightsError(error.message, f"{error.hint} {pull}") from error
