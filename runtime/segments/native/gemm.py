"""Matrix products in FP8, int8 and bf16 by cuBLASLt, called through ctypes, without torch.

There is no bias and no scale of rows or columns: the kernels that read y apply them.
"""

import ctypes
import weakref
from ctypes import byref, c_float, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from trt_wan.errors import EnvironmentBroken, GraphError, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.device.gpu import Gpu

WORKSPACE_BYTES = 32 << 20  # recommended by cuBLAS for Hopper

# cublasLt.h, library_types.h
_COMPUTE_32F, _COMPUTE_32I = 68, 72
_FLOAT32, _INT8, _INT32, _BFLOAT16, _E4M3 = 0, 3, 10, 14, 28
_TITLES = {_E4M3: "FP8", _INT8: "int8", _BFLOAT16: "bf16"}
_TRANSA, _FAST_ACCUM = 3, 25  # attributes of a MatmulDesc
_MAX_WORKSPACE = 1  # attribute of a MatmulPreference
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
    """The library and a handle of the current device."""

    def __init__(self, library: Any = None) -> None:
        self._library = library or _open()
        self.handle = self.create(self, "")

    def __call__(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, f"cublasLt{function}")(*arguments)
        if status:
            raise GraphError(
                f"cublasLt{function} failed with status {status}.", "Report it with the job's size."
            )

    def create(self, owner: object, kind: str, *arguments: Any) -> c_void_p:
        """A new object of cuBLASLt, destroyed when `owner` is."""
        made = c_void_p()
        self(f"{kind}Create", byref(made), *arguments)
        destroy = weakref.finalize(owner, getattr(self._library, f"cublasLt{kind}Destroy"), made)
        destroy.atexit = False  # the process's end frees everything, in an order that is not known
        return made

    def set(self, kind: str, target: c_void_p, attribute: int, value: Any) -> None:
        self(f"{kind}SetAttribute", target, attribute, byref(value), c_size_t(ctypes.sizeof(value)))


@dataclass(frozen=True)
class Product:
    """y [rows, out] = factor times x [rows, inner] times w, which is [out, inner], or [inner, out] if it is
    `turned`. All are row-major. Rows of x and w begin `x_pitch` and `w_pitch` numbers apart; 0: without gaps.
    """

    rows: int
    out: int
    inner: int
    turned: bool = False
    x_pitch: int = 0
    w_pitch: int = 0
    factor: float = 1.0


class Gemm:
    """A product of one shape, of x and w in type `io`. cuBLASLt's heuristic chooses its algorithm, once."""

    def __init__(
        self, gpu: Gpu, library: CublasLt, product: Product, io: int, y: int = _BFLOAT16, fast: bool = False
    ) -> None:
        self._gpu, self._library, p = gpu, library, product
        whole = io == _INT8
        sums = (_COMPUTE_32I, _INT32) if whole else (_COMPUTE_32F, _FLOAT32)
        self._product = library.create(self, "MatmulDesc", *sums)
        library.set("MatmulDesc", self._product, _TRANSA, c_int(0 if p.turned else _TRANSPOSED))
        if fast:
            library.set("MatmulDesc", self._product, _FAST_ACCUM, ctypes.c_int8(1))
        self._w = self._matrix(io, *((p.inner, p.out) if p.turned else (p.out, p.inner)), p.w_pitch)
        self._x = self._matrix(io, p.rows, p.inner, p.x_pitch)
        self._y = self._matrix(y, p.rows, p.out)
        scalar: Any = c_int if whole else c_float
        self._factor, self._zero = scalar(1 if whole else p.factor), scalar(0)
        self._algorithm = self._choose(f"{_TITLES[io]} product of {p.rows}x{p.out}x{p.inner}")

    def enqueue(self, x: int, w: int, y: int, workspace: int) -> None:
        """Takes addresses on the device; the workspace has WORKSPACE_BYTES."""
        self._library(
            "Matmul",
            *(self._library.handle, self._product, byref(self._factor)),
            *(c_void_p(w), self._w, c_void_p(x), self._x, byref(self._zero)),
            *(c_void_p(y), self._y, c_void_p(y), self._y, byref(self._algorithm)),
            *(c_void_p(workspace), c_size_t(WORKSPACE_BYTES), c_void_p(self._gpu.handle)),
        )

    def _matrix(self, dtype: int, rows: int, columns: int, pitch: int = 0) -> c_void_p:
        """Row-major [rows, columns], which cuBLAS sees as its transpose."""
        sizes = c_uint64(columns), c_uint64(rows), ctypes.c_int64(pitch or columns)
        return self._library.create(self, "MatrixLayout", dtype, *sizes)

    def _choose(self, title: str) -> Any:
        choice, found = _Choice(), c_int()
        preference = self._library.create(self, "MatmulPreference")
        self._library.set("MatmulPreference", preference, _MAX_WORKSPACE, c_uint64(WORKSPACE_BYTES))
        self._library(
            "MatmulAlgoGetHeuristic",
            *(self._library.handle, self._product, self._w, self._x, self._y, self._y, preference, 1),
            *(byref(choice), byref(found)),
        )
        if not found.value:
            raise GraphError(f"cuBLASLt has no {title}.", "Choose tensorrt for this part with --segment.")
        return choice.algorithm


class Fp8Gemm(Gemm):
    """x and w in E4M3.

    Hopper may sum in fewer bits than float32 has: the error is 3e-3 where E4M3's own is 2e-2 (docs/log.md).
    """

    def __init__(self, gpu: Gpu, library: CublasLt, tokens: int, out: int, inner: int) -> None:
        super().__init__(gpu, library, Product(tokens, out, inner), _E4M3, fast=True)


class Int8Gemm(Gemm):
    """x and w in int8, y in int32, which holds every sum. Rows and pitches are multiples of 4 bytes, as
    cuBLASLt's tensor cores need: `out` and `inner` are channels.
    """

    def __init__(self, gpu: Gpu, library: CublasLt, tokens: int, out: int, inner: int) -> None:
        super().__init__(gpu, library, Product(tokens, out, inner), _INT8, _INT32)


class Bf16Gemm(Gemm):
    """x and w in bf16, y in bf16 or in float32."""

    def __init__(self, gpu: Gpu, library: CublasLt, product: Product, float32: bool = False) -> None:
        super().__init__(gpu, library, product, _BFLOAT16, _FLOAT32 if float32 else _BFLOAT16)


def missing() -> str | None:
    """A sentence that says why cuBLASLt cannot be opened, and the fix; None if it can."""
    try:
        _open()
    except EnvironmentBroken as error:
        return error.message
    return None


def _open() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
        library = ctypes.CDLL(path)
    except Exception as error:  # cuda.pathfinder has its own exceptions
        raise EnvironmentBroken(
            "cuBLASLt is not installed (the extra hopper).", with_commands("Run:", install_command("hopper"))
        ) from error
    return library
