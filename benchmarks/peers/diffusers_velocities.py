"""diffusers' velocities on the weights and inputs of a recorded job, for `trt-wan bench quality --peers`.

    python -m trt_wan.benchmarks.peers.diffusers_velocities --weights FILE --inputs FILE.npz --out FOLDER

On a GPU: bf16, then linear layers in row-wise FP8 (torch_fp8.py) with cuDNN's attention and with every other
one that is installed. On the CPU: float32. Blocks are not compiled: a compiler changes the order of rounding
and not the recipe. Every row is a line of JSON: its velocities' file, or the reason why there is none.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.peers.diffusers_model import ATTENTION_ORDER, Model, make_model
from trt_wan.benchmarks.peers.shape import Shape, add_shape_arguments, shape_from
from trt_wan.benchmarks.peers.torch_attention import CANDIDATES, use_for_self_attention
from trt_wan.benchmarks.peers.torch_fp8 import quantize_blocks

Attempt = tuple[str, Callable[[], None]]  # a row's name, and the change of the model that precedes it


class Recorded:
    """The inputs of every step, from the .npz of a recording (record_velocities.py)."""

    def __init__(self, path: Path, device: str, kind: torch.dtype) -> None:
        self._arrays, self._device, self._kind = np.load(path), device, kind
        self.steps = len(self._arrays["latents"])
        self._fixed = {
            "encoder_hidden_states": self._tensor("text")[None],
            "encoder_hidden_states_image": self._tensor("image")[None],
            "pose_hidden_states": self._tensor("pose")[None],
            "face_pixel_values": self._tensor("face").transpose(0, 1)[None],
        }

    def arguments(self, step: int) -> dict[str, Any]:
        """The arguments of one call: a batch of one."""
        latent = torch.cat((self._tensor("latents", step), self._tensor("condition")))
        timestep = torch.tensor([float(self._arrays["timesteps"][step])], device=self._device)
        return {**self._fixed, "hidden_states": latent[None], "timestep": timestep}

    def _tensor(self, name: str, *index: int) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name][index]).to(self._device, self._kind)


def attempts(model: Model, shape: Shape, device: str) -> Iterator[Attempt]:
    """In this order: a quantised model is not turned back."""
    if device != "cuda":
        yield "diffusers float32", lambda: None
        return
    yield "diffusers bf16, cuDNN attention", lambda: None
    if torch.cuda.get_device_capability() < (8, 9):
        return
    yield "diffusers FP8, cuDNN attention", lambda: quantize_blocks(model)
    for name, (attend, package) in CANDIDATES.items():
        if package is not None:
            yield f"diffusers FP8, {name}", partial(use_for_self_attention, attend, shape.plan.tokens)


def record(shape: Shape, device: str, weights: Path, inputs: Path, out: Path) -> None:
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    began = time.perf_counter()
    model = make_model(shape, device, weights, kind)
    recorded = Recorded(inputs, device, kind)
    if device == "cuda":
        torch.cuda.synchronize()
    say("note", text=f"diffusers has its weights and inputs after {time.perf_counter() - began:.1f} s")
    kernels = (
        sdpa_kernel(ATTENTION_ORDER, set_priority=True) if device == "cuda" else contextlib.nullcontext()
    )
    with torch.inference_mode(), kernels:
        for name, change in attempts(model, shape, device):
            began = time.perf_counter()
            try:
                change()
                steps = range(recorded.steps)
                made = [model(**recorded.arguments(k), return_dict=False)[0][0] for k in steps]
            except Exception as error:  # a package that is missing or does not run raises what it likes
                lines = str(error).splitlines() or [type(error).__name__]
                say("row", name=name, reason=lines[0][:200])
                continue
            target = out / f"{name}.npz"
            np.savez(target, velocities=torch.stack(made).float().cpu().numpy())
            say("note", text=f"{name}: {len(made)} steps in {time.perf_counter() - began:.1f} s")
            say("row", name=name, velocities=str(target))
    say("done")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trt_wan.benchmarks.peers.diffusers_velocities")
    add_shape_arguments(parser)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    for name, what in (("weights", "the transformer"), ("inputs", "a recording, .npz"), ("out", "a folder")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    asked = parser.parse_args()
    answering(lambda: record(shape_from(asked), asked.device, asked.weights, asked.inputs, asked.out))


if __name__ == "__main__":
    main()
