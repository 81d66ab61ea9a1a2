"""SAM2's graphs in torch, and their export into the store. Their arguments are the tensors that
engines/sam2/contracts.py names.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from trt_wan.build.export import export_function
from trt_wan.build.graphs import fill
from trt_wan.build.sam2 import decoder, encoder, memory
from trt_wan.engines.contract import Network
from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan
from trt_wan.engines.sam2.contracts import networks
from trt_wan.engines.sam2.recipes import graph_set
from trt_wan.engines.store.graphs import GraphExported
from trt_wan.engines.store.locks import Waiting, in_silence

GRAPHS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "encoder": encoder.encoder,
    "prompt": decoder.prompt,
    "memory_encoder": memory.memory_encoder,
    "track": memory.track,
    "track_start": memory.track_start,
    "track_query": memory.track_query,
    "track_read": memory.track_read,
    "track_end": memory.track_end,
}


def export_sam2(network: Network, config: Sam2Config, path: Path) -> None:
    """Writes the ONNX graph of `network`, of any plan, to `path`."""
    function = GRAPHS[re.sub(r"_\d+$", "", network.name)]  # track_7 is track, for seven memories

    def graph(inputs: Sequence[Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return function(*inputs, w=weights, config=config)

    export_function(network, graph, path)


def build_sam2_graphs(
    config: Sam2Config, plan: Sam2Plan, exported: GraphExported, waiting: Waiting = in_silence
) -> Path:
    """The folder of the graphs; calls `exported(name, seconds)` after each one that had to be made, and
    `waiting` where another process is making them.
    """
    return fill(graph_set(config, plan), partial(_write, config, plan), exported, waiting)


def _write(config: Sam2Config, plan: Sam2Plan, name: str, path: Path) -> None:
    export_sam2(networks(config, plan)[name], config, path)
