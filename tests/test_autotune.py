"""Measuring candidates without a GPU: a machine whose memory is numpy's, segments that compute with numpy,
and a clock that says what it is told.

The oracle is written here once more, in float64 and, to see what the formats cost, with their roundings; the
reference that candidates are compared with is compared with it.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from eager_vae import EagerExecutor

from trt_wan.build import autotune as module
from trt_wan.build import compile as compile_module
from trt_wan.build.autotune import autotune, event_clock
from trt_wan.build.compile import compile_engines
from trt_wan.build.realistic import dequantised, outlier_channels, realistic
from trt_wan.build.reference import SMALL_PICTURE, reference, relative_error, sample_of
from trt_wan.engines.choice import recipes as recipes_module
from trt_wan.engines.choice.candidates import VAE, Candidate, Engine, Machine
from trt_wan.engines.choice.choose import choose, place_of
from trt_wan.engines.choice.recipes import engines_of
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.fp8 import quantise_rows
from trt_wan.engines.gpu import GpuKind
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engine_id import Recipe, wan_engine
from trt_wan.engines.store.engines import ensure
from trt_wan.engines.store.measurements import Figure, read_figures
from trt_wan.errors import GpuFault, GraphError, MemoryShort, UsageError
from trt_wan.runtime.events import CandidateReady, CandidateStep, EngineReady, silent

Host = np.ndarray[Any, Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
PLAN = Plan(64, 64, 13, "fp8")  # 80 tokens, of which 64 are sampled
C = TINY.transformer
RTX = Flavour("tensorrt_rtx", "1.6.1.120", SimpleNamespace(), "a test")
H200 = Machine(GpuKind("NVIDIA H200", 13), (9, 0), RTX)
BLOCK = ("attn_in", "attention", "attn_out", "cross_attention", "ffn", "fuser")
TOKENS = sample_of("ffn", PLAN, 5)


# --- the oracle ------------------------------------------------------------------------------------------


def e4m3(x: Host, largest: Host | float) -> Host:
    """Rounded to E4M3 with a scale that takes `largest` to 448."""
    return (x * (448 / largest)).astype(E4M3).astype(np.float64) * largest / 448


def e4m3_rows(x: Host) -> Host:
    x = x.astype(np.float64)
    return e4m3(x, np.abs(x).max(-1, keepdims=True)).astype(np.float32)


def bf16(x: Host) -> Host:
    return x.astype(BF16).astype(np.float64)


@dataclass
class Oracle:
    """A block in float64; `fp8` rounds the inputs of linear layers per token, as the FP8 graphs do."""

    values: dict[str, Host]
    fp8: bool = False

    def __getitem__(self, name: str) -> Host:
        return dequantised(name, self.values).astype(np.float64)

    def linear(self, x: Host, name: str) -> Host:
        if self.fp8:
            x = e4m3(x, np.abs(x).max(-1, keepdims=True))
        return np.asarray(x @ self[f"{name}.weight"].T + self[f"{name}.bias"])

    def norm(self, x: Host) -> Host:
        centred = x - x.mean(-1, keepdims=True)
        return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + C.eps))

    def rms(self, x: Host, name: str) -> Host:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + C.eps) * self[f"{name}.weight"])

    def heads(self, x: Host) -> Host:
        return x.reshape(len(x), C.heads, C.head_dim).swapaxes(0, 1)

    def rotated(self, x: Host) -> Host:
        cos, sin, out = self["rope_cos"], self["rope_sin"], np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def rows(self) -> Host:
        return self["modulation"][0] + self["time_modulation"]

    def attn_in(self) -> dict[str, Host]:
        shift, scale = self.rows()[:2]
        h = self.norm(self["x"]) * (1 + scale) + shift
        q = self.rms(self.linear(h, "self_attn.q"), "self_attn.norm_q") * C.head_dim**-0.5
        k = self.rms(self.linear(h, "self_attn.k"), "self_attn.norm_k")
        v = self.linear(h, "self_attn.v")
        return {"q": self.rotated(self.heads(q)), "k": self.rotated(self.heads(k)), "v": self.heads(v)}

    def attn_out(self) -> dict[str, Host]:
        x = self["x"] + self.rows()[2] * self.linear(self["attended"], "self_attn.o")
        h = self.norm(x) * self["norm3.weight"] + self["norm3.bias"]
        q = self.rms(self.linear(h, "cross_attn.q"), "cross_attn.norm_q") * C.head_dim**-0.5
        return {"x_out": x, "cross_q": q}

    def cross_attention(self) -> dict[str, Host]:
        q = self.heads(self["cross_q"])
        text, image = (attended(q, self[f"{name}_k"], self[f"{name}_v"]) for name in ("text", "image"))
        return {"cross_attended": text + image}

    def ffn(self) -> dict[str, Host]:
        shift, scale, gate = self.rows()[3:]
        x = self["x"] + self.linear(self["cross_attended"], "cross_attn.o")
        h = self.linear(self.norm(x) * (1 + scale) + shift, "ffn.0")
        gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return {"x_out": x + gate * self.linear(gelu, "ffn.2")}

    def fuser(self) -> dict[str, Host]:
        """Each slot's tokens attend to its own five keys; FP8 rounds the weights too."""
        rounded = {n: e4m3_rows(self.values[n]) for n in ("linear1_q.weight", "linear2.weight") if self.fp8}
        self.values = self.values | rounded
        q = self.linear(self.norm(self["x"]), "linear1_q").reshape(
            len(self["face_k"]), -1, C.heads, C.head_dim
        )
        q = (self.rms(q, "q_norm") * C.head_dim**-0.5).swapaxes(1, 2)
        logits = q @ self["face_k"].swapaxes(2, 3)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        face = (weights / weights.sum(-1, keepdims=True)) @ self["face_v"]
        face = face.swapaxes(1, 2).reshape(self["x"].shape)
        return {"x_out": self["x"] + self.linear(face, "linear2") * self["face_strength"]}

    def sparse_attention(self) -> dict[str, Host]:
        return self.attention()  # PLAN's tokens are one block, which is kept

    def attention(self) -> dict[str, Host]:
        q, k, v = self["q"], self["k"], self["v"]
        if self.fp8:  # TensorRT's, with constant scales and without k's mean
            q, k, v = e4m3(q, 30 * C.head_dim**-0.5), e4m3(k - k.mean(1, keepdims=True), 30), e4m3(v, 30)
        return {"attended": attended(q, k, v, e4m3_probabilities=self.fp8)}


