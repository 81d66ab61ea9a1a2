"""What runs the graphs. An executor knows tensors by name and nothing of models, windows or files."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.contract import Network

Array = NDArray[np.generic]


class Executor(Protocol):
    def run(self, network: Network, tensors: Mapping[str, Array]) -> tuple[Array, ...]:
        """Runs `network` on its inputs and weights by name; returns its outputs in the contract's order."""
        ...
