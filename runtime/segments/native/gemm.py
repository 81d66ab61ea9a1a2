"""FP8 matrix products by cuBLASLt, called through ctypes: no torch, no other binding.

y [tokens, out] in bf16 = x [tokens, inner] times w [out, inner] transposed, both E4M3, sums nearly float32.
No scale and no bias: who reads y multiplies by the tokens' and the weight's scales anyway.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from trt_wan.errors import EnvironmentBroken, GraphError
from trt_wan.runtime.device.gpu import Gpu

WORKSPACE_BYTES = 32 << 20  # what cuBLAS recommends for Hopper

# cublasLt.h, library_types.h
_COMPUTE_32F = 68
_FLOAT32, _BFLOAT16, _E4M3 = 0, 14, 28
_TRANSA, _FAST_ACCUM = 3, 25  # of a product's description
_MAX_WORKSPACE = 1  # of a preference
_TRANSPOSED = 1


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class CublasLt:
    """The library, opened once per process and device."""

    def __init__(self) -> None:
        self._library = _open()
        self.handle = c_void_p()
        self("cublasLtCreate", byref(self.handle))

    def __call__(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise GraphError(f"{function} failed with status {status}.", "Report it with the job's size.")

    def matrix(self, dtype: int, rows: int, columns: int) -> c_void_p:
        """Row-major [rows, columns], which cuBLAS sees as its transpose."""
        layout = c_void_p()
        self(
            "cublasLtMatrixLayoutCreate",
            *(byref(layout), dtype, c_uint64(columns), c_uint64(rows), ctypes.c_int64(columns)),
        )
        return layout


class Fp8Gemm:
    """One shape of product: its algorithm is chosen here, by cuBLASLt's own table, and stays.

    Hopper may add up in fewer bits than float32 has: 3e-3 off where E4M3 itself is 2e-2 off (docs/log.md).
    """

    def __init__(self, gpu: Gpu, library: CublasLt, tokens: int, out: int, inner: int) -> None:
        self._gpu, self._library = gpu, library
        self._product = c_void_p()
        library("cublasLtMatmulDescCreate", byref(self._product), _COMPUTE_32F, _FLOAT32)
        self._set(_TRANSA, c_int(_TRANSPOSED))
        self._set(_FAST_ACCUM, ctypes.c_int8(1))
        self._w = library.matrix(_E4M3, out, inner)
        self._x = library.matrix(_E4M3, tokens, inner)
        self._y = library.matrix(_BFLOAT16, tokens, out)
        self._one, self._zero = c_float(1), c_float(0)
        self._algorithm = self._choose(f"{tokens}x{out}x{inner}")

    def enqueue(self, x: int, w: int, y: int, workspace: int) -> None:
        """Addresses on the device; the workspace has WORKSPACE_BYTES."""
        self._library(
            "cublasLtMatmul",
            *(self._library.handle, self._product, byref(self._one)),
            *(c_void_p(w), self._w, c_void_p(x), self._x, byref(self._zero)),
            *(c_void_p(y), self._y, c_void_p(y), self._y, byref(self._algorithm)),
            *(c_void_p(workspace), c_size_t(WORKSPACE_BYTES), c_void_p(self._gpu.handle)),
        )

    def _set(self, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        self._library("cublasLtMatmulDescSetAttribute", self._product, attribute, byref(value), size)

    def _choose(self, shape: str) -> Any:
        preference, found = c_void_p(), c_int()
        self._library("cublasLtMatmulPreferenceCreate", byref(preference))
        size = c_uint64(WORKSPACE_BYTES)
        self._library(
            "cublasLtMatmulPreferenceSetAttribute",
            *(preference, _MAX_WORKSPACE, byref(size), c_size_t(ctypes.sizeof(size))),
        )
        choice = _Choice()
        self._library(
            "cublasLtMatmulAlgoGetHeuristic",
            *(self._library.handle, self._product, self._w, self._x, self._y, self._y, preference, 1),
            *(byref(choice), byref(found)),
        )
        self._library("cublasLtMatmulPreferenceDestroy", preference)
        if not found.value:
            raise GraphError(f"cuBLASLt has no FP8 product of {shape}.", "Use --segment attn_in=tensorrt.")
        return choice.algorithm


def missing() -> str | None:
    """What cuBLASLt lacks here, in a sentence; None if it can be opened."""
    try:
        _open()
    except EnvironmentBroken as error:
        return f"{error.message} {error.hint}"
    return None


def _open() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
        library = ctypes.CDLL(path)
    except Exception as error:  # cuda.pathfinder has exceptions of its own
        raise EnvironmentBroken("cuBLASLt is not installed.", "Run: pip install 'trt-wan[hopper]'") from error
    return library