def attended(q: Host, k: Host, v: Host, e4m3_probabilities: bool = False) -> Host:
    """[tokens, heads·head_dim]"""
    logits = q @ k.swapaxes(1, 2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    if e4m3_probabilities:
        weights = e4m3(weights, 1.0)
    return (weights @ v / total).swapaxes(0, 1).reshape(q.shape[1], -1)


def floats(values: dict[str, Host], tensors: tuple[Tensor, ...]) -> dict[str, Host]:
    return {t.name: values[t.name].astype(np.float32) for t in tensors}


def contract(name: str, precision: Any = "fp8") -> Network:
    return networks(TINY, replace(PLAN, precision=precision))[name]


def computed(
    network: Network, values: dict[str, Host], fp8: bool = False, plan: Plan = PLAN
) -> dict[str, Host]:
    """By the oracle, in the contract's types."""
    if network.part == "vae":
        plan = replace(plan, precision="fp32")
        exact = networks(TINY, plan)[network.name]
        eager = EagerExecutor(TINY, plan, {"vae": floats(values, exact.weights)})
        results = eager.run(exact, 0, floats(values, exact.inputs))
        outputs = dict(zip((t.name for t in exact.outputs), results, strict=True))
    else:
        outputs = getattr(Oracle(values, fp8), network.name)()
    return {t.name: outputs[t.name].astype(np.dtype(t.dtype)) for t in network.outputs}


# --- inputs and reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCK)
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_the_reference_is_the_network(name: str, precision: Any) -> None:
    """All inputs and weights random; float32 against float64, of the sampled tokens in their order."""
    values = realistic(contract(name, precision), seed=1)
    tokens = sample_of(name, PLAN, 5)
    made = reference(name, TINY, values, tokens)
    wanted = getattr(Oracle(values), name)()
    assert list(made) == list(wanted)
    for output, want in wanted.items():
        want = want[:, tokens] if want.ndim == 3 else want[tokens]
        assert made[output].shape == want.shape
        assert np.linalg.norm(made[output] - want) < 2e-6 * np.linalg.norm(want), output


def test_inputs_are_what_contracts_say_and_awkward() -> None:
    for name in BLOCK:
        network = contract(name)
        values, again = realistic(network, 0), realistic(network, 0)
        tensors = network.inputs + network.weights
        assert {n: (v.shape, v.dtype.name) for n, v in values.items()} == {
            t.name: (t.shape, t.dtype) for t in tensors
        }
        assert all((values[n].view(np.uint8) == again[n].view(np.uint8)).all() for n in values)
        assert all(v.size == 1 or np.unique(v.astype(np.float32)).size > 1 for v in values.values())
    x = realistic(contract("attn_in"), 0)["x"].std(0)
    large = outlier_channels(C.dim, 4)
    assert (x[large] > 15).all() and (np.delete(x, large) < 2).all() and (x[large] < 65).all()
    heads = realistic(contract("attention"), 0)
    k = heads["k"].astype(np.float32).mean(1)
    assert (np.abs(k[:, outlier_channels(C.head_dim, 4)]) > 5).all() and np.median(np.abs(k)) < 0.3
    limit = 30.0  # beyond it TensorRT's FP8 attention saturates
    assert np.abs(heads["v"].astype(np.float32)).max() < limit * 1.5
    assert np.abs(heads["q"].astype(np.float32)).max() < limit * C.head_dim**-0.5
    cos, sin = (realistic(contract("attn_in"), 0)[name] for name in ("rope_cos", "rope_sin"))
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)


