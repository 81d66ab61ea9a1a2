"""A pack: the weights of one network and set, such as block 7's `attn_out`, in one run of bytes.

Each tensor begins at a multiple of 256.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trt_wan.engines.contract import QUANTISED, Network, Tensor, scale_name
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import DeviceArray, Gpu

Key = tuple[str, int]  # network, set


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


@dataclass(frozen=True)
class Pack:
    network: Network
    n: int
    offsets: Mapping[str, int]  # bytes from the start of the pack
    size: int

    @staticmethod
    def of(network: Network, n: int) -> "Pack":
        return Pack(network, n, *laid_out({tensor.name: nbytes(tensor) for tensor in network.weights}))

    @property
    def key(self) -> Key:
        return self.network.name, self.n

    @property
    def scaled(self) -> dict[str, Tensor]:
        """The weights of 8 bits by the names of their scales."""
        return {scale_name(t.name): t for t in self.network.weights if t.dtype in QUANTISED}

    def arrays(self, gpu: Gpu, address: int) -> dict[str, DeviceArray]:
        return {
            t.name: gpu.view(address + self.offsets[t.name], t.shape, t.dtype) for t in self.network.weights
        }
