"""Graphs are exported once per test session, by the same code as `trt-wan build`: one by one on first use
(`make_model`), or all of a tiny job's by the command itself (`tiny_home`).
"""

import gc
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner
from filelock import FileLock
from on_gpu import with_kernels
from tiny_job import BUILD, BUILD_ENGINES, BUILD_FP8, PLAN, as_argv

from trt_wan.build.export import export
from trt_wan.cli.main import cli
from trt_wan.engines.config import TINY, ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.graphs import graph_set
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor
from trt_wan.runtime.networks.model import Model

MakeModel = Callable[..., Model]
Weights = Mapping[Part, Mapping[str, Array]]


# The files that take longest. They come first, so that no process is left alone with one at the end.
SLOW = {
    *("test_compile.py", "test_export.py", "test_readme.py", "test_sam2_compile.py", "test_sam2.py"),
    *("test_bench_preprocess.py", "test_cli.py", "test_cli_engines.py", "test_bench.py", "test_pipeline.py"),
    *("test_serve.py", "test_page.py", "test_open_model.py", "test_kills.py", "test_odd_values.py"),
    *("test_comfyui.py", "test_live_run.py", "test_parallel.py", "test_gpus.py"),
}


def pytest_configure() -> None:
    """Signals that are ignored where the tests run in the background act on the commands that they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look through it again, a sixth of an export."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests build and compile is not left in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRT_WAN_HOME" not in os.environ:
            patch.setenv("TRT_WAN_HOME", str(with_kernels(tmp_path_factory.mktemp("home"))))
        patch.delenv("TRT_WAN_WEIGHTS", raising=False)
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))  # no weights that were pulled
        yield


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    """OMP_NUM_THREADS for ONNX Runtime too, which does not read it: its threads spin while they wait, on the
    core of the other test process.
    """

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: Any, sess_options: Any = None, **options: Any) -> None:
            sess_options = sess_options or onnxruntime.SessionOptions()
            sess_options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
            super().__init__(path, sess_options, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Session)
        yield


class ExportingExecutor(OnnxRuntimeExecutor):
    """Exports a graph the first time it is run: a test pays for the networks it uses and no others."""

    def __init__(
        self, graphs: Path, weights: Weights, config: ModelConfig, plan: Plan, ready: Path | None
    ) -> None:
        """`ready` is a folder with graphs of PLAN."""
        super().__init__(graphs, BoundWeights(weights))
        self.config, self.plan, self.ready = config, plan, ready

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        path = self.graphs / f"{network.name}.onnx"
        if not path.exists():
            if self.ready is not None and network == networks(TINY, PLAN).get(network.name):
                shutil.copy(self.ready / path.name, path)
            else:
                export(network, self.config, self.plan, path)
        return super().run(network, n, inputs)


@pytest.fixture(scope="session")
def make_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model(config, plan, {part: {weight name: array}}) -> Model on ONNX Runtime. Graphs of PLAN's size
    are those of `tiny_home`.
    """
    graphs: dict[tuple[ModelConfig, Plan], Path] = {}

    def make(config: ModelConfig, plan: Plan, weights: Weights) -> Model:
        if (config, plan) not in graphs:
            graphs[config, plan] = tmp_path_factory.mktemp("graphs")
        ready = None
        if config == TINY and replace(plan, frames=PLAN.frames) == PLAN:
            ready = request.getfixturevalue("tiny_home") / "graphs" / graph_set(TINY, PLAN).folder.name
        executor = ExportingExecutor(graphs[config, plan], weights, config, plan, ready)
        return Model(config, plan, executor, weights)

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def told_by(command: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """Runs `command` once in a session, with `home` as its TRT_WAN_HOME."""
    kept = home.with_name(f"{home.name}-{hashlib.sha256(command.encode()).hexdigest()[:8]}.json")
    with FileLock(f"{home}.lock"):
        if kept.exists():
            return subprocess.CompletedProcess(command, 0, *json.loads(kept.read_text()))
        environment = os.environ | {"TRT_WAN_HOME": str(home)}
        ran = subprocess.run(as_argv(command), env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        kept.write_text(json.dumps([ran.stdout, ran.stderr]))
    return ran


@pytest.fixture(scope="session")
def tiny_home(shared: Path) -> Path:
    """A TRT_WAN_HOME with the graphs of tiny_job.PLAN, made by the command that `trt-wan run` asks for."""
    told_by(BUILD, home := with_kernels(shared / "tiny-home"))
    return home


@pytest.fixture(scope="session")
def home_of_ranks(tiny_home: Path) -> Callable[[int], Path]:
    """home_of_ranks(count): `tiny_home` with the graphs of so many ranks, made by the command."""

    def home(count: int) -> Path:
        with FileLock(f"{tiny_home}.ranks"), pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRT_WAN_HOME", str(tiny_home))
            ran = CliRunner().invoke(cli, [*shlex.split(BUILD)[1:], "--gpus", str(count)])
        assert ran.exit_code == 0, ran.stderr
        return tiny_home

    return home


@pytest.fixture(scope="session")
def tiny_fp8(shared: Path) -> Path:
    """The same in FP8."""
    told_by(BUILD_FP8, home := shared / "tiny-fp8")
    return home


@dataclass(frozen=True)
class Engines:
    """A TRT_WAN_HOME with FP8 engines for sm89. Tests change a copy of it."""

    home: Path
    stdout: str
    told: str  # by the command, which exported one graph and built all engines
    exported: str  # told by the command that exported all graphs


@pytest.fixture(scope="session")
def tiny_engines(shared: Path, tiny_fp8: Path) -> Engines:
    home = shared / "tiny-engines"
    with FileLock(f"{home}.copy"):
        if not home.exists():
            shutil.copytree(tiny_fp8, home)
            next(home.glob("graphs/*/head.onnx")).unlink()
    ran = told_by(BUILD_ENGINES, home)
    return Engines(home, ran.stdout, ran.stderr, told_by(BUILD_FP8, tiny_fp8).stderr)


@pytest.fixture
def nvrtc() -> None:
    """Skips where our kernels cannot be compiled."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # a missing library raises what the loader likes
        pytest.skip(f"NVRTC is not here: {error}")
