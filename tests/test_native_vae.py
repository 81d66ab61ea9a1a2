"""The VAE without TensorRT, against the graphs' own functions in float32.

Without a GPU its kernels run on the CPU, between convolutions by torch. With one, all is as in a run.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from eager_vae import EagerExecutor, random_weights
from kernels_on_cpu import CpuKernels
from native_on_cpu import VaeOnCpu, launch, vae_kernels
from on_gpu import require_gpu, run_segment

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import ANIMATE_14B, MODELS, TINY, ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.kernels import compile_source
from trt_wan.runtime.segments import cudnn_library, native
from trt_wan.runtime.segments.native import gemm, vae

BF16 = np.dtype(ml_dtypes.bfloat16)
Run = Callable[[Network, dict[str, Any]], dict[str, Any]]


def errors(run: Run, model: ModelConfig, plan: Plan, chunks: int) -> dict[str, dict[str, float]]:
    """The relative error of every output, by network, in the last of some chunks. Every chunk has the caches
    of the one before, so an error in a cache counts in the next chunk too.
    """
    exact = replace(plan, precision="fp32")
    contracts = networks(model, plan)
    types = {w.name: w.dtype for name in VAE for w in contracts[name].weights}
    weights = {n: w.astype(types[n]).astype(np.float32) for n, w in random_weights(model).items()}
    eager, rng, found = EagerExecutor(model, exact, {"vae": weights}), np.random.default_rng(0), {}
    for half in ("encode", "decode"):
        made: list[Any] = []
        wanted: list[Any] = []
        for chunk in ("first", *["next"] * (chunks - 1)):
            network = contracts[f"vae_{half}_{chunk}"]
            given, *caches = network.inputs
            x = rng.standard_normal(given.shape).astype(np.float32) * 0.6
            known = {t.name: value for t, value in zip(caches, made[1:], strict=False)}
            feeds = {given.name: x, **known, **{w.name: weights[w.name] for w in network.weights}}
            typed = {t.name: feeds[t.name].astype(t.dtype) for t in network.inputs + network.weights}
            made = list(run(network, typed).values())
            known = {t.name: value for t, value in zip(caches, wanted[1:], strict=False)}
            wanted = list(eager.run(networks(model, exact)[network.name], 0, {given.name: x, **known}))
            found[network.name] = {
                t.name: float(np.linalg.norm(ours.astype(np.float32) - want)) / (np.linalg.norm(want) or 1)
                for t, ours, want in zip(network.outputs, made, wanted, strict=True)
            }
    return found


def require_small(found: dict[str, dict[str, float]]) -> None:
    assert set(found) == set(VAE)
    for name, outputs in found.items():
        worst = max(outputs, key=lambda output: outputs[output])
        print(f"{name}: {next(iter(outputs.values())):.1e}, worst {worst} {outputs[worst]:.1e}")
        # Of frames in [-1, 1], whose rms is 0.5, an error of 1.2e-2 is 50 dB.
        assert outputs[worst] <= tolerance(name, "bf16", "exact"), worst


# On the CPU


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    return vae_kernels(TINY, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(
    ("plan", "own"),
    [
        (Plan(64, 48, 9, "bf16"), True),
        # 60 positions in the middle: no multiple of 8
        pytest.param(Plan(80, 48, 9, "bf16", vae_chunk=2), False, marks=pytest.mark.long),
    ],
)
def test_networks_on_the_cpu(
    kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, plan: Plan, own: bool
) -> None:
    cpu = VaeOnCpu(TINY, kernels, monkeypatch, own)
    require_small(errors(cpu.run, TINY, plan, 2))


@pytest.mark.parametrize(("rows", "columns"), [(8, 96), (96, 60), (132, 68), (60, 96)])
def test_transpose(kernels: CpuKernels, rows: int, columns: int) -> None:
    given = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)
    made = np.zeros((columns, rows), np.uint16)
    launch(kernels, "transpose", -(-rows // 64) * -(-columns // 64), given, made, rows, columns)
    assert (made == given.T).all()


@pytest.mark.parametrize("silu", [0, 1])
@pytest.mark.parametrize("everything", [False, True])
def test_finish(kernels: CpuKernels, everything: bool, silu: int) -> None:
    """96 channels are three vectors for each of four threads. The last block of threads has few pixels."""
    rng, shape = np.random.default_rng(2), (37, 96)
    y, added = (rng.standard_normal(shape).astype(BF16) for _ in range(2))
    bias, added_bias, gamma = (rng.standard_normal(96).astype(np.float32) for _ in range(3))
    raw, normed = np.zeros(shape, BF16), np.zeros(shape, BF16)
    rest = (added, added_bias, raw) if everything else (0, 0, 0)
    launch(kernels, "finish_96", 2, y, bias, *rest, gamma, normed, 37, silu)
    x = y.astype(np.float32) + bias
    if everything:
        x += added.astype(np.float32) + added_bias
        np.testing.assert_allclose(raw.astype(np.float32), x, rtol=4e-3)
    want = x / np.linalg.norm(x, axis=1, keepdims=True) * 96**0.5 * gamma
    if silu:
        want /= 1 + np.exp(-want)
    np.testing.assert_allclose(normed.astype(np.float32), want, rtol=4e-3, atol=1e-6)


def test_softmax(kernels: CpuKernels) -> None:
    scores = (np.random.default_rng(3).standard_normal((3, 77)) * 20).astype(np.float32)
    made = np.zeros(scores.shape, BF16)
    launch(kernels, "softmax", 3, scores, made, 77)
    want = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(
        made.astype(np.float32), want / want.sum(1, keepdims=True), rtol=4e-3, atol=1e-9
    )


def test_repack(kernels: CpuKernels) -> None:
    given = np.arange(3 * 12 * 9, dtype=np.uint16).reshape(3, 12, 9)
    made = np.full((8, 9, 16), 7, np.uint16)
    launch(kernels, "repack", 2, given, made, 3, 12, 9, 8, 16)
    want = np.zeros_like(made)
    want[:3, :, :12] = given.transpose(0, 2, 1)
    assert (made == want).all()


@pytest.mark.parametrize(("model", "capability"), [("14b", (8, 0)), ("14b", (12, 0)), ("tiny", (8, 9))])
def test_kernels_compile(nvrtc: None, model: str, capability: tuple[int, int]) -> None:
    text, names = vae.source(MODELS[model].vae)
    code = bytes(compile_source(text, capability).code)
    for name in names:
        assert f".text.{name}".encode() + b"\0" in code


# Bytes of the scratch of TensorRT-RTX's decoder, the larger one, for a picture of 832x480.
TENSORRT = 1.69e9


@pytest.mark.parametrize("own", [False, True])
def test_the_scratch_is_no_larger_than_tensorrts(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    cpu = VaeOnCpu(ANIMATE_14B, None, monkeypatch, own)  # type: ignore[arg-type]  (nothing is launched)
    for size in ((832, 480), (1280, 720)):
        plan = Plan(*size, 77, "bf16")
        scratch = [cpu.open(networks(ANIMATE_14B, plan)[name]).scratch_bytes for name in VAE]
        print(size, [f"{size / 1e9:.2f} GB" for size in scratch])
        assert max(scratch) < TENSORRT * size[0] * size[1] / (832 * 480)


def test_the_reason_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "missing", lambda: None)
    monkeypatch.setattr(cudnn_library, "missing", lambda: "cuDNN is not here.")
    for name, capability, says in (
        ("cudnn", (7, 5), "A GPU of compute capability 7.5 has no bf16 products."),
        ("native", (8, 9), "Our convolution is for Hopper alone."),
        ("native", (9, 0), "cuDNN is not here."),
        ("cudnn", (8, 9), "cuDNN is not here."),
    ):
        assert native.missing("vae_decode_next", capability, name) == says
    assert native.missing("ffn", (9, 0)) is None


# On a GPU


@pytest.fixture(scope="module")
def gpu() -> Any:
    return require_gpu()


@pytest.mark.parametrize("name", ["cudnn", "native"])
@pytest.mark.parametrize(
    ("model", "plan"),
    [
        (TINY, Plan(80, 48, 9, "bf16")),
        (TINY, Plan(512, 128, 9, "fp8").vae_tile),
        (ANIMATE_14B, Plan(80, 112, 9, "bf16", vae_chunk=2)),
        (ANIMATE_14B, Plan(208, 112, 9, "bf16")),
    ],
)
def test_networks_on_the_gpu(gpu: Any, model: ModelConfig, plan: Plan, name: str) -> None:
    if (reason := native.missing(VAE[0], gpu.capability, name)) is not None:
        pytest.skip(reason)

    def run(network: Network, values: dict[str, Any]) -> dict[str, Any]:
        segment = native.open_native(network, model, plan, gpu, name)
        made, again = (run_segment(gpu, segment, network, values, poison) for poison in (0xFF, 0x7F))
        assert all((made[n].view(np.uint8) == again[n].view(np.uint8)).all() for n in made)
        return made

    require_small(errors(run, model, plan, 2))
    gc.collect()
