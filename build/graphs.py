"""Exports the graphs of a model and plan into the store, unless they are there."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trt_wan.build.export import export
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import GraphExported, GraphSet, graph_set
from trt_wan.engines.store.locks import Waiting, in_silence


def build_graphs(
    model: ModelConfig, plan: Plan, exported: GraphExported, waiting: Waiting = in_silence
) -> Path:
    """The folder of the graphs; calls `exported(name, seconds)` after each one that had to be made, and
    `waiting` where another process is making them.
    """
    contracts = networks(model, plan)

    def write(name: str, path: Path) -> None:
        export(contracts[name], model, plan, path)

    return fill(graph_set(model, plan), write, exported, waiting)


def fill(
    graphs: GraphSet, write: Callable[[str, Path], None], exported: GraphExported, waiting: Waiting
) -> Path:
    """Has `write(name, path)` export the missing graphs of a set. Returns its folder."""
    try:
        with graphs.filling(waiting) as missing, _no_garbage_collection():
            for name in missing:
                start = time.perf_counter()
                write(name, graphs.folder / f"{name}.onnx")
                graphs.finished(name)
                exported(name, time.perf_counter() - start)
    except KeyboardInterrupt as stop:
        stop.add_note("Finished graphs stay: the same command goes on from there.")
        raise
    return graphs.folder


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Each full collection walks through all of torch, which took a tenth of an export. The cycles of all
    graphs together take 0.1 GB.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
