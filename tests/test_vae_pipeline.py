"""The native VAE over several ranks equals the whole one bit for bit. Kernels run on the CPU, between
convolutions by torch; the ranks' streams are simulated.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from eager_vae import random_weights
from late_gpu import LateGpu
from native_on_cpu import VaeOnCpu, at, vae_kernels
from simulated_streams import SimulatedGpu, SimulatedPeers, World, together

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.config import ANIMATE_14B, TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.networks import vae
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.opening import gpu_ranks
from trt_wan.runtime.parallel import vae_pipeline
from trt_wan.runtime.parallel.vae_parts import balanced, common_cuts, part_bounds, part_network
from trt_wan.runtime.parallel.vae_pipeline import Measured, VaePipeline, open_pipeline
from trt_wan.runtime.segments.native.vae import Vae
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.sources import RandomSource

PLAN = Plan(32, 16, 13, "bf16")
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


def opened(
    cpu: VaeOnCpu,
    plan: Plan,
    gpu: SimulatedGpu,
    ranks: Any,
    peers: SimulatedPeers | None,
    measure: bool = False,
) -> Model:
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

        pieces = None if measure else {half: uniform(vaes, half) for half in ("encode", "decode")}
        pipeline = VaePipeline(gpu, ranks, vaes, contracts, connect, pieces)  # type: ignore[arg-type]
        executor.segments |= pipeline.segments
        model.take_pipeline(pipeline)
    return model


def deferred(gpu: SimulatedGpu, run: Any, *arguments: Any) -> None:
    gpu.stream.enqueue(partial(run, *arguments))


def uniform(vaes: dict[str, Vae], half: str) -> Measured:
    cuts = common_cuts(vaes[f"vae_{half}_next"], vaes[f"vae_{half}_first"])
    return Measured([1.0] * (len(cuts) + 1), 1e12)


def clips(plan: Plan) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    latent = (TINY.vae.latent_channels, plan.latent_frames, plan.latent_height, plan.latent_width)
    frames = 3, plan.frames, plan.height, plan.width
    one, other = (rng.standard_normal(shape).astype(np.float32) * 0.6 for shape in (latent, frames))
    return one, other


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
        pytest.param(4, PLAN, True, marks=pytest.mark.long),
        pytest.param(2, Plan(16, 32, 17, "bf16", vae_chunk=2), True, marks=pytest.mark.long),
        pytest.param(8, PLAN, True, marks=pytest.mark.long),
    ],
    indirect=["cpu"],
)
def test_ranks_equal_one_gpu(cpu: VaeOnCpu, count: int, plan: Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(vae, "SLOTS", 2)
    monkeypatch.setattr(vae_pipeline, "SLOTS", 2)
    given = clips(plan)
    alone = opened(cpu, plan, SimulatedGpu(World(0)), SimpleNamespace(rank=0, count=1), None)
    frames, *latents = program(alone, *given)
    assert all(np.isfinite(chunk).all() for chunk in (*frames, *latents)) and frames[-1].std() > 0.1

    world = World(count)
    peers = SimulatedPeers(world, count)
    ranks = [SimpleNamespace(rank=rank, count=count, watch=lambda *_: None) for rank in range(count)]
    models = [opened(cpu, plan, SimulatedGpu(world), each, peers) for each in ranks]
    made = together([partial(program, model, *given) for model in models])
    for model in models:
        assert model.vae_pipeline is not None
        model.vae_pipeline.close()
    assert [len(decoded) for decoded, *_ in made] == [len(frames)] + [0] * (count - 1)
    for decoded, want in zip(made[0][0], frames, strict=True):
        assert decoded.tobytes() == want.tobytes()
    for _, *ours in made:
        assert [latent.tobytes() for latent in ours] == [latent.tobytes() for latent in latents]


@pytest.mark.parametrize("cpu", [pytest.param(True, marks=pytest.mark.long), False], indirect=True)
def test_only_what_lives_at_a_cut_is_needed_behind_it(cpu: VaeOnCpu) -> None:
    """Moves to another scratch, full of NaN, at every cut."""
    rng, weights = np.random.default_rng(1), random_weights(TINY)
    for name in VAE:
        network = networks(TINY, PLAN)[name]
        given = {t.name: rng.standard_normal(t.shape).astype(t.dtype) for t in network.inputs}
        given |= {w.name: weights[w.name].astype(w.dtype) for w in network.weights}
        want = cpu.run(network, given)
        whole, world = cpu.open(network), World(0)
        made = {t.name: np.full(t.shape, np.nan, t.dtype) for t in network.outputs}
        addresses = {key: value.ctypes.data for key, value in (given | made).items()}
        start, scratch = 0, world.memory(whole.scratch_bytes)
        for cut in whole.cuts:
            whole.enqueue_steps(range(start, cut.step), addresses, scratch)
            start, other = cut.step, world.memory(whole.scratch_bytes)
            for place, size in ((whole.offset(part), size) for part, size in cut.live):
                at(other + place, (size,), np.uint8)[:] = at(scratch + place, (size,), np.uint8)
            scratch = other
        whole.enqueue_steps(range(start, len(whole.steps)), addresses, scratch)
        for key, array in made.items():
            assert array.tobytes() == want[key].tobytes(), (name, key)


def test_rank_0_measures_for_all(cpu: VaeOnCpu, monkeypatch: Any) -> None:
    marks, world, told = iter(range(10**6)), World(0), list[bytes]()
    monkeypatch.setattr(vae_pipeline, "_mark", lambda gpu: next(marks) ** 2)
    monkeypatch.setattr(vae_pipeline, "_elapsed", lambda start, end: end - start)

    def exchanged(rank: int) -> Any:
        left = list(told)

        def exchange(payload: bytes) -> list[bytes]:
            told.extend([] if rank else [payload])
            return [left.pop(0) if rank else payload]

        return exchange

    peers, divided = SimulatedPeers(world, 2), []
    for rank in range(2):
        ranks = SimpleNamespace(rank=rank, count=2, exchange=exchanged(rank), watch=lambda *_: None)
        model = opened(cpu, PLAN, SimulatedGpu(world), ranks, peers, measure=True)
        assert model.vae_pipeline is not None
        divided.append(model.vae_pipeline.divided)
    assert divided[0] == divided[1] and next(marks) > 0
    for half, (first, second) in ((half, row.seconds) for half, row in divided[0].items()):
        assert first == pytest.approx(second, rel=0.15), half


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The contracts and the networks of a half at 832x480. Nothing is launched."""
    cpu = VaeOnCpu(ANIMATE_14B, None, monkeypatch, own=True)  # type: ignore[arg-type]
    contracts = networks(ANIMATE_14B, Plan(832, 480, 77, "bf16"))

    def opened(half: str) -> list[tuple[Network, Vae]]:
        rows = (contracts[f"vae_{half}_{chunk}"] for chunk in ("next", "first"))
        return [(row, cpu.open(row)) for row in rows]

    return opened


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_parts_divide_a_network(full_size: Any, half: str, count: int) -> None:
    (later, vae_later), (first, vae_first) = full_size(half)
    cuts = common_cuts(vae_later, vae_first)
    _, _, chosen = balanced([1.0] * (len(cuts) + 1), [cut.nbytes for cut in cuts], 1e15, count)
    names = [cuts[i].name for i in chosen]
    parts = [
        [part_network(row, each, steps) for steps in part_bounds(each, names)]
        for row, each in ((later, vae_later), (first, vae_first))
    ]
    for kind in ("inputs", "weights", "outputs"):
        for whole, own in zip((later, first), parts, strict=True):
            divided = sorted(tensor.name for part in own for tensor in getattr(part, kind))
            assert divided == sorted(tensor.name for tensor in getattr(whole, kind)), kind
    for part, before in zip(*parts, strict=True):
        remembered = [tensor.name for tensor in part.inputs if tensor.name.endswith(".cache")]
        for made in (part, before):
            told = [tensor.name for tensor in made.outputs if tensor.name.endswith(".cache_out")]
            assert told == [f"{name}_out" for name in remembered]


