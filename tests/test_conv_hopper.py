"""The convolution for Hopper: it compiles, its tiles fit, it is right on the CPU and on a Hopper GPU."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hopper_on_cpu import gpu_on_cpu
from on_gpu import require_gpu

from trt_wan.runtime.device.kernels import Module, compile_source
from trt_wan.runtime.segments.native import conv_hopper
from trt_wan.runtime.segments.native.conv_hopper import UP, Plan, Tiling, fused, tiling
from trt_wan.runtime.segments.native.convolution import ConvShape

PLANE = (1, 1, 1, 1)
# All that the VAE has, with the parts that one launch computes.
SHAPES = (
    *((ConvShape(4, 480, 832, inner, 96, (3, 3, 3), pad=PLANE), 1) for inner in (96, 192)),
    *((ConvShape(4, 240, 416, inner, 192, (3, 3, 3), pad=PLANE), 1) for inner in (96, 192, 384)),
    *((ConvShape(2, 120, 208, inner, 384, (3, 3, 3), pad=PLANE), 1) for inner in (192, 384)),
    (ConvShape(4, 240, 416, 192, 96, UP[0], pad=UP[1]), 4),
    (ConvShape(4, 120, 208, 384, 192, UP[0], pad=UP[1]), 4),
    (ConvShape(2, 60, 104, 384, 384, (3, 1, 1)), 2),
    (ConvShape(2, 60, 104, 384, 384, (3, 1, 1), (2, 1, 1)), 1),
    (ConvShape(4, 480, 832, 96, 8, (3, 3, 3), pad=PLANE), 1),
    (ConvShape(4, 480, 832, 32, 96, (3, 1, 1)), 1),
)


def planned(shape: ConvShape, parts: int, norm: bool = True) -> Plan:
    chosen = tiling(shape, given=3 if shape.out == 8 else None)
    assert chosen is not None
    return Plan(shape, chosen, parts, norm)


@pytest.mark.parametrize(("shape", "parts"), [pytest.param(*SHAPES[0], marks=pytest.mark.long), SHAPES[9]])
def test_kernels_compile(nvrtc: None, shape: ConvShape, parts: int) -> None:
    plan = planned(shape, parts, norm=shape.out > 8)
    code = bytes(compile_source(plan.source, (9, 0), plan.macros, accelerated=True).code)
    for name in conv_hopper.KERNELS:
        assert f".text.{name}".encode() + b"\0" in code


@pytest.mark.parametrize(("shape", "parts"), SHAPES)
def test_stages_fit_and_suffice(shape: ConvShape, parts: int) -> None:
    """With one stage the warps that multiply would wait for pixels before they return the last ones."""
    plan = planned(shape, parts, norm=shape.out > 8)
    m: dict[str, Any] = plan.macros
    row = 2 * m["CHUNK"]
    pixels = m["A_STAGES"] * -(-(m["TILE_H"] + m["KR"] - 1) * m["PITCH"] * row // 1024) * 1024
    barriers = 16 * (m["A_STAGES"] + m["B_STAGES"])
    halves = 8 * m["TILE_W"] * m["TILE_H"] if plan.split == 2 else 0
    assert 1023 + pixels + m["B_STAGES"] * m["COLUMNS"] * row + barriers + halves <= conv_hopper.SHARED
    assert m["A_STAGES"] >= 2 and m["B_STAGES"] >= 2
    assert m["PITCH"] >= m["TILE_W"] + (m["KS"] - 1 if m["SHIFT"] else 0)
    assert m["TILE_W"] % 8 == m["TILE_H"] % 8 == shape.inner % m["CHUNK"] == 0


@pytest.mark.parametrize(
    ("shape", "tiles", "parts", "norm"),
    [
        (ConvShape(2, 9, 8, 64, 384, (3, 1, 1), (2, 1, 1)), Tiling(8, 8, 64, False), 1, True),
        (ConvShape(2, 9, 10, 32, 32, UP[0], pad=UP[1]), Tiling(8, 16, 32), 4, True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (ConvShape(2, 19, 21, 32, 32, (3, 3, 3), pad=PLANE), Tiling(16, 16, 32), 1, True),
                (ConvShape(1, 17, 9, 64, 64, (1, 3, 3), pad=PLANE), Tiling(8, 16, 64, False), 1, True),
                (ConvShape(1, 20, 18, 128, 32, (1, 3, 3), pad=PLANE), Tiling(16, 16, 64, pitch=18), 1, False),
                (ConvShape(2, 9, 10, 32, 32, (3, 1, 1)), Tiling(8, 16, 32, False), 2, False),
                (ConvShape(1, 17, 10, 32, 8, (3, 3, 3), pad=PLANE), Tiling(8, 16, 32), 1, False),
            )
        ),
    ],
)
def test_kernel_on_the_cpu(
    shape: ConvShape,
    tiles: Tiling,
    parts: int,
    norm: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def put(given: torch.Tensor) -> tuple[int, Callable[[], torch.Tensor]]:
        held.append(given)
        return given.data_ptr(), lambda: given

    held: list[torch.Tensor] = []
    compare(gpu_on_cpu(tmp_path, monkeypatch), put, shape, tiles, parts, norm)


@pytest.mark.parametrize(
    ("shape", "parts"), [(replace(shape, frames=3, height=37, width=43), parts) for shape, parts in SHAPES]
)
def test_kernel_on_the_gpu(gpu: Any, shape: ConvShape, parts: int) -> None:
    def put(given: torch.Tensor) -> tuple[int, Callable[[], torch.Tensor]]:
        bits = given.contiguous().view(torch.uint8).numpy()
        array = gpu.upload(bits)
        held.append(array)
        return array.address, lambda: torch.from_numpy(np.asarray(array)).view(given.dtype)

    held: list[Any] = []
    chosen = tiling(shape, given=3 if shape.out == 8 else None)
    assert chosen is not None
    compare(gpu, put, shape, chosen, parts, norm=shape.out > 8)


@pytest.fixture(scope="module")
def gpu() -> Any:
    gpu = require_gpu()
    if gpu.capability != conv_hopper.CAPABILITY:
        pytest.skip("This GPU is no Hopper.")
    gpu.reserve(1 << 28)
    return gpu


def compare(gpu: Any, put: Any, shape: ConvShape, tiles: Tiling, parts: int, norm: bool) -> None:
    """Odd sizes, in place where something is added, against torch in float32. `put` places a tensor and
    returns its address and a function that reads it.
    """
    torch.manual_seed(0)
    given = 3 if shape.out == 8 else None
    outs, inner = given or shape.out * (2 if parts == 2 else 1), shape.inner
    kernel = (1, 3, 3) if parts == 4 else shape.kernel
    x = torch.randn(*shape.taken, inner).bfloat16()
    w = (torch.randn(outs, inner, *kernel) * (inner * np.prod(kernel)) ** -0.5).bfloat16()
    bias, gamma = torch.randn(outs), torch.randn(shape.out)
    pad = 1 if parts == 4 else shape.pad[0]
    seen = x.permute(3, 0, 1, 2)[None].float()
    if parts == 4:
        seen = seen.repeat_interleave(2, 3).repeat_interleave(2, 4)
    wanted = torch.nn.functional.conv3d(seen, w.float(), bias, shape.stride, (0, pad, pad))[0]
    wanted = wanted.permute(1, 2, 3, 0)
    if parts == 2:
        wanted = torch.stack(wanted.chunk(2, dim=-1), 1).flatten(0, 1)
    before = torch.randn(*wanted.shape[:3], shape.out).bfloat16()
    added = parts == 1 and shape.out > 8
    if added:
        wanted = wanted + before.float()

    conv = conv_hopper.HopperConvolution(gpu, shape, tiles, parts, norm, given)
    places = [put(tensor) for tensor in (x, w, bias, gamma, before, torch.full_like(before, 7))]
    (x_at, _), (w_at, _), (bias_at, _), (gamma_at, _), (y_at, y), (normed_at, normed) = places
    packed, _ = put(torch.zeros(conv.weight_bytes + 256, dtype=torch.uint8))
    packed += -packed % 256
    conv.repack(w_at, bias_at, 0, packed)
    conv.enqueue(x_at, packed, y_at if added else 0, y_at, gamma_at, normed_at if norm else 0)

    made = y().reshape(before.shape)[..., : wanted.shape[-1]].float()
    torch.testing.assert_close(made, wanted, rtol=1e-2, atol=2e-2)
    if norm:
        scaled = torch.nn.functional.normalize(wanted, dim=-1) * gamma * shape.out**0.5
        made = normed().reshape(before.shape).float()
        torch.testing.assert_close(made, torch.nn.functional.silu(scaled), rtol=1e-2, atol=2e-2)


def test_only_hopper_and_fitting_shapes() -> None:
    def gpu(*capability: int) -> Any:
        return SimpleNamespace(capability=capability, once=lambda key, make: key)

    shape = SHAPES[0][0]
    assert fused(gpu(9, 0), shape, 1, norm=True)
    assert all(fused(gpu(*other), shape, 1, norm=True) is None for other in ((8, 9), (10, 0), (12, 0)))
    for other in (
        ConvShape(4, 480, 832, 96, 32, (3, 3, 3), pad=PLANE),
        ConvShape(4, 480, 832, 8, 96, (3, 3, 3), pad=PLANE),
        ConvShape(4, 240, 416, 96, 96, (1, 3, 3), (1, 2, 2), (0, 1, 0, 1)),
    ):
        assert fused(gpu(9, 0), other, 1, norm=True) is None


def test_structures_are_passed_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver reads each argument where its pointer points."""
    from cuda.bindings import driver

    seen: list[Any] = []

    def launched(function: Any, *rest: int) -> tuple[int]:
        *sizes, stream, pointers, extra = rest
        places = (ctypes.c_void_p * 4).from_address(pointers)
        kinds = ctypes.c_uint64 * 16, ctypes.c_uint64, ctypes.c_int32, ctypes.c_float
        values = [kind.from_address(place or 0) for kind, place in zip(kinds, places, strict=True)]
        seen.extend((function, sizes, stream, extra, list(values[0]), *(v.value for v in values[1:])))
        return (0,)

    monkeypatch.setattr(driver, "cuLaunchKernel", launched)
    module = Module.__new__(Module)
    module._functions = {"f": "function"}
    words = np.arange(16, dtype=np.uint64) << np.uint64(40)
    stream = SimpleNamespace(handle=7)
    module.launch(stream, "f", (3, 2), 384, words, 1 << 63, np.int32(-5), np.float32(0.5), shared=9)
    assert seen == ["function", [3, 2, 1, 384, 1, 1, 9], 7, 0, words.tolist(), 1 << 63, -5, 0.5]
