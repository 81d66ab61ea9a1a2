"""Every network of the tiny model on the GPU that is there, by every candidate, against ONNX Runtime in fp32.

Inputs are those of a tiny job on ONNX Runtime, each network's first call. FP8 and bf16 get the same numbers,
rounded to their types, and the reference gets the rounded ones. With `pytest -s` it prints the errors, worst
first.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from on_gpu import require_gpu, run_segment
from tiny_job import PLAN, prepare, write_sound

from trt_wan.build.graphs import build_graphs
from trt_wan.build.realistic import dequantised
from trt_wan.build.reference import ADDED_TO
from trt_wan.engines import fp8, int8
from trt_wan.engines.choice.candidates import SPARSE, Candidate, Machine, candidates, has_engine
from trt_wan.engines.choice.recipes import recipes_here
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import QUANTISED, Network, scale_name
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.precision import PRECISIONS, Precision
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import Recipe
from trt_wan.engines.store.engines import ensure
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.errors import GraphError
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.guidance import Nag
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import open_model
from trt_wan.runtime.opening.segments import machine_of, missing, open_segments
from trt_wan.runtime.segments.tensorrt import finish_engines
from trt_wan.runtime.settings import KEEP, Settings, WeightFiles

Values = dict[str, Any]
# Calls of the tiny job by network: inputs and weights together.
Calls = Mapping[str, Values]


@pytest.fixture(scope="module")
def gpu() -> Any:
    return require_gpu()


@pytest.fixture(scope="module")
def calls(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    found: dict[str, Values] = {}
    run = OnnxRuntimeExecutor.run

    def recorded(self: OnnxRuntimeExecutor, network: Network, n: int, inputs: Any) -> Any:
        if network.name not in found:
            found[network.name] = {**inputs, **self.weights.bind(network, n)}
        return run(self, network, n, inputs)

    folder = tmp_path_factory.mktemp("inputs")
    inputs = Inputs.from_folder(prepare(folder, write_sound(folder / "sound.m4a", 1)), "animate")
    settings = Settings(executor="onnxruntime")
    job = Job(inputs, window=PLAN.frames, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeExecutor, "run", recorded)
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        with open_model(WeightFiles(random="tiny"), settings) as model:
            list(model.pieces(job))
            for opened in model._sizes._models.values():  # type: ignore[attr-defined]
                opened.keep = KEEP  # that of turbo, a tier which the CPU refuses
            list(model.pieces(replace(job, nag=Nag("dark"))))
    return found


def test_the_jobs_call_every_network(calls: Calls) -> None:
    """Needs no GPU: a new network shows here."""
    assert set(calls) == set(networks(TINY, PLAN))


def at_types(network: Network, values: Values) -> Values:
    """The numbers in the contract's types; weights of 8 bits get their scales."""
    typed: Values = {}
    for tensor in network.inputs + network.weights:
        if tensor.name in typed:
            continue
        host = np.ascontiguousarray(np.asarray(values[tensor.name]))
        if tensor.dtype in QUANTISED:
            quantise = int8.quantise_rows if tensor.dtype == "int8" else fp8.quantise_rows
            typed[tensor.name], typed[scale_name(tensor.name)] = quantise(host)
        else:
            typed[tensor.name] = host.astype(tensor.dtype)
    return typed


def relative_error(made: Values, wanted: Values, values: Values) -> float:
    errors = []
    for name, want in wanted.items():
        got = made[name].astype(np.float32)
        before = values[ADDED_TO[name]] if name in ADDED_TO else np.float32(0)
        off, size = np.linalg.norm(got - want), np.linalg.norm(want - before)
        errors.append(float(off / size) if size else float(off))  # caches of a first chunk hold zeros alone
    return max(errors) if np.isfinite(errors).all() else float("inf")


def is_built(recipe: Recipe) -> bool:
    try:
        ensure(recipe.engine, lambda: recipe.compile(lambda *progress: None))
    except GraphError:  # said below, where the engine is missed
        return False
    return True


def without_turbo(precision: Precision, machine: Machine) -> set[str]:
    """The network of turbo where there is no such tier: nothing else computes it."""
    has_turbo = precision in SPARSE.precisions and missing(SPARSE, machine.capability) is None
    return set() if has_turbo else {SPARSE.network}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_candidate_is_within_its_tolerance(
    gpu: Any, calls: Calls, tiny_home: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    plan = Plan(PLAN.width, PLAN.height, PLAN.frames, precision)
    build_graphs(TINY, plan, lambda name, seconds: None)
    fp32 = OnnxRuntimeExecutor(require_graphs(TINY, PLAN), BoundWeights({}))
    machine = machine_of(gpu, choose_flavour(None, gpu.capability))
    recipes = recipes_here(TINY, plan, machine)
    needed = [recipe for engine, recipe in recipes.items() if has_engine(engine.recipe)]
    built = [recipe for recipe in needed if is_built(recipe)]
    finish_engines(gpu, built, lambda event: None)
    rows: list[tuple[float, float, Candidate]] = []
    for name, network in networks(TINY, plan).items():
        values = at_types(network, calls[name])
        feeds = {
            t.name: values[t.name] if t.dtype == "int64" else dequantised(t.name, values)
            for t in networks(TINY, PLAN)[name].inputs + networks(TINY, PLAN)[name].weights
        }
        names = [t.name for t in network.outputs]
        wanted = dict(zip(names, fp32._session(name).run(names, feeds), strict=True))
        for candidate in candidates(name, precision, machine):
            if missing(candidate, machine.capability) is not None:
                continue
            try:
                segments = open_segments({name: candidate}, TINY, plan, gpu, recipes, lambda event: None)
            except GraphError as error:
                print(f"{precision:5} {name:22} {candidate.name:15} cannot be built: {error.message}")
                continue
            made = run_segment(gpu, segments[name], network, values)
            error_ = relative_error(made, wanted, values)
            rows.append((error_, tolerance(name, precision, candidate.tier), candidate))
    rows.sort(key=lambda row: -row[0])
    for error_, allowed, candidate in rows:
        verdict = "" if error_ <= allowed else "  TOO MUCH"
        print(
            f"{precision:5} {candidate.network:22} {candidate.name:15} {error_:.2e} of {allowed:.0e}{verdict}"
        )
    # A candidate that is too wrong is what autotune finds and leaves out; each network needs one that is not.
    good = {candidate.network for error_, allowed, candidate in rows if error_ <= allowed}
    assert good == set(networks(TINY, plan)) - without_turbo(precision, machine)
