"""The fusers' keys of every part of a window, computed once and kept on the host.

Those of one part of the 14B are 17 MB. Beyond MOST_BYTES they are computed again in every step, which takes
nine small networks a part; uniform schedules have other parts in every step, and fill it sooner.
"""

import numpy as np

from trt_wan.runtime.context.parts import Part
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import PerLayer, fuser_keys

MOST_BYTES = 2 << 30


class PartFaces:
    """`motion` is that of all frames of the window, [frames, dim]; None without a face. `pictures` slots
    behind the reference's have no face.
    """

    def __init__(self, model: Model, motion: Array | None, pictures: int = 0, most: int = MOST_BYTES) -> None:
        self._model, self._motion, self._pictures, self._room = model, motion, pictures, most
        self._kept: dict[tuple[int, ...], PerLayer] = {}

    def of(self, part: Part) -> PerLayer | None:
        if self._motion is None:
            return None
        if part.slots in self._kept:
            return self._kept[part.slots]
        made = fuser_keys(self._model, self._motion[part.frames], self._pictures)
        if self._room > 0:
            host = [tuple(np.asarray(array) for array in layer) for layer in made]
            self._room -= sum(array.nbytes for layer in host for array in layer)
            self._kept[part.slots] = host
        return made