def test_weights_are_quantised_per_output_channel() -> None:
    weight = np.random.default_rng(2).standard_normal((6, 4000), np.float32) * [
        [1],
        [2],
        [4],
        [0.1],
        [9],
        [0],
    ]
    values, scale = quantise_rows(weight.astype(np.float32))
    assert (values.dtype, scale.dtype) == (E4M3, np.float32)
    assert (np.abs(values.astype(np.float32)).max(1)[:5] == 448).all() and not values[5].any()
    back = dequantised("w.weight", {"w.weight": values, "w.scale": scale})
    error = np.linalg.norm(back - weight, axis=1)[:5] / np.linalg.norm(weight, axis=1)[:5]
    assert ((error > 2e-2) & (error < 3e-2)).all()


@pytest.mark.parametrize("name", ["attn_in", "attention", "attn_out", "ffn", "fuser"])
def test_the_tolerance_is_what_the_format_costs_and_a_little_more(name: str) -> None:
    """FP8 rounding alone is inside the tolerance and above a third of it; bf16 attention is far inside."""
    values = realistic(contract(name), seed=3)
    tokens = sample_of(name, PLAN, 5)
    wanted = reference(name, TINY, values, tokens)
    tier: Any = "fast" if name in ("attention", "fuser") else "exact"
    error = relative_error(computed(contract(name), values, fp8=True), wanted, values, tokens)
    print(name, error)
    largest = tolerance(name, "fp8", tier)
    assert largest / 3 < error < largest / 1.2
    exact = relative_error(computed(contract(name), values), wanted, values, tokens)
    assert exact < 3e-3 < tolerance("attention", "fp8", "exact") / 3


def test_errors_that_must_be_seen() -> None:
    """One of three outputs wrong, a term lost under the residual's outliers, NaN outside the sample."""
    values = realistic(contract("attn_in"), 0)
    wanted = reference("attn_in", TINY, values, TOKENS)
    good = computed(contract("attn_in"), values)
    assert relative_error(good, wanted, values, TOKENS) < 3e-3
    assert relative_error(good | {"k": good["q"]}, wanted, values, TOKENS) > 0.5
    off = int(np.setdiff1d(np.arange(PLAN.tokens), TOKENS)[0])
    good["v"][1, off, 7] = np.nan
    assert relative_error(good, wanted, values, TOKENS) == float("inf")

    values = realistic(contract("ffn"), 0)
    wanted = reference("ffn", TINY, values, TOKENS)
    zeros = {name: np.zeros_like(values[name]) for name in ("cross_attn.o.weight", "cross_attn.o.bias")}
    lacking = computed(contract("ffn"), values | zeros)
    whole = np.linalg.norm(lacking["x_out"][TOKENS] - wanted["x_out"]) / np.linalg.norm(wanted["x_out"])
    error = relative_error(lacking, wanted, values, TOKENS)
    print(error, whole)
    assert error > 2 * tolerance("ffn", "fp8", "exact") and error > 4 * whole


