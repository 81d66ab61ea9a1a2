"""Runs one segment on the GPU outside of a model, with buffers for its inputs and outputs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np

from trt_wan.build.realistic import Host, moments
from trt_wan.engines.contract import Network, Tensor
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.segment import Segment

ALIGNMENT = 256  # bytes; no buffer is smaller


@contextmanager
def buffers(gpu: Gpu, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Addresses by name."""
    held = []
    try:
        addresses = {}
        for name, size in sizes.items():
            held.append(gpu.allocate(max(size, ALIGNMENT)))
            addresses[name] = int(held[-1].handle)
        yield addresses
    finally:
        for buffer in held:
            with suppress(Exception):  # in a broken context nothing can be freed, and the cause is on its way
                buffer.close(gpu.stream)


@contextmanager
def placed(gpu: Gpu, values: Mapping[str, Host]) -> Iterator[dict[str, int]]:
    """The addresses of arrays that are copied to the GPU."""
    with buffers(gpu, {name: host.nbytes for name, host in values.items()}) as addresses:
        for name, host in values.items():
            gpu.write(gpu.view(addresses[name], host.shape, host.dtype), host)
        yield addresses


@contextmanager
def drawn(gpu: Gpu, network: Network) -> Iterator[dict[str, int]]:
    """The addresses of random inputs and weights of a network, made on the GPU."""
    tensors = network.inputs + network.weights
    sizes = {t.name: math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors}
    with buffers(gpu, sizes) as addresses:
        for seed, t in enumerate(tensors):
            array = gpu.view(addresses[t.name], t.shape, np.dtype(t.dtype))
            gpu.fill_random(array, seed, *moments(t.name, t.shape))
        yield addresses


@contextmanager
def started(
    gpu: Gpu, segment: Segment, network: Network, inputs: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """The addresses of all tensors of a started segment. Its outputs hold NaN until it runs."""
    sizes = {t.name: math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in network.outputs}
    with buffers(gpu, sizes) as outputs, buffers(gpu, {"": segment.scratch_bytes}) as scratch:
        for name, address in outputs.items():
            # All bits set is NaN in every type: numbers that are not written show.
            gpu.write(gpu.view(address, (sizes[name],), np.uint8), np.full(sizes[name], 0xFF, np.uint8))
        segment.start(scratch[""])
        yield {**inputs, **outputs}


def download(gpu: Gpu, tensors: Iterable[Tensor], addresses: Mapping[str, int]) -> dict[str, Host]:
    """By name."""
    arrays = {t.name: gpu.view(addresses[t.name], t.shape, np.dtype(t.dtype)) for t in tensors}
    return {name: gpu.download(array) for name, array in arrays.items()}


def run_segment(gpu: Gpu, segment: Segment, network: Network, values: Mapping[str, Host]) -> dict[str, Host]:
    """The outputs by name, from all inputs and weights."""
    with placed(gpu, values) as inputs, started(gpu, segment, network, inputs) as addresses:
        segment.enqueue(addresses)
        return download(gpu, network.outputs, addresses)
