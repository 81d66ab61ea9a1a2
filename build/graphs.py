"""Exports every graph of a model and plan into the store, or does nothing if they are there."""

import time
from pathlib import Path

from trt_wan.build.export import export
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import GraphExported, building, graphs_folder


def build_graphs(model: ModelConfig, plan: Plan, exported: GraphExported) -> Path:
    """The folder of the graphs; calls `exported(name, seconds)` after each one that had to be made."""
    with building(model, plan) as folder:
        if folder is not None:
            for name, network in networks(model, plan).items():
                start = time.perf_counter()
                export(network, model, plan, folder / f"{name}.onnx")
                exported(name, time.perf_counter() - start)
    return graphs_folder(model, plan)