# --- a machine of numpy ----------------------------------------------------------------------------------


@dataclass
class View:
    address: int
    shape: tuple[int, ...]
    dtype: Any


@dataclass
class FakeGpu:
    """Buffers by address; what is not taken or too small is an error."""

    stream: Any = None
    memory: dict[int, Host] = field(default_factory=dict)
    next: int = 1024
    broken: bool = False  # by an illegal access: every call fails from then on

    def sync(self) -> None:
        if self.broken:
            raise GpuFault("The GPU reported CUDA_ERROR_ILLEGAL_ADDRESS.")

    def allocate(self, size: int) -> Any:
        self.sync()
        address, self.next = self.next, self.next + -(-size // 256) * 256
        self.memory[address] = np.zeros(size, np.uint8)
        return SimpleNamespace(handle=address, close=lambda stream: self.memory.pop(address))

    def view(self, address: int, shape: Any, dtype: Any) -> View:
        return View(address, tuple(shape), np.dtype(dtype))

    def array(self, view: View) -> Host:
        size = int(np.prod(view.shape)) * view.dtype.itemsize
        return self.memory[view.address][:size].view(view.dtype).reshape(view.shape)

    def write(self, view: View, host: Host) -> None:
        self.array(view)[...] = host.astype(view.dtype, copy=False)

    def download(self, view: View) -> Host:
        return self.array(view).copy()

    def fill_random(self, view: View, seed: int, mean: float, deviation: float) -> None:
        self.write(view, np.random.default_rng(seed).normal(mean, deviation, view.shape))


@dataclass
class Fake:
    """A candidate as the test wants it: how fast, how wrong, or how it fails."""

    ms: float = 10.0
    noise: float = 0.0  # relative
    fails: Exception | None = None
    leaves: int = 0  # tokens at the end that it does not write
    breaks: bool = False  # the GPU's context


@dataclass
class Lab:
    """Opens fakes by candidate, counts, and looks after the memory."""

    fakes: Mapping[str, Fake]
    gpu: FakeGpu = field(default_factory=FakeGpu)
    opened: list[tuple[str, str]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    current: Fake = field(default_factory=Fake)
    settled: int = 0
    plans: set[Plan] = field(default_factory=set)

    def open(self, candidate: Candidate, plan: Plan) -> Any:
        network = networks(TINY, plan)[candidate.network]
        held = len(network.inputs + network.weights)
        if plan == PLAN:
            assert len(self.gpu.memory) == held, "the candidate before left something"
        self.plans.add(plan)
        self.opened.append((candidate.network, candidate.name))
        self.current = fake = self.fakes[candidate.name]
        if fake.fails is not None:
            raise fake.fails
        return FakeSegment(self, network, plan, fake)

    def clock(self, stream: Any, work: Callable[[], None]) -> float:
        work()
        return self.current.ms


@dataclass
class FakeSegment:
    lab: Lab
    network: Network
    plan: Plan
    fake: Fake
    scratch: int = 0
    scratch_bytes: int = 1000

    def start(self, scratch: int) -> None:
        assert len(self.lab.gpu.memory[scratch]) >= self.scratch_bytes
        self.scratch = scratch

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        assert self.scratch
        self.lab.gpu.broken |= self.fake.breaks
        self.lab.gpu.sync()
        inputs, gpu = self.network.inputs + self.network.weights, self.lab.gpu
        assert set(addresses) == {t.name for t in inputs + self.network.outputs}
        values = {t.name: gpu.array(gpu.view(addresses[t.name], t.shape, t.dtype)) for t in inputs}
        rng = np.random.default_rng(9)
        for name, output in computed(self.network, values, plan=self.plan).items():
            before = values["x"] if name == "x_out" else 0
            added = output.astype(np.float32) - before
            wrong = rng.standard_normal(added.shape) * np.sqrt((added**2).mean()) * self.fake.noise
            end = (
                len(output) - self.fake.leaves
                if name in ("x_out", "attended", "cross_attended")
                else len(output)
            )
            target = gpu.view(addresses[name], output.shape, output.dtype)
            gpu.array(target)[:end] = (before + added + wrong).astype(output.dtype)[:end]

    def settle(self) -> None:
        self.lab.settled += 1


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Engine, Recipe]:
    """All engines of the H200 but the bf16 attention for itself are in the store."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))

    def recipe(engine: Engine) -> Recipe:
        gpu = H200.gpu if engine.target == "current" else None
        identity = wan_engine(engine.recipe, "tiny", PLAN, engine.recipe, engine.target, RTX, gpu)
        return Recipe(identity, lambda progress: b"")

    made = {engine: recipe(engine) for engine in engines_of(TINY, PLAN, H200)}
    for engine in (Engine("attention", "sm89"), Engine("attention_fp8"), Engine("attn_in")):
        ensure(made[engine].engine, lambda: b"a plan")
    monkeypatch.setattr(module, "recipes_here", lambda *arguments: made)
    return made


GONE = {
    "tensorrt": "It asks for 68 GB.",
    "flash4": "flash4 is not installed.",
    "native": "No cuBLAS.",
    "native int8": "Not in this test.",
    "native fp8": "Not in this test.",
    "tensorrt sm89": "Not in this test.",
    "native sparse": "Not in this test.",
}


def tuned(lab: Lab, absent: Mapping[str, str], again: bool = False) -> dict[str, Figure]:
    """Of attention: nothing else has two candidates where TensorRT's own is absent."""

    def missing(candidate: Candidate) -> str | None:
        if candidate.name == "tensorrt sm89" and candidate.network == "attention":
            return None
        return absent.get(candidate.name)

    found = autotune(
        TINY, PLAN, H200, lab.gpu, missing, lab.events.append, again=again, clock=lab.clock, opened=lab.open
    )
    assert not lab.gpu.memory
    return {figure.candidate: figure for figure in found}


def stored(recipes: dict[Engine, Recipe]) -> dict[str, Figure]:
    """Attention's."""
    return read_figures(place_of(recipes[Engine("attention")].engine.source, H200))


def present(candidate: Candidate) -> None:
    """Every candidate can be used."""


FAKES = {
    "tensorrt sm89": Fake(77.6),
    "cudnn": Fake(38.5, noise=5e-3),
    "flash4": Fake(30.0),
    "tensorrt fp8": Fake(26.4, noise=6e-2),
    "cudnn fp8": Fake(20.0, noise=0.2),
    "native": Fake(5.0, noise=6e-3),
    "native int8": Fake(4.5, noise=3e-2),
    "native fp8": Fake(4.0, noise=5e-2),
    "tensorrt": Fake(9.0),
    "native sparse": Fake(14.0, noise=5e-2),
}


def test_figures_of_one_place(recipes: dict[Engine, Recipe]) -> None:
    """Missing, failed, too wrong, chosen: all are there, also read back from the file."""
    lab = Lab(FAKES | {"cudnn fp8": Fake(fails=MemoryShort("68 GB could not be taken.", "Close programs."))})
    found = tuned(lab, GONE)
    assert set(found) == set(FAKES) - {"native sparse"}
    states = {name: (figure.state, figure.ms, figure.chosen) for name, figure in found.items()}
    assert states == {
        "tensorrt": ("missing", None, ""),
        "flash4": ("missing", None, ""),
        **dict.fromkeys(("native", "native int8", "native fp8"), ("missing", None, "")),
        "tensorrt sm89": ("measured", 77.6, ""),
        "cudnn": ("measured", 38.5, "exact"),
        "tensorrt fp8": ("measured", 26.4, "fast"),
        "cudnn fp8": ("failed", None, ""),
    }
    assert found["tensorrt"].problem == "It asks for 68 GB."
    assert found["cudnn fp8"].problem == "68 GB could not be taken."
    assert found["cudnn"].error == pytest.approx(5e-3, rel=0.2)
    assert (found["cudnn"].tolerance, found["cudnn fp8"].tolerance) == (1e-2, 8e-2)
    assert {(f.gpu, f.version) for f in found.values()} == {("NVIDIA H200", "tensorrt_rtx 1.6.1.120")}
    assert stored(recipes) == found
    assert lab.settled == len([figure for figure in found.values() if figure.state == "measured"])
    names = [name for _, name in lab.opened]
    assert [(e.candidate, e.number, e.candidates) for e in lab.events if isinstance(e, CandidateStep)] == [
        (name, number, 4) for number, name in enumerate(names, 1)
    ]
    assert [e.candidate for e in lab.events if isinstance(e, CandidateReady)] == names


@pytest.mark.long
def test_all_places(recipes: dict[Engine, Recipe]) -> None:
    lab = Lab(FAKES)
    found = autotune(
        TINY, PLAN, H200, lab.gpu, lambda row: None, lab.events.append, clock=lab.clock, opened=lab.open
    )
    best = {(f.network, f.candidate): f.chosen for f in found if f.chosen}
    assert best == {
        ("attn_in", "native"): "exact, fast",
        ("attention", "native"): "exact",
        ("attention", "native fp8"): "fast",
        ("sparse_attention", "native sparse"): "turbo",
        ("attn_out", "native"): "exact, fast",
        ("cross_attention", "native"): "exact, fast",
        ("ffn", "native"): "exact, fast",
        **{(network, "native"): "exact, fast" for network in VAE},
        ("fuser", "native"): "exact",
        ("fuser", "native fp8"): "fast",
    }
    assert lab.plans == {PLAN, replace(SMALL_PICTURE, precision="fp8")}
    errors = {(f.network, f.candidate): f.error for f in found}
    assert errors["sparse_attention", "native sparse"] == pytest.approx(5e-2, rel=0.2)
    assert errors["attention", "native int8"] == pytest.approx(3e-2, rel=0.2)
    for network in ("attn_in", "attention", "attn_out", "cross_attention", "ffn", "fuser"):
        assert errors[network, "native"] == pytest.approx(6e-3, rel=0.3)
        assert (errors[network, "tensorrt"] or 0) < 3e-3
    for network in VAE:
        assert errors[network, "cudnn"] == pytest.approx(5e-3, rel=0.3)
        assert errors[network, "native"] == pytest.approx(6e-3, rel=0.3)
        assert (errors[network, "tensorrt"] or 0) < 3e-3


@pytest.mark.parametrize(
    ("noise", "best"), [(1.2e-2, "native int8"), pytest.param(3e-2, "tensorrt", marks=pytest.mark.long)]
)
def test_int8_on_a_gpu_without_fp8(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch, noise: float, best: str
) -> None:
    machine, plan = Machine(GpuKind("NVIDIA A100", 13), (8, 0), RTX), replace(PLAN, precision="int8")
    lab = Lab(FAKES | {"native int8": Fake(4.5, noise=noise)})
    found = autotune(
        TINY,
        plan,
        machine,
        cast(Any, lab.gpu),
        lambda row: None if row.network == "attn_out" else "Not in this test.",
        lab.events.append,
        clock=lab.clock,
        opened=lab.open,
    )
    figures = {figure.candidate: figure for figure in found if figure.network == "attn_out"}
    assert set(figures) == {"tensorrt", "native int8"}
    assert figures["native int8"].error == pytest.approx(noise, rel=0.2)
    assert {name for name, figure in figures.items() if figure.chosen} == {best}


def test_what_is_not_written_is_infinitely_wrong(recipes: dict[Engine, Recipe]) -> None:
    """One token, and the fastest of all."""
    lab = Lab(FAKES | {"cudnn": Fake(0.1, leaves=1)})
    found = tuned(lab, GONE)
    assert (found["cudnn"].state, found["cudnn"].ms, found["cudnn"].chosen) == ("broken", None, "")
    assert "not finite" in found["cudnn"].problem and found["tensorrt sm89"].chosen == "exact"


def test_figures_that_are_there_are_kept(recipes: dict[Engine, Recipe]) -> None:
    """Until they are asked for again, or a candidate has come that was missing."""
    first = tuned(Lab(FAKES), GONE)
    lab = Lab(FAKES)
    assert tuned(lab, GONE) == first and not lab.opened and not lab.events
    faster = Lab(FAKES | {"tensorrt sm89": Fake(11.0)})
    assert tuned(faster, GONE, again=True)["tensorrt sm89"].chosen == "exact, fast"
    lab = Lab(FAKES)
    found = tuned(lab, {name: why for name, why in GONE.items() if name != "flash4"})
    assert found["flash4"].chosen == "" and found["flash4"].ms == 30.0  # it has to be asked for
    assert stored(recipes)["flash4"].ms == 30.0
    assert lab.opened == [("attention", "flash4")]  # the others have their figures


def test_a_place_with_one_candidate_is_not_measured(recipes: dict[Engine, Recipe]) -> None:
    lab = Lab(FAKES)
    everything = dict.fromkeys([*FAKES, "x"], "no")
    assert tuned(lab, everything) == {} and not lab.opened


def test_stopping_frees_the_memory(recipes: dict[Engine, Recipe]) -> None:
    lab = Lab(FAKES)

    def stop(stream: Any, work: Callable[[], None]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autotune(TINY, PLAN, H200, lab.gpu, present, silent, clock=stop, opened=lab.open)
    assert not lab.gpu.memory


def test_a_build_that_was_stopped_while_measuring_goes_on(recipes: dict[Engine, Recipe]) -> None:
    """Until it is finished a run takes the default, not the only candidate that has a figure."""

    def choice() -> Any:
        attention = stored(recipes)
        return choose("attention", "fp8", "fast", H200, attention, lambda row: absent.get(row.name))

    class Stopping(Lab):
        def open(self, candidate: Candidate, plan: Plan) -> Any:
            if candidate.name == "tensorrt fp8":
                raise KeyboardInterrupt
            return super().open(candidate, plan)

    absent = {name: why for name, why in GONE.items() if name not in ("tensorrt sm89",)}
    with pytest.raises(KeyboardInterrupt):
        tuned(Stopping(FAKES), GONE)
    assert {n for n, f in stored(recipes).items() if f.state == "measured"} == {"tensorrt sm89", "cudnn"}
    assert choice().candidate.name == "tensorrt fp8" and "measuring was not finished" in choice().reason
    lab = Lab(FAKES)
    assert tuned(lab, GONE)["cudnn"].chosen == "exact"
    assert [name for _, name in lab.opened] == ["tensorrt fp8", "cudnn fp8"]
    assert choice().text.startswith("attention = tensorrt fp8 (26.4 ms; cudnn 38.5 ms")


def test_a_broken_context_fails_one_candidate_and_no_other(recipes: dict[Engine, Recipe]) -> None:
    """Measuring stops there; the next process goes on behind it."""
    fakes = FAKES | {"cudnn": Fake(breaks=True)}
    with pytest.raises(
        GpuFault, match="attention = cudnn broke the GPU's context .*2 of its rivals"
    ) as caught:
        tuned(Lab(fakes), GONE)
    assert "Run the same command again" in caught.value.hint
    states = {name: figure.state for name, figure in stored(recipes).items() if figure.state != "missing"}
    assert states == {"tensorrt sm89": "measured", "cudnn": "failed"}
    lab = Lab(fakes)
    found = tuned(lab, GONE)
    assert [name for _, name in lab.opened] == ["tensorrt fp8", "cudnn fp8"]
    assert found["cudnn"].problem == "The GPU reported CUDA_ERROR_ILLEGAL_ADDRESS."
    assert found["tensorrt fp8"].chosen == "fast"


def test_without_torch_it_says_how_to_go_on(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trt_wan.build.export", None)
    lab = Lab(FAKES)
    with pytest.raises(UsageError, match="Measuring needs packages") as caught:
        autotune(TINY, PLAN, H200, lab.gpu, present, silent, clock=lab.clock, opened=lab.open)
    assert "--no-measure" in caught.value.hint


def test_the_clock_takes_the_median_after_warming_up() -> None:
    """The third call is the first that counts; every one takes longer than the last."""
    time, calls = [0.0], [0]

    @dataclass
    class Event:
        at: float

        def __sub__(self, other: "Event") -> float:
            return self.at - other.at

    def record(options: Any) -> Event:
        assert options.timing_enabled
        return Event(time[0])

    def work() -> None:
        calls[0] += 1
        time[0] += calls[0]

    assert event_clock(SimpleNamespace(record=record, sync=lambda: None), work) == 7.5  # of 3 to 12
    assert calls == [12]


# --- engines that cannot be built ------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[Engine]:
    """Graphs that are files, engines that are bytes; those in the set it gives cannot be built."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    impossible: set[Engine] = set()
    for name in networks(TINY, PLAN):
        (tmp_path / f"{name}.onnx").write_text(name)
    monkeypatch.setattr(compile_module, "export_graphs", lambda *arguments: 0)

    def compiled(recipe: str, target: Any) -> bytes:
        if Engine(recipe, target) in impossible:
            raise GraphError(f"{recipe} asks for 68 GB.", "Report it.")
        return f"{recipe} {target}".encode()

    def onnx(flavour: Any, graph: bytes, target: Any, progress: Any) -> bytes:
        return compiled(graph.decode(), target)

    def attention(flavour: Any, heads: Any, tokens: Any, dim: Any, fp8: Any, target: Any, step: Any) -> bytes:
        return compiled("attention_fp8", target)

    monkeypatch.setattr(recipes_module, "require_graphs", lambda *arguments: tmp_path)
    monkeypatch.setattr(recipes_module, "compile_onnx", onnx)
    monkeypatch.setattr(recipes_module, "compile_attention", attention)
    monkeypatch.setattr("trt_wan.engines.store.graphs.GraphSet.complete", lambda graphs: True)
    return impossible


def test_a_build_goes_on_without_what_cannot_be_built(bare: set[Engine]) -> None:
    bare.add(Engine("attention"))
    events: list[Any] = []
    report = compile_engines(TINY, PLAN, "current", RTX, events.append, machine=H200)
    states = {(row.name, row.target): row.state for row in report.engines}
    assert states.pop(("attention", "current")) == "impossible"
    assert set(states.values()) == {"built"} and ("attention", "sm89") in states and len(states) == 24
    row = next(row for row in report.engines if row.state == "impossible")
    assert row.problem == "attention asks for 68 GB." and row.manifest is None and row.bytes == 0
    assert [(e.name, e.state) for e in events if isinstance(e, EngineReady)] == [
        (row.name, row.state) for row in report.engines
    ]
    assert {event.engines for event in events if isinstance(event, EngineReady)} == {25}


def test_a_build_goes_on_without_a_network_that_few_jobs_run(bare: set[Engine]) -> None:
    bare.add(Engine("cross_attention_nag"))
    report = compile_engines(TINY, PLAN, "current", RTX, lambda event: None, machine=H200)
    assert [row.name for row in report.engines if row.state != "built"] == ["cross_attention_nag"]


def test_a_place_that_nobody_can_take_ends_the_build(bare: set[Engine]) -> None:
    """The 8-bit attention that is left is no exact one; a library that is here is."""
    bare |= {Engine("attention"), Engine("attention", "sm89")}

    def build(missing: Callable[[Candidate], str | None]) -> None:
        compile_engines(TINY, PLAN, "current", RTX, lambda event: None, machine=H200, missing=missing)

    def no_library(row: Candidate) -> str | None:
        return None if row.maker == "engine" else "not installed"

    with pytest.raises(GraphError, match="attention asks for 68 GB"):
        build(no_library)
    build(lambda row: None if row.name == "cudnn" else no_library(row))


def test_an_engine_without_rivals_ends_the_build(bare: set[Engine]) -> None:
    bare.add(Engine("head"))
    with pytest.raises(GraphError, match="head asks for 68 GB"):
        compile_engines(TINY, PLAN, "current", RTX, lambda event: None, machine=H200)
    bare.clear()
    bare.add(Engine("attention", "sm120"))
    with pytest.raises(GraphError, match="attention asks for 68 GB"):  # for a named target all are wanted
        compile_engines(TINY, PLAN, "sm120", RTX, lambda event: None)