@pytest.mark.parametrize(("rank", "count"), [(0, 2), (1, 2), *((rank, 4) for rank in range(4))])
def test_a_pipeline_that_is_cut_elsewhere_gets_its_own_weights(
    rank: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another size, and at the first one again, with real parts and weights."""
    cpu, world = VaeOnCpu(TINY, None, monkeypatch, own=True), World(0)  # type: ignore[arg-type]
    late: Any = LateGpu()
    weights = DeviceWeights(late, RandomSource(7))
    ranks: Any = SimpleNamespace(rank=rank, count=count, least=int)

    def connect(gpu: Any, ranks: Any, size: int, flags: int) -> Any:
        peers = SimulatedPeers(world, count)
        peers.connect(size, flags)
        return peers.of(rank)

    monkeypatch.setattr(gpu_ranks, "PeerMemory", connect)
    held = gpu_ranks.GpuRanks(SimulatedGpu(world), weights)  # type: ignore[arg-type]
    seen = set()
    for plan, growth in ((PLAN, 0.8), (Plan(16, 32, 17, "bf16"), 1.2), (PLAN, 1.0)):

        def measured(self: Any, ranks: Any, vae: Vae, network: Network, cuts: Any, by: float = growth) -> Any:
            return Measured([by**i for i in range(len(cuts) + 1)], 1e12)

        monkeypatch.setattr(VaePipeline, "_measured", measured)
        contracts = networks(TINY, plan)
        given: dict[str, Any] = {name: cpu.open(contracts[name]) for name in VAE}
        pipeline = held.pipeline(ranks, plan, given, contracts, lambda: gpu_ranks.PIPELINE_ROOM)
        assert pipeline is not None and len(pipeline.networks) == 4
        packs = [Pack.of(network, 0) for network in pipeline.networks.values()]
        weights.prefetch(packs[:2])  # the others are loaded when they are used
        for pack in packs:
            assert weights.bind(pack.network, 0).keys() == {w.name for w in pack.network.weights}
            weights.used(pack.network, 0)
        seen |= {(pack.key, tuple(pack.offsets)) for pack in packs}
        read = dict(weights._resident)
        assert held.pipeline(ranks, plan, given, contracts, lambda: 0) is pipeline
        assert weights._resident == read and weights.resident_bytes == sum(pack.size for pack in packs)
    assert len(seen) == 12, "all parts are cut at three places"
    weights.close()
    assert not late.live


def test_what_is_handed_over(full_size: Any) -> None:
    ((_, whole), _) = full_size("decode")
    sizes = {cut.name: cut.nbytes for cut in whole.cuts}
    picture = 4 * 480 * 832 * 96 * 2
    assert sizes["decoder.upsamples.12 0"] == sizes["decoder.upsamples.14 1"] == 2 * picture
    assert sizes["decoder.head 0"] == picture
    assert sizes["decoder.upsamples.11 0"] == 4 * 240 * 416 * 192 * 2
    assert (
        sizes["decoder.upsamples.4 1"] == 2 * 120 * 208 * (384 + 192) * 2
    )  # the residual has fewer channels


def test_balanced() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 4):
        seconds, nbytes = rng.random(9).tolist(), rng.integers(1, 99, 8).tolist()
        found = []
        for cuts in combinations(range(8), count - 1):
            ends = [0, *(cut + 1 for cut in cuts), 9]
            lasting = [sum(seconds[a:b]) for a, b in pairwise(ends)] + [nbytes[cut] / 80 for cut in cuts]
            found.append((max(lasting), sum(nbytes[cut] for cut in cuts), cuts))
        made = balanced(seconds, nbytes, 80, count)
        assert made[1:] == min(found)[1:] and made[0] == pytest.approx(min(found)[0])


def test_no_pipeline_without_native_networks(cpu: VaeOnCpu) -> None:
    contracts = networks(TINY, PLAN)
    vaes: dict[str, Any] = {name: cpu.open(contracts[name]) for name in VAE}
    vaes["vae_encode_first"] = SimpleNamespace()
    ranks: Any = SimpleNamespace(rank=1, count=2)
    assert open_pipeline(SimpleNamespace(), vaes, contracts, ranks, pytest.fail) is None  # type: ignore
