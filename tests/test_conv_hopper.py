"""The convolution for Hopper. Without a GPU: it compiles, its weights are right, its tiles fit."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from kernels_on_cpu import CpuKernels

from trt_wan.runtime.device.kernels import Module, compile_source, read_source
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
    chosen = tiling(shape, given=(3, shape.inner) if shape.out == 8 else None)
    assert chosen is not None
    return Plan(shape, chosen, parts, norm)


@pytest.mark.parametrize(("shape", "parts"), [SHAPES[0], SHAPES[5], SHAPES[8], SHAPES[11]])
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


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_weights(parts: int, tmp_path: Path) -> None:
    out, inner, kernel = 32, 8, {1: (3, 3, 3), 2: (3, 1, 1), 4: (1, 2, 2)}[parts]
    plan = Plan(ConvShape(1, 8, 8, inner, out, kernel), Tiling(8, 16, 32), parts, norm=False)
    lines = "".join(f"#define {name} {value}\n" for name, value in plan.macros.items())
    source = lines + read_source(conv_hopper.__package__, "conv_hopper_weights.cu")
    rng = np.random.default_rng(parts)
    outs, given = out * (2 if parts == 2 else 1), (1, 3, 3) if parts == 4 else kernel
    w = rng.standard_normal((outs, inner, *given)).astype(ml_dtypes.bfloat16)
    bias, more = rng.standard_normal((2, outs)).astype(np.float32)
    count = parts * out * inner * int(np.prod(kernel))
    made = np.zeros(2 * count + 4 * outs, np.uint8)
    kernels = CpuKernels(source, tmp_path)
    kernels.launch("repack_for_hopper", 3, 64, False, w, bias, more, made)
    np.testing.assert_array_equal(made[2 * count :].view(np.float32), bias + more)
    packed = made[: 2 * count].view(ml_dtypes.bfloat16).astype(np.float32)
    packed = packed.reshape(parts, *kernel, out // 32, 4, 4, 2, inner)  # ..., of eight columns, quad, pair
    packed = packed.swapaxes(-4, -3).reshape(parts, *kernel, out, inner)  # as a thread writes them
    wide = torch.from_numpy(w.astype(np.float32))
    if parts < 4:
        expected = wide.reshape(parts, out, inner, *kernel).permute(0, 3, 4, 5, 1, 2)
        np.testing.assert_array_equal(packed, expected.numpy())
        return
    x = torch.randn(1, inner, 5, 6)
    enlarged = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = torch.nn.functional.conv2d(enlarged, wide[:, :, 0], padding=1)
    for corner in range(4):
        down, right = divmod(corner, 2)
        padded = torch.nn.functional.pad(x, (1 - right, right, 1 - down, down))
        part = torch.from_numpy(packed[corner, 0]).permute(2, 3, 0, 1)
        ours = torch.nn.functional.conv2d(padded, part)
        torch.testing.assert_close(ours, expected[:, :, down::2, right::2], rtol=0, atol=0.1)


def test_weights_of_few_channels(tmp_path: Path) -> None:
    """Three colours of nine neighbours are 27 channels; of eight columns five are zero."""
    rng = np.random.default_rng(0)
    for shape, given in (
        (ConvShape(1, 8, 8, 32, 32, (3, 1, 1)), (32, 3)),
        (ConvShape(1, 8, 8, 32, 8, (3, 3, 3)), (3, 32)),
    ):
        plan = Plan(shape, Tiling(8, 16, 32), 1, norm=False, given=given)
        lines = "".join(f"#define {name} {value}\n" for name, value in plan.macros.items())
        source = lines + read_source(conv_hopper.__package__, "conv_hopper_weights.cu")
        folder = tmp_path / str(shape.out)
        folder.mkdir()
        w = rng.standard_normal((*given, 3, 3, 3)).astype(ml_dtypes.bfloat16)
        bias = rng.standard_normal(given[0]).astype(np.float32)
        count = shape.out * shape.inner * int(np.prod(shape.kernel))
        made = np.full(2 * count + 4 * shape.out, 0xFF, np.uint8)
        CpuKernels(source, folder).launch("repack_for_hopper", 3, 64, False, w, bias, 0, made)
        np.testing.assert_array_equal(made[2 * count :].view(np.float32)[: given[0]], bias)
        assert not made[2 * count :].view(np.float32)[given[0] :].any()
        packed = made[: 2 * count].view(ml_dtypes.bfloat16).astype(np.float32)
        wide = w.astype(np.float32)
        if given[1] == 3:
            packed = packed.reshape(3, 1, 4, 4, 2, 32).swapaxes(-4, -3).reshape(3, 32, 32)
            expected = wide.transpose(2, 0, 1, 3, 4).reshape(3, 32, 27)
            np.testing.assert_array_equal(packed[:, :, :27], expected)
            assert not packed[:, :, 27:].any()
        else:
            packed = packed.reshape(3, 3, 3, 8, 32)
            np.testing.assert_array_equal(packed[..., :3, :], wide.transpose(2, 3, 4, 0, 1))
            assert not packed[..., 3:, :].any()


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
