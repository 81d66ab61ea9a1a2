"""What a GPU holds for the other ranks of a job: memory through which tokens and heads cross, and its layers
of the VAE. Both are of one size at a time. All ranks call these functions in step.
"""

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial

from numpy.typing import DTypeLike

from trt_wan.engines.contract import Network
from trt_wan.engines.shape import Plan, ShardPlan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.parallel.peer_memory import PeerMemory
from trt_wan.runtime.parallel.peer_sequence import PeerSequence
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.parallel.vae_pipeline import VaePipeline, open_pipeline
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.weights.on_device import DeviceWeights

PIPELINE_ROOM = 40 * 10**9  # bytes of every GPU: on smaller ones rank 0 decodes alone


class GpuRanks:
    def __init__(self, gpu: Gpu, weights: DeviceWeights) -> None:
        self._gpu, self._weights = gpu, weights
        self._peers: PeerSequence | None = None
        self._peers_of: tuple[Ranks, ShardPlan] | None = None
        self._pipeline: VaePipeline | None = None
        self._pipeline_of: tuple[Ranks, Plan] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        peers = 0 if self._peers is None else self._peers.memory.size
        return peers + (0 if self._pipeline is None else self._pipeline.nbytes)

    def peers(
        self, ranks: Ranks, share: ShardPlan, shards: Callable[[], Shards], dtype: DTypeLike, joined: int
    ) -> PeerSequence:
        """Opened unless it is there. `dtype` is that of q, k and v, `joined` the bytes of the largest array
        that is joined. Raises as PeerMemory.
        """
        if self._peers is None or self._peers_of != (ranks, share):
            self._close_peers()
            self._peers = PeerSequence.open(self._gpu, ranks, shards(), dtype, joined)
            self._peers_of = ranks, share
        return self._peers

    def pipeline(
        self,
        ranks: Ranks,
        plan: Plan,
        segments: MutableMapping[str, Segment],
        contracts: Mapping[str, Network],
        room: Callable[[], int],
    ) -> VaePipeline | None:
        """This rank's layers of the VAE, which `segments` get too. None where a GPU has too little `room` for
        two scratches more, and where the VAE is not ours.

        Each pipeline is cut where its layers' measured seconds say, and its parts have the names of the one
        before. So the weights of that one are freed: DeviceWeights finds them by those names.
        """
        if self._pipeline_of != (ranks, plan):
            if self._pipeline is not None:
                self._weights.release(self._pipeline.networks)
            self._close_pipeline()
            self._pipeline_of = ranks, plan
            if ranks.least(room()) >= PIPELINE_ROOM:
                connect = partial(PeerMemory, self._gpu, ranks)
                self._pipeline = open_pipeline(self._gpu, segments, contracts, ranks, connect)
            if self._pipeline is not None:
                segments.update(self._pipeline.segments)
        return self._pipeline

    def abandon(self) -> None:
        """Ends all waits for other ranks. Any thread may call it."""
        if self._peers is not None:
            self._peers.memory.poison()
        if self._pipeline is not None:
            self._pipeline.abandon()

    def close(self) -> None:
        self._close_peers()
        self._close_pipeline()

    def _close_peers(self) -> None:
        if self._peers is not None:
            self._peers.close()
        self._peers = self._peers_of = None

    def _close_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = self._pipeline_of = None
