"""The native VAE on the CPU: kernels by g++, convolutions and products by torch, on numpy's memory."""

import ctypes
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from kernels_on_cpu import CpuKernels

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network
from trt_wan.runtime.segments.native import vae
from trt_wan.runtime.segments.native.convolution import ConvShape
from trt_wan.runtime.segments.native.gemm import Product

THREADS = 32
BARRIERS = ("finish", "transpose", "softmax")


def at(address: int, shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> Any:
    """A view of memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)


def tensor(address: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(at(address, shape).astype(np.float32))


class Convolution:
    """Rounds its result to bf16, sums in float32."""

    workspace_bytes = 0

    def __init__(self, gpu: Any, shape: ConvShape) -> None:
        self.shape = shape

    def enqueue(self, x: int, w: int, y: int, workspace: int) -> None:
        s = self.shape
        given = tensor(x, (*s.taken, s.inner)).permute(3, 0, 1, 2)[None]
        top, bottom, left, right = s.pad
        given = torch.nn.functional.pad(given, (left, right, top, bottom))
        weight = tensor(w, (s.out, *s.kernel, s.inner)).permute(0, 4, 1, 2, 3)
        made = torch.nn.functional.conv3d(given, weight, stride=s.stride)[0].permute(1, 2, 3, 0)
        at(y, (s.frames, s.height, s.width, s.out))[:] = made.numpy()


class Fused:
    """In place of HopperConvolution. Its weights stay as they are, in float32, the bias behind them."""

    def __init__(self, shape: ConvShape, parts: int, norm: bool, given: int | None) -> None:
        self.kernel = self  # what would be compiled
        self.shape, self.parts, self.norm = shape, parts, norm
        self._out = shape.out * (2 if parts == 2 else 1)
        self._given = given or self._out
        self._kernel = (1, 3, 3) if parts == 4 else shape.kernel
        self._count = self._out * shape.inner * int(np.prod(self._kernel))

    def compile(self) -> None:
        pass

    @property
    def weight_bytes(self) -> int:
        return 4 * (self._count + self._out)

    def repack(self, given: int, bias: int, added_bias: int, w: int) -> None:
        made = at(w, (self._count + self._out,), np.float32)
        made[:] = 0
        count = self._given * self._count // self._out
        made[:count] = at(given, (count,))
        for one in (bias, added_bias):
            if one:
                made[self._count :] += at(one, (self._out,), np.float32)

    def enqueue(self, x: int, w: int, added: int, y: int, gamma: int, normed: int, silu: bool) -> None:
        s, packed = self.shape, torch.from_numpy(at(w, (self._count + self._out,), np.float32))
        given = tensor(x, (*s.taken, s.inner)).permute(3, 0, 1, 2)[None]
        top, bottom, left, right = s.pad
        if self.parts == 4:
            given, top, bottom, left, right = (
                given.repeat_interleave(2, 3).repeat_interleave(2, 4),
                1,
                1,
                1,
                1,
            )
        given = torch.nn.functional.pad(given, (left, right, top, bottom))
        weight = packed[: self._count].reshape(self._out, s.inner, *self._kernel)
        made = torch.nn.functional.conv3d(given, weight, packed[self._count :], s.stride)[0].permute(
            1, 2, 3, 0
        )
        if self.parts == 2:
            made = torch.stack(made.chunk(2, dim=-1), 1).flatten(0, 1)
        if added:
            made = made + tensor(added, tuple(made.shape))
        made = made.bfloat16().float()
        assert bool(normed) == self.norm
        if y:
            at(y, tuple(made.shape))[:] = made.numpy()
        if normed:
            scale = torch.from_numpy(at(gamma, (s.out,), np.float32)) * s.out**0.5
            made = torch.nn.functional.normalize(made, dim=-1) * scale
            at(normed, tuple(made.shape))[:] = (torch.nn.functional.silu(made) if silu else made).numpy()


def fused(gpu: Any, shape: ConvShape, parts: int, *, norm: bool, given: int | None = None) -> Fused:
    return Fused(shape, parts, norm, given)


class Gemm:
    def __init__(self, gpu: Any, library: Any, product: Product, float32: bool) -> None:
        self.product, self.y = product, np.float32 if float32 else ml_dtypes.bfloat16

    def enqueue(self, x: int, w: int, y: int, workspace: int) -> None:
        p = self.product
        a = _rows(x, p.rows, p.inner, p.x_pitch)
        b = _rows(w, p.inner, p.out, p.w_pitch) if p.turned else _rows(w, p.out, p.inner, p.w_pitch).T
        at(y, (p.rows, p.out), self.y)[:] = p.factor * (a @ b)


def _rows(address: int, rows: int, columns: int, pitch: int) -> Any:
    pitch = pitch or columns
    flat = at(address, ((rows - 1) * pitch + columns,)).astype(np.float32)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (4 * pitch, 4))


def vae_kernels(model: ModelConfig, folder: Path) -> CpuKernels:
    """The kernels of vae.cu with few threads per block, and finish_96, which tiny models lack."""
    text, names = vae.source(model.vae, THREADS)
    return CpuKernels(text + ("" if "finish_96" in names else "FINISH(96)\n"), folder)


def launch(kernels: CpuKernels, name: str, blocks: int, *arguments: Any) -> None:
    kernels.launch(name, blocks, THREADS, name.split("_")[0] in BARRIERS, *arguments)


class VaeOnCpu:
    """Opens and runs the VAE's networks. `own`: with convolutions that finish themselves."""

    def __init__(
        self, model: ModelConfig, kernels: CpuKernels, patch: pytest.MonkeyPatch, own: bool = False
    ) -> None:
        self.model, self._own = model, own
        kept: dict[Hashable, Any] = {}

        def once(key: Hashable, make: Callable[[], Any]) -> Any:
            if key not in kept:
                kept[key] = make()
            return kept[key]

        def launched(stream: Any, name: str, blocks: int, threads: int, *arguments: Any) -> None:
            launch(kernels, name, blocks, *arguments)

        self._gpu: Any = SimpleNamespace(stream=None, device=None, once=once)
        patch.setattr(vae, "Module", lambda device, text, names: SimpleNamespace(launch=launched))
        patch.setattr(vae, "convolution", Convolution)
        patch.setattr(vae, "fused", fused)
        patch.setattr(vae, "Kernel", Fused)
        patch.setattr(
            vae, "tiling", lambda shape, given=None: shape.stride[1:] == (1, 1) and shape.out % 8 == 0 or None
        )
        patch.setattr(vae, "Bf16Gemm", Gemm)
        patch.setattr(vae, "CublasLt", object)

    def open(self, network: Network) -> vae.Vae:
        return vae.Vae(network, self.model, self._gpu, self._own)

    def run(self, network: Network, values: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name. Outputs and scratch hold NaN before, so what is read too early shows."""
        segment = self.open(network)
        scratch = np.full(segment.scratch_bytes + 256, 0xFF, np.uint8)
        made = {}
        for t in network.outputs:
            size = int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize
            made[t.name] = np.full(size, 0xFF, np.uint8).view(t.dtype).reshape(t.shape)
        held = {name: np.ascontiguousarray(value) for name, value in values.items()}
        addresses = {name: array.ctypes.data for name, array in {**held, **made}.items()}
        segment.start(scratch.ctypes.data + -scratch.ctypes.data % 256)
        segment.enqueue(addresses)
        return made
