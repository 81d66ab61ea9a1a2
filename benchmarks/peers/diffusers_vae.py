"""diffusers' AutoencoderKLWan with our VAE's weights, for `trt-wan bench vae`: float32, bf16, compiled.

    python -m trt_wan.benchmarks.peers.diffusers_vae --weights FILE --inputs FILE.npz --out FOLDER

Inputs and results are those of measure/vae_job.py. Seconds are from inputs in page-locked host memory to
results there, as diffusers' pipelines copy them: the whole clip before and after, in the type of the model.
`networks` are without the copies. Every row is a line of JSON: its times and its file, or the reason why
there is none.
"""

import argparse
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.vae import FLOAT32
from trt_wan.benchmarks.peers.diffusers_model import stored_tensors, time_calls
from trt_wan.benchmarks.peers.shape import Shape, add_shape_arguments, shape_from
from trt_wan.engines.contracts.vae_layers import LATENT_MEAN, LATENT_STD

SMALL = 2.0**-6  # diffusers clamps frames to [-1, 1]; its last layer times this is exact, and far below

Vae = Any  # AutoencoderKLWan: diffusers has no types to check against


def make_vae(shape: Shape, weights: Path, device: str) -> Vae:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = AutoencoderKLWan(base_dim=shape.config.vae.base_dim)
    converted = convert_wan_vae_to_diffusers(stored_tensors(weights, shape.config, "vae"))
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    vae.load_state_dict({name: t.float().reshape(shapes[name]) for name, t in converted.items()}, strict=True)
    for parameter in vae.decoder.conv_out.parameters():
        parameter.data *= SMALL
    return vae.to(device).eval().requires_grad_(False)


def _channels_last(vae: Vae) -> None:
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def _compile(vae: Vae) -> None:
    for half in (vae.encoder, vae.decoder):
        half.compile(dynamic=False)


def _as_it_comes(vae: Vae) -> None:
    pass


# In this order, each on top of the one before: the compiler takes minutes, and comes last.
ROWS: dict[str, tuple[torch.dtype, Callable[[Vae], None]]] = {
    FLOAT32: (torch.float32, _as_it_comes),
    "diffusers bf16": (torch.bfloat16, _as_it_comes),
    "diffusers bf16, channels last": (torch.bfloat16, _channels_last),
    "diffusers bf16, channels last, compiled": (torch.bfloat16, _compile),
}


def record(shape: Shape, device: str, weights: Path, inputs: Path, out: Path, repeats: int) -> None:
    names = list(ROWS) if device == "cuda" else [FLOAT32]
    say("rows", names=names)
    given = np.load(inputs)
    vae = make_vae(shape, weights, device)
    mean, deviation = (torch.tensor(t).reshape(1, -1, 1, 1, 1).to(device) for t in (LATENT_MEAN, LATENT_STD))
    latents = torch.from_numpy(given["latents"])[None] * deviation.cpu() + mean.cpu()
    frames = torch.from_numpy(given["frames"]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        for name in names:
            kind, change = ROWS[name]
            try:
                vae.to(kind)
                change(vae)
                decoded, decoding = _timed(partial(_decode, vae), latents.to(kind), device, repeats)
                moments, encoding = _timed(partial(_encode, vae), frames.to(kind), device, repeats)
            except Exception as error:  # torch and its compiler raise what they like
                say("row", name=name, reason=(str(error).splitlines() or [type(error).__name__])[0][:200])
                continue
            target = out / f"{name}.npz"
            encoded = (moments.float() - mean) / deviation
            np.savez(target, decoded=decoded.float().cpu().numpy() / SMALL, encoded=encoded[0].cpu().numpy())
            say("row", name=name, target=str(target), decode=decoding, encode=encoding)
    say("done")


def _decode(vae: Vae, latents: torch.Tensor) -> torch.Tensor:
    frames: torch.Tensor = vae.decode(latents).sample[0]
    return frames


def _encode(vae: Vae, frames: torch.Tensor) -> torch.Tensor:
    latents: torch.Tensor = vae.encode(frames).latent_dist.mode()
    return latents


def _timed(
    act: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor, device: str, repeats: int
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """The result of `act` on the device, and the seconds of each run but the first."""
    on_gpu = device == "cuda"
    host = given.contiguous().pin_memory() if on_gpu else given.contiguous()
    result = act(host.to(device))
    arrived = torch.empty(result.shape, dtype=result.dtype, pin_memory=on_gpu)
    arrived.copy_(result)  # which waits for the GPU
    seconds, networks = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        moved = host.to(device)
        made: deque[torch.Tensor] = deque(maxlen=1)
        networks += time_calls(lambda: made.append(act(moved)), 1, device)  # noqa: B023  called at once
        arrived.copy_(made.pop())
        seconds.append(time.perf_counter() - began)
    return result, {"seconds": seconds, "networks": networks}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trt_wan.benchmarks.peers.diffusers_vae")
    add_shape_arguments(parser)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--repeats", type=int, default=3)
    for name, what in (("weights", "the VAE"), ("inputs", ".npz"), ("out", "a folder")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    o = parser.parse_args()
    answering(lambda: record(shape_from(o), o.device, o.weights, o.inputs, o.out, o.repeats))


if __name__ == "__main__":
    main()
