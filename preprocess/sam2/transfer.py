"""How frames and small numbers get to where SAM2's networks compute, and masks get back.

For ONNX Runtime everything is numpy and at once. On a GPU nothing waits but the reading of a result: frames
are resized there, small inputs go up through slots of pinned memory, pointers never leave the device, and a
frame's mask and score come down in memory of their own, so that frames can be asked for ahead of it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan, pointers_of
from trt_wan.preprocess.sam2.kernels import THREADS, sam2_kernels
from trt_wan.preprocess.sam2.resample import InputRule, model_input
from trt_wan.preprocess.sam2.resize_on_gpu import Resizer, allocated
from trt_wan.runtime.device.arena import ALIGNMENT, laid_out
from trt_wan.runtime.device.gpu import DeviceArray, Gpu, Pinned, copy
from trt_wan.runtime.device.pinned import Ring
from trt_wan.runtime.executors import Array
from trt_wan.runtime.video.reader import Picture

Host = NDArray[Any]

SLOTS = 32  # of small inputs: two a frame and object, of the frames that are under way
AHEAD = 2  # frames; fewer than stages.PATIENCE, so that a new prompt shows before the next is thought of


class Carrier(Protocol):
    ahead: int  # how many frames may be under way when another is asked for

    def begin(self) -> None:
        """Called in the thread that the rest is called in."""
        ...

    def pixels(self, pictures: Sequence[Picture], rule: InputRule) -> Callable[[], Array]:
        """Starts to make the encoder's input [batch, 3, S, S], and returns how to get it. A batch that is not
        full is filled up with its last picture.
        """
        ...

    def part(self, batch: Array, i: int) -> Array:
        """Row `i` of a batch, uncopied."""
        ...

    def small(self, values: Mapping[str, Host]) -> Mapping[str, Array]:
        """Inputs that are used for the next call, and not after it."""
        ...

    def rows(self, pointers: Sequence[Array], places: int) -> Array:
        """[places, channels], used for the next call: the pointers, then zeros."""
        ...

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Host]]:
        """Starts to bring arrays to the host, and returns how to get them, once."""
        ...


class HostCarrier:
    """Frames are resized by threads while others are tracked."""

    ahead = 0

    def __init__(self, config: Sam2Config, plan: Sam2Plan) -> None:
        self.config, self.batch = config, plan.batch
        self._threads = ThreadPoolExecutor(min(4, plan.batch), thread_name_prefix="sam2")

    def begin(self) -> None:
        pass

    def pixels(self, pictures: Sequence[Picture], rule: InputRule) -> Callable[[], Array]:
        size = self.config.image_size
        resized = [self._threads.submit(model_input, picture, size, rule) for picture in pictures]

        def whole() -> Array:
            made = [future.result() for future in resized]
            return np.stack(made + made[-1:] * (self.batch - len(made)))

        return whole

    def part(self, batch: Array, i: int) -> Array:
        row: Array = batch[i]
        return row

    def small(self, values: Mapping[str, Host]) -> Mapping[str, Array]:
        return values

    def rows(self, pointers: Sequence[Array], places: int) -> Array:
        whole = np.zeros((places, self.config.channels), np.float32)
        for row, pointer in zip(whole, pointers, strict=False):
            row[:] = pointer
        return whole

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Host]]:
        return lambda: [np.asarray(array) for array in arrays]


class DeviceCarrier:
    """One stream and one thread at a time. What is not an activation has memory of its own, which is written
    anew again and again: everything that reads it is enqueued before.
    """

    ahead = AHEAD

    def __init__(self, gpu: Gpu, config: Sam2Config, plan: Sam2Plan) -> None:
        self.gpu, self.config, self.batch = gpu, config, plan.batch
        side, mask = config.image_size, 4 * config.mask_size**2  # bytes of a mask
        self._kernels = sam2_kernels(gpu)
        self._resizer = Resizer(gpu, side)
        self._ring = Ring(SLOTS, mask + (1 << 16))
        most = pointers_of(max(plan.memories))
        shapes: list[tuple[tuple[int, ...], Any]] = [
            ((plan.batch, 3, side, side), np.float32),
            ((SLOTS, self._ring.size), np.uint8),
            ((most, config.channels), np.float32),
        ]
        self._buffer, (self._pixels, self._slots, self._rows) = allocated(gpu, shapes)
        self._landing_bytes = mask + 2 * ALIGNMENT  # and a score
        self._free: list[Pinned] = []
        self._landings: list[Pinned] = []  # all of them: a copy into one may outlive who asked for it

    def begin(self) -> None:
        self.gpu.device.set_current()

    def pixels(self, pictures: Sequence[Picture], rule: InputRule) -> Callable[[], Array]:
        rows = [cast(DeviceArray, self.part(cast(Array, self._pixels), i)) for i in range(self.batch)]
        for picture, row in zip(pictures, rows, strict=False):
            self._resizer.write(picture, rule, row)
        last = rows[len(pictures) - 1]
        for row in rows[len(pictures) :]:
            copy(row.address, last.address, last.nbytes, self.gpu.stream)
        return lambda: cast(Array, self._pixels)

    def part(self, batch: Array, i: int) -> Array:
        assert isinstance(batch, DeviceArray)
        size = batch.nbytes // batch.shape[0]
        return cast(Array, self.gpu.view(batch.address + i * size, batch.shape[1:], batch.dtype))

    def small(self, values: Mapping[str, Host]) -> Mapping[str, Array]:
        offsets, total = laid_out({name: value.nbytes for name, value in values.items()})
        assert total <= self._ring.size, f"{total} bytes in a slot of {self._ring.size}"
        turn, slot = self._ring.take()
        start = self._slots.address + turn * self._ring.size
        made = {}
        for name, value in values.items():
            at = offsets[name]
            slot.bytes[at : at + value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            made[name] = cast(Array, self.gpu.view(start + at, value.shape, value.dtype))
        copy(start, slot.address, total, self.gpu.stream)
        slot.used_by(self.gpu.stream)
        return made

    def rows(self, pointers: Sequence[Array], places: int) -> Array:
        assert len(pointers) <= places <= self._rows.shape[0], f"{len(pointers)} in {places} places"
        channels = self.config.channels
        table = np.zeros(places, np.uint64)
        for i, pointer in enumerate(pointers):
            assert isinstance(pointer, DeviceArray) and pointer.shape == (channels,), pointer
            table[i] = pointer.address
        addresses = cast(DeviceArray, self.small({"rows": table})["rows"])
        arguments = (addresses.address, self._rows.address, np.int32(channels))
        self._kernels.launch(self.gpu.stream, "gather_rows", places, THREADS, *arguments)
        return cast(Array, self.gpu.view(self._rows.address, (places, channels), np.float32))

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Host]]:
        given = [cast(DeviceArray, array) for array in arrays]
        offsets, total = laid_out({str(i): array.nbytes for i, array in enumerate(given)})
        assert total <= self._landing_bytes, f"{total} bytes where {self._landing_bytes} can land"
        slot = self._landing()
        for i, array in enumerate(given):
            copy(slot.address + offsets[str(i)], array.address, array.nbytes, self.gpu.stream)
        slot.used_by(self.gpu.stream)
        kinds = [(offsets[str(i)], a.nbytes, a.dtype, a.shape) for i, a in enumerate(given)]

        def result() -> list[Host]:
            slot.wait()
            found = [slot.bytes[at : at + n].view(dtype).reshape(shape) for at, n, dtype, shape in kinds]
            copies = [array.copy() for array in found]
            self._free.append(slot)
            return copies

        return result

    def _landing(self) -> Pinned:
        if not self._free:
            self._landings.append(Pinned(self._landing_bytes))
            self._free.append(self._landings[-1])
        return self._free.pop()
