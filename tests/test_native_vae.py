"""The VAE without TensorRT, against the graphs' own functions in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eager_vae import EagerExecutor, random_weights
from native_on_cpu import VaeOnCpu

from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan


def psnr(made: Any, wanted: Any) -> float:
    """dB, of frames in [-1, 1]."""
    return float(10 * np.log10(4 / np.mean((made - wanted) ** 2)))


def typed(network: Network, values: dict[str, Any]) -> dict[str, Any]:
    tensors = network.inputs + network.weights
    return {t.name: np.asarray(values[t.name]).astype(t.dtype) for t in tensors}


@pytest.mark.parametrize("own", [False, True])
def test_walk(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(64, 48, 9, "bf16")
    cpu = VaeOnCpu(TINY, tmp_path, monkeypatch, own)
    weights = random_weights()
    weights = {
        n: w.astype("bfloat16").astype(np.float32) if w.ndim > 1 and "gamma" not in n else w
        for n, w in weights.items()
    }
    eager = EagerExecutor(TINY, Plan(64, 48, 9), {"vae": weights})
    rng = np.random.default_rng(0)
    for half, given in (("encode", "frames"), ("decode", "latent")):
        ours: list[Any] = []
        wanted: list[Any] = []
        for chunk in ("first", "next", "next"):
            network = networks(TINY, plan)[f"vae_{half}_{chunk}"]
            exact = networks(TINY, Plan(64, 48, 9))[network.name]
            x = rng.standard_normal(network.inputs[0].shape).astype(np.float32) * 0.5
            names = [t.name for t in network.inputs[1:]]
            feeds = {given: x, **dict(zip(names, wanted[1:], strict=False))}
            wanted = list(eager.run(exact, 0, feeds if chunk == "next" else {given: x}))
            feeds = {given: x, **dict(zip(names, ours[1:], strict=False))}
            feeds |= {w.name: weights[w.name] for w in network.weights}
            made = cpu.run(network, typed(network, feeds))
            ours = [made[t.name] for t in network.outputs]
            for t, a, b in zip(network.outputs, ours, wanted, strict=True):
                a = a.astype(np.float32)
                err = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9)
                print(network.name, t.name, f"{err:.2e}")
