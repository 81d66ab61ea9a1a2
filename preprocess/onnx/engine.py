"""Runs a user's ONNX file as a TensorRT engine, batch by batch."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import GpuKind
from trt_wan.preprocess.onnx.file import OnnxFile
from trt_wan.preprocess.onnx.memory import Flight, Sender, Slot
from trt_wan.preprocess.onnx.recipe import recipe_of
from trt_wan.runtime import events
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.tensorrt import open_engines

Array = NDArray[Any]

SLOTS = 2  # batches on their way: while one is computed, the host prepares the next


class EngineRunner:
    """An engine and its memory. Batches are of exactly `shape`; results are copies on the host.

    Whoever asks for a slot sends a batch into it, has the engine compute it and fetches what is wanted of it;
    that only enqueues. A slot that is still in use is waited for.
    """

    def __init__(
        self,
        gpu: Gpu,
        flavour: Flavour,
        file: OnnxFile,
        shape: tuple[int, ...],
        progress: events.Progress = events.silent,
    ) -> None:
        self.gpu = gpu
        recipe = recipe_of(file, shape, "current", flavour, GpuKind(gpu.name, gpu.driver))
        self._segment = open_engines(gpu, {file.path.name: recipe}, progress)[file.path.name]
        self._scratch = gpu.allocate(max(1, self._segment.scratch_bytes))
        self._segment.start(int(self._scratch.handle))
        self.input = file.inputs[0].name
        self.outputs = [value.name for value in file.outputs]
        sender = Sender(gpu)
        parts = {n: self._segment.tensor(n) for n in (self.input, *self.outputs)}
        self.shapes = {n: shape for n, (shape, _) in parts.items()}
        self._slots = [Slot(gpu, sender, parts) for _ in range(SLOTS)]
        self.settle = self._segment.settle

    def slot(self) -> Slot:
        """The one that was used longest ago; results of it that nobody has waited for yet are kept."""
        slot = self._slots.pop(0)
        self._slots.append(slot)
        if slot.flight is not None:
            slot.flight.wait()
        return slot

    def compute(self, slot: Slot) -> None:
        self._segment.enqueue({name: address for name, (address, _, _) in slot.parts.items()})

    def stream(self, batches: Iterable[Array]) -> Iterator[list[Array]]:
        """The outputs of each batch, in order; the next batch is asked for while one is computed."""
        waiting: deque[Flight] = deque()
        for batch in batches:
            slot = self.slot()
            address, shape, dtype = slot.parts[self.input]
            assert batch.shape == shape, f"{batch.shape} != {shape}"
            slot.send_to(address, np.asarray(batch, dtype))
            self.compute(slot)
            waiting.append(slot.fetch([slot.parts[name] for name in self.outputs], self.settle))
            if len(waiting) == SLOTS:
                yield waiting.popleft().wait()
        while waiting:
            yield waiting.popleft().wait()
