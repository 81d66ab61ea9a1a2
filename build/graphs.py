"""Exports the graphs of a model and plan into the store, unless they are there."""

import time
from collections.abc import Callable
from pathlib import Path

from trt_wan.build.export import export
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import GraphExported, GraphSet, graph_set


def build_graphs(model: ModelConfig, plan: Plan, exported: GraphExported) -> Path:
    """The folder of the graphs; calls `exported(name, seconds)` after each one that had to be made."""
    contracts = networks(model, plan)

    def write(name: str, path: Path) -> None:
        export(contracts[name], model, plan, path)

    return fill(graph_set(model, plan), write, exported)


def fill(graphs: GraphSet, write: Callable[[str, Path], None], exported: GraphExported) -> Path:
    """Has `write(name, path)` export every graph of a set, unless it is complete. Returns its folder."""
    with graphs.filling() as folder:
        if folder is not None:
            for name in graphs.names:
                start = time.perf_counter()
                write(name, folder / f"{name}.onnx")
                exported(name, time.perf_counter() - start)
    return graphs.folder
