"""The native VAE over several ranks equals the whole one bit for bit. Kernels run on the CPU, between
convolutions by torch; the ranks' streams are simulated.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from eager_vae import random_weights
from native_on_cpu import THREADS, VaeOnCpu, at, vae_kernels
from simulated_streams import SimulatedGpu, SimulatedPeers, World, together

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.networks import vae
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.parallel import vae_pipeline
from trt_wan.runtime.parallel.vae_parts import balanced, common_cuts, part_bounds, part_network
from trt_wan.runtime.parallel.vae_pipeline import Measured, VaePipeline
from trt_wan.runtime.segments.native.vae import Cut, Vae

PLAN = Plan(32, 16, 21, "bf16")
BF16 = np.dtype(ml_dtypes.bfloat16)


class Kernels:
    """As CpuKernels; those with barriers, which are slow there, are numpy's."""

    def __init__(self, others: Any) -> None:
        self._others = others

    def launch(self, name: str, blocks: int, threads: int, barriers: bool, *arguments: Any) -> None:
        kind = name.split("_")[0] if barriers else ""
        if kind == "transpose":
            source, to, rows, columns = map(int, arguments)
            at(to, (columns, rows), np.uint16)[...] = at(source, (rows, columns), np.uint16).T
        elif kind == "softmax":
            scores, to, keys = map(int, arguments)
            x = np.exp((x := at(scores, (blocks, keys), np.float32)) - x.max(1, keepdims=True))
            at(to, (blocks, keys), BF16)[...] = x / x.sum(1, keepdims=True)
        elif kind == "finish":
            self._finish(int(name.split("_")[1]), *map(int, arguments))
        else:
            self._others.launch(name, blocks, threads, False, *arguments)

    def _finish(self, c: int, *arguments: int) -> None:
        y, bias, added, added_bias, raw, gamma, normed, pixels, silu = arguments
        x = at(y, (pixels, c), BF16).astype(np.float32) + at(bias, (c,), np.float32)
        x += at(added, (pixels, c), BF16).astype(np.float32) if added else 0
        x += at(added_bias, (c,), np.float32) if added_bias else 0
        if raw:
            at(raw, (pixels, c), BF16)[...] = x
        if gamma:
            x *= c**0.5 * at(gamma, (c,), np.float32) / np.linalg.norm(x, axis=1, keepdims=True)
            at(normed, (pixels, c), BF16)[...] = x / (1 + np.exp(-x)) if silu else x


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(vae_kernels(TINY, tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def cpu(request: Any, compiled: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[VaeOnCpu]:
    yield VaeOnCpu(TINY, compiled, monkeypatch, own=getattr(request, "param", True))  # type: ignore[arg-type]


class Weights:
    """In place of DeviceWeights: every rank has all."""

    def __init__(self, gpu: SimulatedGpu, plan: Plan) -> None:
        given = random_weights(TINY)
        types = {w.name: w.dtype for name in VAE for w in networks(TINY, plan)[name].weights}
        self._arrays = {name: gpu.upload(given[name].astype(kind)) for name, kind in types.items()}

    def bind(self, network: Network, n: int) -> dict[str, Any]:
        return {w.name: self._arrays[w.name] for w in network.weights}

    def used(self, network: Network, n: int) -> None: ...


def opened(cpu: VaeOnCpu, plan: Plan, gpu: SimulatedGpu, ranks: Any, peers: SimulatedPeers | None) -> Model:
    """The model of one rank; its kernels run when their turn comes."""
    contracts = networks(TINY, plan)
    vaes = {name: cpu.open(contracts[name]) for name in VAE}
    for each in vaes.values():
        each.steps = [replace(step, run=partial(deferred, gpu, step.run)) for step in each.steps]
    executor = GpuExecutor(gpu, vaes, Weights(gpu, plan))  # type: ignore[arg-type]
    executor.start(gpu.world.memory(executor.scratch_bytes))
    model = Model(TINY, plan, executor, {}, ranks=ranks)
    if peers is not None:

        def connect(size: int, flags: int) -> Any:
            peers.connect(size, flags)
            return peers.of(ranks.rank)

        measured = {half: uniform(vaes, half) for half in ("encode", "decode")}
        pipeline = VaePipeline(gpu, ranks, vaes, contracts, connect, measured)  # type: ignore[arg-type]
        executor.segments |= pipeline.segments
        model.take_pipeline(pipeline)
    return model


def deferred(gpu: SimulatedGpu, run: Any, *arguments: Any) -> None:
    gpu.stream.do(partial(run, *arguments))


def uniform(vaes: dict[str, Vae], half: str) -> Measured:
    cuts = common_cuts(vaes[f"vae_{half}_next"], vaes[f"vae_{half}_first"])
    return Measured([1.0] * (len(cuts) + 1), 1e12)


def clips(plan: Plan) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    latent = (TINY.vae.latent_channels, plan.latent_frames, plan.latent_height, plan.latent_width)
    frames = 3, plan.frames, plan.height, plan.width
    return tuple(rng.standard_normal(shape).astype(np.float32) * 0.6 for shape in (latent, frames))


def program(model: Model, latent: Any, frames: Any) -> tuple[Any, Any, Any]:
    """Frames, and latents of two clips with a decode before, between and behind them."""
    decoded = list(vae.decode(model, latent))
    one = vae.encode_read(model, lambda a, b: frames[:, a:b], frames.shape[1], together=True)
    other = vae.encode_read(model, lambda a, b: -frames[:, a:b], frames.shape[1], together=True)
    decoded += list(vae.decode(model, one))
    return decoded, one, other


@pytest.mark.parametrize(
    ("count", "plan", "cpu"),
    [
        (2, PLAN, True),
        (3, PLAN, False),
        (4, PLAN, True),
        pytest.param(2, Plan(16, 32, 17, "bf16", vae_chunk=2), True, marks=pytest.mark.long),
        pytest.param(8, PLAN, True, marks=pytest.mark.long),
    ],
    indirect=["cpu"],
)
def test_ranks_equal_one_gpu(cpu: VaeOnCpu, count: int, plan: Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(vae, "SLOTS", 3)
    monkeypatch.setattr(vae_pipeline, "SLOTS", 3)
    given = clips(plan)
    alone = opened(cpu, plan, SimulatedGpu(World(0)), SimpleNamespace(rank=0, count=1), None)
    frames, *latents = program(alone, *given)
    assert all(np.isfinite(chunk).all() for chunk in (*frames, *latents)) and frames[-1].std() > 0.1

    world = World(count)
    peers = SimulatedPeers(world, count)
    ranks = [SimpleNamespace(rank=rank, count=count) for rank in range(count)]
    models = [opened(cpu, plan, SimulatedGpu(world), each, peers) for each in ranks]
    made = together([partial(program, model, *given) for model in models])
    assert [len(decoded) for decoded, *_ in made] == [len(frames)] + [0] * (count - 1)
    for decoded, want in zip(made[0][0], frames, strict=True):
        assert decoded.tobytes() == want.tobytes()
    for _, *ours in made:
        assert [latent.tobytes() for latent in ours] == [latent.tobytes() for latent in latents]
