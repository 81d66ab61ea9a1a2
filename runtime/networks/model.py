"""A model ready to run at one size: contracts and an executor, called by network name.

    (q, k, v) = model.run("attn_in", x, time_modulation, cos, sin, n=7)

Inputs go in the contract's order; `n` is the number of the set of weights (the block). Inputs are numpy
arrays or arrays of the executor; `np.asarray` of a result brings it to the host.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.lynx import Lynx
from trt_wan.engines.shape import Plan, VaeTile
from trt_wan.runtime.executors import Array, Executor, Observe
from trt_wan.runtime.parallel.planner import Split
from trt_wan.runtime.parallel.ranks import Ranks, Task
from trt_wan.runtime.parallel.sequence import SequenceParallel
from trt_wan.runtime.parallel.vae_pipeline import VaePipeline

ALONE = Ranks()
MOST_REMEMBERED = 256 * 10**6  # bytes of the host


class Model:
    """`weights` are those that the host itself reads: umT5's token embedding and final norm. With `tile` the
    VAE's networks have that shape, and networks/vae.py computes in tiles. `keep` is the share of the key
    blocks that self-attention keeps, None for all: denoise.py says in which steps.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        executor: Executor,
        weights: Mapping[Part, Mapping[str, Array]],
        tile: VaeTile | None = None,
        keep: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.plan, self.executor, self.weights = config, plan, executor, weights
        self.tile, self.keep, self.ranks = tile, keep, ranks
        self.split: Split = "tokens"  # how the ranks share the steps of the job that runs
        self.sequence: SequenceParallel | None = None  # splits tokens; None on one GPU
        self.lynx: LynxModel | None = None  # the adapters of the job that runs
        self.vae_pipeline: VaePipeline | None = None
        self.networks = {**networks(config, plan), **({} if tile is None else networks(config, tile))}
        self._remembered: OrderedDict[Hashable, Array] = OrderedDict()  # the one used last comes last
        self._before_each: Callable[[], None] | None = None

    def take(self, plan: Plan) -> None:
        """Adds the networks of a plan beside the model's: Uni3C's, Lynx's, a rank's. Call between jobs."""
        self.networks |= networks(self.config, plan)

    def take_pipeline(self, pipeline: VaePipeline | None) -> None:
        """Has the ranks decode together, and encode where that is asked for. None: as on one GPU."""
        self.vae_pipeline = pipeline
        if pipeline is not None:
            self.networks |= pipeline.networks

    def run(self, name: str, *inputs: Array, n: int = 0) -> tuple[Array, ...]:
        """The outputs of network `name`. Exceptions of the check in `checked` pass through."""
        if self._before_each is not None:
            self._before_each()
        network = self.networks[name]
        assert len(inputs) == len(network.inputs), (
            f"{name} takes {len(network.inputs)} inputs, got {len(inputs)}"
        )
        named = {}
        for contract, value in zip(network.inputs, inputs, strict=True):
            assert tuple(value.shape) == contract.shape, (
                f"{name}.{contract.name} is {contract.shape}, got {value.shape}"
            )
            named[contract.name] = value
        return self.executor.run(network, n, named)

    def fetched(self, arrays: Iterable[Array]) -> Iterator[Array]:
        """The arrays on the host, in order. Each is copied, and used by the caller, while a GPU computes the
        next one: that has been asked for before.
        """
        ahead: deque[Callable[[], Array]] = deque()
        for array in arrays:
            ahead.append(self.executor.fetch(array))
            del array  # its memory is free when it has been copied
            if len(ahead) > 1:
                yield ahead.popleft()()
        while ahead:
            yield ahead.popleft()()

    def place(self, array: Array) -> Array:
        """Returns `array` where the executor takes its inputs from. For arrays that go in many times."""
        return self.executor.place(array)

    def release(self, *names: str) -> None:
        """Call after the last run of these networks in a job; the executor may free their weights."""
        self.executor.release(set(names))

    def remembered(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """Returns the host array of `key`, which an earlier job of this size may have made: `key` decides all
        of its bits. None is the key of an array that no other job can use.
        """
        if key is None:
            return make()
        if key in self._remembered:
            self._remembered.move_to_end(key)
            return self._remembered[key]
        made = make()
        if np.isfinite(made.sum()):  # others are computed again, to find the layer
            self._remembered[key] = made
        while sum(array.nbytes for array in self._remembered.values()) > MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        return made

    def side_by_side(self, wanted: Sequence[tuple[Hashable, Task]]) -> list[Array]:
        """`remembered` of several arrays, each of which one of the ranks computes. A rank whose process is
        younger than others remembers less.
        """
        known = self.ranks.all_have([key in self._remembered for key, _ in wanted])
        found = {
            k: self.remembered(key, task[1])
            for k, ((key, task), is_known) in enumerate(zip(wanted, known, strict=True))
            if is_known
        }
        new = [k for k in range(len(wanted)) if k not in found]
        made = self.ranks.divide([wanted[k][1] for k in new])
        for k, array in zip(new, made, strict=True):
            found[k] = self.remembered(wanted[k][0], partial(np.asarray, array))
        return [found[k] for k in range(len(wanted))]

    @contextmanager
    def checked(self, before_each: Callable[[], None]) -> Iterator[None]:
        """Calls `before_each` before every network inside the block; it may raise to end the job."""
        before, self._before_each = self._before_each, before_each
        try:
            yield
        finally:
            self._before_each = before

    @contextmanager
    def executed_by(self, wrap: Observe) -> Iterator[None]:
        """Runs networks by `wrap(executor)` inside the block."""
        before, self.executor = self.executor, wrap(self.executor)
        try:
            yield
        finally:
            self.executor = before


@dataclass(frozen=True)
class LynxModel:
    """The adapters that act, and the model at the size of a face picture, if the ref adapter is one."""

    adapters: Lynx
    face: Model | None
