"""Exports the graphs of a model and plan into the store, unless they are there."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

from trt_wan.build.beside import Write, helpers, helpers_for
from trt_wan.build.export import export
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.files import PARTIAL
from trt_wan.engines.store.graphs import GraphExported, GraphSet, graph_set
from trt_wan.engines.store.locks import Waiting, in_silence


def build_graphs(
    model: ModelConfig, plan: Plan, exported: GraphExported, waiting: Waiting = in_silence
) -> Path:
    """The folder of the graphs; calls `exported(name, seconds)` after each one that had to be made, and
    `waiting` where another process is making them.
    """
    return fill(graph_set(model, plan), partial(_write, model, plan), exported, waiting)


def _write(model: ModelConfig, plan: Plan, name: str, path: Path) -> None:
    export(networks(model, plan)[name], model, plan, path)


def fill(graphs: GraphSet, write: Write, exported: GraphExported, waiting: Waiting) -> Path:
    """Has `write`, which can be pickled, export the missing graphs of a set, several at a time where that is
    faster. Returns its folder.
    """
    try:
        with graphs.filling(waiting) as missing, _no_garbage_collection():
            _export(graphs, list(missing), write, exported)
    except KeyboardInterrupt as stop:
        stop.add_note("Finished graphs stay: the same command goes on from there.")
        raise
    return graphs.folder


def _export(graphs: GraphSet, missing: list[str], write: Write, exported: GraphExported) -> None:
    one_at_a_time = Lock()  # the manifest, and the caller's function

    def work(write: Write) -> None:
        """Exports graphs with `write` until none is left; one that fails is left for another process."""
        while missing:
            try:
                name = missing.pop(0)
            except IndexError:
                return
            # A helper of a killed build may be writing its own for a moment yet.
            path = graphs.folder / f"{name}.onnx.{os.getpid()}{PARTIAL}"
            start = time.perf_counter()
            try:
                write(name, path)
            except OSError:
                missing.insert(0, name)
                raise
            with one_at_a_time:
                path.replace(graphs.folder / f"{name}.onnx")
                graphs.finished(name)
                exported(name, time.perf_counter() - start)

    with helpers(helpers_for(len(missing)), write, work) as wait:
        work(write)
        wait()
        work(write)  # graphs at which a helper failed


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
