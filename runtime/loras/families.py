"""The keys of one layer to changes of its weight and bias: low rank, LoHa, LoKr, DoRA, whole deltas.

The rank is read from each tensor, and the scale is alpha / rank, or 1 where neither the file nor PEFT's
settings beside it have an alpha: no prefix and no family changes it. Shapes are checked here; numbers are
read when a change is computed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trt_wan.errors import WeightsError, shown
from trt_wan.runtime.loras.changes import (
    Change,
    Computed,
    Decomposed,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    Replaced,
    Rows,
    Shifted,
    Stored,
    Whole,
    matrix,
)
from trt_wan.runtime.loras.names import Layer, module_of
from trt_wan.runtime.loras.peft_config import PeftConfig
from trt_wan.runtime.weights.gguf_file import GgufFile
from trt_wan.runtime.weights.stored import FP8_TYPES
from trt_wan.runtime.weights.tensor_file import Entry, TensorFile
from trt_wan.runtime.weights.torch_file import TorchFile

TYPES = ("F64", "F32", "F16", "BF16", *FP8_TYPES)
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
MOST_LETTERS = 90
DORA = ("dora_scale", "magnitude")

Shape = tuple[int, ...]
Opened = TensorFile | GgufFile | TorchFile


def unusable(file: Opened, fault: str) -> WeightsError:
    return WeightsError(
        f"The LoRA {file.path} cannot be merged: {fault}.",
        "Download or convert it again, or leave it out.",
    )


def shortened(key: str) -> str:
    """A key of a file in a message; a damaged file may have one of a million letters."""
    return key if len(key) <= MOST_LETTERS else f"…{key[-MOST_LETTERS:]}"


@dataclass(frozen=True)
class Group:
    """The keys of one layer by role. `shapes` are those of the model's tensors."""

    file: Opened
    layer: Layer
    keys: Mapping[str, str]
    shapes: Mapping[str, Shape]
    whole: Callable[[str], Rows]  # the unchanged weight of a tensor, float32 [rows, inner]
    settings: PeftConfig | None = None

    @property
    def weight(self) -> str:
        """The tensor that weights change: of a layer, or a parameter that stands alone."""
        name = f"{self.layer.name}.weight"
        return name if name in self.shapes else self.layer.name

    def changes(self) -> Iterator[tuple[str, Change]]:
        """Tensors and their changes. Raises WeightsError for keys that do not fit each other or the model."""
        product = self._product()
        dora = next((role for role in DORA if role in self.keys), None)
        if dora is not None:
            if product is None:
                raise self._fault(dora, "has no low-rank pair beside it")
            product = self._decomposed(product, dora)
        if product is not None:
            yield self._placed(product)
        for role in ("diff", "diff_m"):
            if role in self.keys:
                yield self._placed(Whole(self._read(role, *self._size(role))))
        if "set_weight" in self.keys:
            yield self._placed(Replaced(self._read("set_weight", *self._size("set_weight"))))
        for role, scale in (("diff_b", 1.0), ("up_bias", self._scale())):
            if role in self.keys:
                yield self._bias(role, scale)

    # ---- products ----

    def _product(self) -> Change | None:
        low_rank = [role for role in ("up", "down", "mid") if role in self.keys]
        loha = [role for role in (*LOHA, "hada_t1", "hada_t2") if role in self.keys]
        lokr = [role for role in (*LOKR, "lokr_t2") if role in self.keys]
        if (low_rank, loha, lokr).count([]) < 2:
            present = (*low_rank, *loha, *lokr)
            raise self._fault(present[0], f"has {self.keys[present[-1]]} of another family beside it")
        if low_rank:
            return self._low_rank()
        if loha:
            return self._loha()
        return self._lokr() if lokr else None

    def _low_rank(self) -> Change:
        rows, inner = self._size("down" if "down" in self.keys else "up")
        if "mid" in self.keys:
            return self._with_kernel(rows, inner)
        return self._pair("up", "down", rows, inner, self._scale())

    def _pair(self, up: str, down: str, rows: int, inner: int, scale: float) -> LowRank:
        rank = self._require(down, up).shape[0]
        self._require(up, down)
        return LowRank(self._read(up, rows, rank), self._read(down, rank, inner), scale)

    def _with_kernel(self, rows: int, inner: int) -> Computed:
        """A convolution's pair around a small kernel [rank, rank, ...]: out, in and kernel by their ranks."""
        core = self._require("mid", "mid").shape
        for role in ("up", "down"):
            self._require(role, "mid")
        if len(core) < 2:
            raise self._fault("mid", f"is {list(core)}")
        channels = inner // math.prod(core[2:]) if 0 not in core else 0
        first, last = self._read("up", rows, core[0]), self._read("down", core[1], channels)
        middle = self._read("mid", core[0], math.prod(core[1:]))
        scale = self._scale()

        def make() -> Rows:
            shaped = middle.astype(np.float32).reshape(core[0], core[1], -1)
            product = np.einsum(
                "or,rsk,si->oik", first.astype(np.float32), shaped, last.astype(np.float32), optimize=True
            )
            return np.ascontiguousarray(product.reshape(rows, inner)) * np.float32(scale)

        return Computed(make)

    def _loha(self) -> Change:
        rows, inner = self._size(LOHA[0])
        if "hada_t1" in self.keys or "hada_t2" in self.keys:
            raise self._fault("hada_t1" if "hada_t1" in self.keys else "hada_t2", "is not supported")
        sides = [self._pair(f"hada_w{k}_a", f"hada_w{k}_b", rows, inner, 1.0) for k in (1, 2)]
        return Hadamard(sides[0], sides[1], self._scale())

    def _lokr(self) -> Change:
        rows, inner = self._size("lokr_w1" if "lokr_w1" in self.keys else "lokr_w1_a")
        if "lokr_t2" in self.keys:
            raise self._fault("lokr_t2", "is not supported")
        left, right = self._factor("1"), self._factor("2")
        made_rows, made_inner = (a * b for a, b in zip(left.shape, right.shape, strict=True))
        if (made_rows, made_inner) != (rows, inner):
            made = f"makes {[made_rows, made_inner]}"
            role = "lokr_w1" if "lokr_w1" in self.keys else "lokr_w1_a"
            raise self._fault(role, f"{made} where {self.weight} is {[rows, inner]}")
        return Kronecker(left, right, self._scale())

    def _factor(self, side: str) -> Factor:
        role, up, down = f"lokr_w{side}", f"lokr_w{side}_a", f"lokr_w{side}_b"
        if role in self.keys:
            return Factor(matrix(self._array(role)))
        present = next((r for r in (up, down) if r in self.keys), None)
        if present is None:
            other = next(r for r in LOKR if r in self.keys)
            raise self._fault(other, f"has no {role} beside it")
        self._require(up, present)
        self._require(down, present)
        first, second = matrix(self._array(up)), matrix(self._array(down))
        rows, inner = self._size(up)
        if first.shape[1] != len(second) or len(first) > rows or second.shape[1] > inner:
            raise self._fault(up, f"is {list(first.shape)} and {self.keys[down]} {list(second.shape)}")
        return Factor(first, second)

    def _decomposed(self, change: Change, role: str) -> Decomposed:
        rows, inner = self._size(role)
        shape = self._entry(role).shape
        by_row = math.prod(shape) == rows and (len(shape) == 1 or shape[0] == rows)
        if not by_row and math.prod(shape) != inner:
            raise self._fault(role, f"is {list(shape)} for a weight of {[rows, inner]}")
        values = self._array(role).astype(np.float32).reshape((rows, 1) if by_row else (1, inner))

        def whole() -> Rows:
            start = (self.layer.half or 0) * rows
            return self.whole(self.weight)[start : start + rows]

        return Decomposed(change, values, merged=role == "magnitude", whole=whole)

    def _scale(self) -> float:
        """alpha / rank; 1 without an alpha, or where a LoKr has no rank. PEFT's settings decide otherwise."""
        if self.settings is not None and "alpha" not in self.keys:
            return self.settings.scale(self._module, self.rank)
        alpha, rank = self.alpha, self.rank
        return 1.0 if alpha is None or rank is None else alpha / rank

    @property
    def alpha(self) -> float | None:
        if "alpha" not in self.keys:
            scaled = any(role in self.keys for role in ("down", *LOHA, *LOKR))
            return self.settings.alpha_of(self._module) if self.settings and scaled else None
        if math.prod(self._entry("alpha").shape) != 1:
            raise self._fault("alpha", "is no single number")
        alpha = float(self._array("alpha").astype(np.float32).reshape(-1)[0])
        if not (math.isfinite(alpha) and alpha > 0):
            raise self._fault("alpha", f"is {alpha:g}")
        return alpha

    @property
    def _module(self) -> str:
        return module_of(next(iter(self.keys.values())))

    @property
    def rank(self) -> int | None:
        of_rank = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        return next((self._require(role, role).shape[0] for role in of_rank if role in self.keys), None)

    # ---- places ----

    def _size(self, role: str) -> tuple[int, int]:
        """Rows and inner of the weight, or of its half."""
        if self.weight not in self.shapes:
            raise self._fault(role, f"is about a weight, and the model's {self.layer.name} has none")
        rows, inner = _rows_and_inner(self.shapes[self.weight])
        return (rows, inner) if self.layer.half is None else (rows // 2, inner)

    def _placed(self, change: Change) -> tuple[str, Change]:
        if self.layer.half is None:
            return self.weight, change
        rows = _rows_and_inner(self.shapes[self.weight])[0] // 2
        return self.weight, Shifted(change, self.layer.half * rows, rows)

    def _bias(self, role: str, scale: float) -> tuple[str, Change]:
        name = f"{self.layer.name}.bias"
        if name not in self.shapes:
            raise self._fault(role, f"is about a bias, and the model's {self.layer.name} has none")
        rows, inner = _rows_and_inner(self.shapes[name])
        if self.layer.half is None:
            return name, Whole(self._read(role, rows, inner), scale)
        change = Whole(self._read(role, rows // 2, inner), scale)
        return name, Shifted(change, self.layer.half * (rows // 2), rows // 2)

    # ---- tensors of the file ----

    def _entry(self, role: str) -> Entry:
        return self.file[self.keys[role]]

    def _require(self, role: str, beside: str) -> Entry:
        """The entry, which has at least one axis."""
        if role not in self.keys:
            raise self._fault(beside, f"has no {role} beside it")
        if not self._entry(role).shape:
            raise self._fault(role, "is a single number")
        return self._entry(role)

    def _array(self, role: str) -> Stored:
        entry = self._entry(role)
        if entry.dtype not in TYPES:
            raise self._fault(role, f"has the type {shown(entry.dtype)}")
        if 0 in entry.shape:
            raise self._fault(role, "is empty")
        return self.file.read(self.keys[role])

    def _read(self, role: str, rows: int, inner: int) -> Stored:
        """[rows, inner] of a tensor whose shape may have more axes of 1, or the axes of a convolution."""
        values = self._array(role)
        shape = values.shape
        long = [[n for n in axes if n > 1] for axes in (shape, (rows, inner))]
        fits = values.size == rows * inner and (
            matrix(values).shape == (rows, inner) or rows == 1 or long[0] == long[1]
        )
        if not fits:
            raise self._fault(
                role, f"is {list(shape)} where [{rows}, {inner}] is needed for {self.layer.name}"
            )
        return values.reshape(rows, inner)

    def _fault(self, role: str, fault: str) -> WeightsError:
        return unusable(self.file, f"{shortened(self.keys.get(role, role))} {fault}")


def _rows_and_inner(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
