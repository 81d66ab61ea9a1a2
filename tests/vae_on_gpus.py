"""The native VAE on one rank of several, with random weights; for processes of `peers_on_gpu.Processes`."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.config import MODELS
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.networks import vae
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.parallel.peer_memory import PeerMemory
from trt_wan.runtime.parallel.vae_pipeline import open_pipeline
from trt_wan.runtime.segments.native import open_native
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.sources import RandomSource

_OPEN: dict[str, Model] = {}


def open_vae(gpu: Gpu, ranks: Any, name: str, plan: Plan, candidate: str, arena: int) -> dict[str, Any]:
    """Opens the VAE of model `name` for the functions below, with a pipeline if there are several ranks.
    Returns how it is divided.
    """
    close_vae(gpu, ranks)
    config, contracts = MODELS[name], networks(MODELS[name], plan)
    segments = {each: open_native(contracts[each], config, plan, gpu, candidate) for each in VAE}
    executor = GpuExecutor(gpu, segments, DeviceWeights(gpu, RandomSource(7)))
    executor.start_alone(arena)
    model = _OPEN["model"] = Model(config, plan, executor, {}, ranks=ranks)
    if ranks.count == 1:
        return {}
    began = time.perf_counter()
    pipeline = open_pipeline(gpu, segments, contracts, ranks, partial(PeerMemory, gpu, ranks))
    assert pipeline is not None
    executor.segments |= pipeline.segments
    model.take_pipeline(pipeline)
    divided = {half: asdict(row) for half, row in pipeline.divided.items()}
    return {"seconds_to_open": time.perf_counter() - began, **divided}


def close_vae(gpu: Gpu, ranks: Any) -> None:
    model: Any = _OPEN.pop("model", None)
    if model is not None:
        if model.vae_pipeline is not None:
            ranks.exchange(b"")
            model.vae_pipeline.close()
        model.executor.weights.close()


def clips(plan: Plan) -> tuple[Any, Any]:
    """A latent, and frames."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((16, plan.latent_frames, plan.latent_height, plan.latent_width), np.float32)
    frames = rng.uniform(-1, 1, (3, plan.frames, plan.height, plan.width)).astype(np.float32)
    return latent, frames


def digests(gpu: Gpu, ranks: Any, together: bool) -> dict[str, str]:
    """SHA-256 of decoded frames and of two clips' latents, in an order in which halves take turns. "" is what
    a rank does not get. Not `together`: as on one GPU.
    """
    model = _OPEN["model"]
    pipeline = model.vae_pipeline
    latent, frames = clips(model.plan)
    model.vae_pipeline = pipeline if together else None
    try:
        found = {"decoded": _digest(list(vae.decode(model, latent)))}
        for name, clip in (("encoded", frames), ("encoded again", frames[:, ::-1])):
            read = partial(_read, clip)
            made = vae.encode_read(model, read, model.plan.frames, together=together)
            found[name] = _digest([made])
        found["decoded again"] = _digest(list(vae.decode(model, made)))
    finally:
        model.vae_pipeline = pipeline
    return found


def timed(gpu: Gpu, ranks: Any, repeats: int) -> dict[str, Any]:
    """Seconds of a window's decode with frames on the host, without them, and of a clip's encode."""
    model = _OPEN["model"]
    latent, frames = clips(model.plan)
    spans = vae._spans(model.plan.latent_frames, model.plan.vae_chunk)
    pipeline = model.vae_pipeline

    def on_the_gpu() -> None:
        read = partial(_read, latent)
        for _ in vae._computed(model, "decode", read, spans, pipeline):
            pass

    acts: dict[str, Callable[[], object]] = {
        "decode": lambda: list(vae.decode(model, latent)),
        "decode on the GPU": on_the_gpu,
        "encode": lambda: vae.encode_read(model, partial(_read, frames), frames.shape[1], together=True),
    }
    return {name: [_seconds(gpu, ranks, act) for _ in range(repeats + 1)][1:] for name, act in acts.items()}


def _seconds(gpu: Gpu, ranks: Any, act: Callable[[], object]) -> float:
    gpu.sync()
    ranks.exchange(b"")
    began = time.perf_counter()
    act()
    gpu.sync()
    return time.perf_counter() - began


def _read(clip: Any, start: int, stop: int) -> Any:
    return clip[:, start:stop]


def _digest(arrays: list[Any]) -> str:
    if not arrays:
        return ""
    whole = hashlib.sha256()
    for array in arrays:
        assert np.isfinite(array).all() and array.std() > 1e-3, "no picture"
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def memory(gpu: Gpu, ranks: Any) -> float:
    """GB of the GPU that are in use."""
    from cuda.bindings import runtime

    _, free, total = runtime.cudaMemGetInfo()
    return float(total - free) / 1e9
