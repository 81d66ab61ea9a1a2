"""How the weights of a file are quantised: the tensors beside a weight and what they mean.

A quantised weight `<layer>.weight` has siblings `<layer>.*`. Scaled FP8 (model_spec.md 5.2) and int8 are
multiplied by `<layer>.scale_weight` (also called `weight_scale`), one number for the tensor or one per output
row. ComfyUI describes a layer in `<layer>.comfy_quant`, the bytes of a JSON object, or in the header's
`_quantization_metadata`. A sibling or an option that is not known here is a fault: it may change the values.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import shown
from trt_wan.runtime.weights.open_file import OpenFile
from trt_wan.runtime.weights.stored import BLOCKS, FP8_TYPES, ROTATIONS

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
SCALED_TYPES = (*FP8_TYPES, "I8")  # their scales are applied
WEIGHT_TYPES = (*FLOAT_TYPES, *SCALED_TYPES, *BLOCKS)
SCALES = ("scale_weight", "weight_scale")
COMFY = "comfy_quant"
PRE_QUANT = "pre_quant_scale"  # [in]; ComfyUI multiplies the layer's input by it
MARKER = "scaled_fp8"
# Siblings that change no value: the scales of activations matter to a W8A8 product only.
HARMLESS = ("weight", "bias", "input_scale", "scale_input", COMFY, MARKER)
KNOWN = (*HARMLESS, *SCALES, PRE_QUANT)

FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
ROTATED = "convrot"
# Options of comfy_quant beside the format. Shapes tell per_row and per_channel; orig_* describe the source.
OPTIONS = (
    *(ROTATED, "convrot_groupsize", "per_row", "per_channel"),
    *("full_precision_matrix_mult", "orig_dtype", "orig_shape"),
)
LONGEST = 1 << 16  # bytes of a layer's description; they have about 70
BROKEN = "no JSON object"  # stands for the options of a description that cannot be read
GROUP = 256  # input columns per rotated group where none is given

# Quantisations that are not read, by the end of a name that only they have.
FOREIGN = {
    ".wscales": "Nunchaku (4 bits)",
    ".wzeros": "Nunchaku (4 bits)",
    ".qzeros": "AWQ or GPTQ (4 bits)",
    ".qweight": "AWQ, GPTQ or Nunchaku (4 bits)",
    ".absmax": "bitsandbytes (4 or 8 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight._data": "quanto",
}


@dataclass(frozen=True)
class Fault:
    """The fault of a tensor. `kind` is the same for all tensors with this fault, and begins with a verb
    in the plural; `detail` is about this one.
    """

    kind: str
    detail: str = ""


class Quantised:
    """The quantisation of the tensors of one file, by their stored names."""

    def __init__(self, file: OpenFile, names: Iterable[str]) -> None:
        """`names` are those of one part."""
        self.file = file
        self._siblings: dict[str, list[str]] = {}
        for name in names:
            layer, _, last = name.rpartition(".")
            self._siblings.setdefault(layer, []).append(last)
        self.described = self._descriptions()
        self.scaled = bool(self.described) or any(
            last in (*SCALES, MARKER) for lasts in self._siblings.values() for last in lasts
        )

    def foreign(self) -> str:
        """The name of the quantisation if it is one of FOREIGN, else nothing."""
        return next(
            (
                named
                for end, named in FOREIGN.items()
                for layer, lasts in self._siblings.items()
                for last in lasts
                if f"{layer}.{last}".endswith(end)
            ),
            "",
        )

    def scale(self, name: str) -> str | None:
        """The stored name of a tensor's scale."""
        return self._sibling(name, SCALES)

    def scales(self, name: str) -> NDArray[np.float32] | None:
        """The scale of every row [rows]; None for a tensor that has none."""
        scale = self.scale(name)
        if scale is None or self.file.entries[name].dtype not in SCALED_TYPES:
            return None
        values = self.file.read(scale).astype(np.float32).reshape(-1)
        return np.broadcast_to(values, self.file.entries[name].shape[:1])

    def columns(self, name: str) -> NDArray[np.float32] | None:
        """Factors [in] of the input columns; None for a tensor that has none."""
        factors = self._sibling(name, (PRE_QUANT,))
        return None if factors is None else self.file.read(factors).astype(np.float32).reshape(-1)

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor is FP8, int8, in GGUF blocks, or of a type that is no plain number."""
        return self.file.entries[name].dtype not in (*FLOAT_TYPES, "I64", "I32", "I16", "U8", "BOOL")

    def rotation(self, name: str) -> int:
        """Size of the rotated groups of input columns; 0: not rotated."""
        options = self.options(name)
        group = options.get("convrot_groupsize", GROUP)
        rotated = options.get(ROTATED) is True and self.file.entries[name].dtype == "I8"
        return group if rotated and isinstance(group, int) else 0

    def options(self, name: str) -> Mapping[str, object]:
        """The description of a tensor's layer; empty where there is none."""
        return self.described.get(_layer(name), {})

    def fault(self, name: str) -> Fault | None:
        """The first reason why a tensor cannot be read right."""
        entry = self.file.entries[name]
        if entry.dtype not in WEIGHT_TYPES:
            named = self._format(name)
            return Fault(f"have the type {entry.dtype}{named and f' ({named})'}, which is not supported")
        if entry.dtype in SCALED_TYPES:
            return self._unknown(name) or self._scale_fault(name) or self._column_fault(name)
        if self._sibling(name, (PRE_QUANT,)):
            return Fault(f"have a {PRE_QUANT} and are not quantised")
        return self._unknown(name) if self.options(name) else None

    def age(self, name: str) -> int:
        """How new the layout of a quantised tensor is: 0 for KJ's `scale_weight`, 2 for comfy_quant."""
        if self.options(name):
            return len(SCALES)
        scale = self.scale(name)
        return 0 if scale is None else SCALES.index(scale.rpartition(".")[2])

    def _unknown(self, name: str) -> Fault | None:
        """A sibling or an option whose meaning is not known."""
        entry, options = self.file.entries[name], self.options(name)
        form = options.get("format")
        if BROKEN in options:
            return Fault(f"have a {COMFY} that is {BROKEN}")
        if form is not None and (not isinstance(form, str) or FORMATS.get(form) != entry.dtype):
            return Fault(f"have the type {entry.dtype} and the format {shown(form)}, which is not supported")
        unknown = sorted(set(options) - {"format", *OPTIONS})
        if unknown:
            return Fault(f"have the option {shown(unknown[0])} in {COMFY}, which is not known")
        others = sorted(set(self._siblings.get(_layer(name), ())) - set(KNOWN))
        if others and _layer(name) != name:
            return Fault(
                f"are {_spoken(entry.dtype)} with a tensor {shown(others[0])} beside them, which is not known"
            )
        if options.get(ROTATED, False) is not False:
            group, columns = options.get("convrot_groupsize", GROUP), entry.shape[-1] if entry.shape else 0
            if options[ROTATED] is not True or not isinstance(group, int):
                return Fault(f"have an option {ROTATED} that makes no sense")
            if entry.dtype in FP8_TYPES:
                return Fault(f"are FP8 with {ROTATED}, which is known for int8 only")
            if group not in ROTATIONS or len(entry.shape) != 2 or columns % group:
                return Fault(f"have rotated groups of {shown(group)} columns, which do not divide them")
        return None

    def _scale_fault(self, name: str) -> Fault | None:
        entry, stored = self.file.entries[name], self.scale(name)
        if stored is None:
            if self.scaled or entry.dtype == "I8":
                return Fault(f"are {_spoken(entry.dtype)} without a scale")
            return None
        scale, per_row = self.file.entries[stored], (entry.shape[:1], (*entry.shape[:1], 1))
        if scale.dtype in (*FLOAT_TYPES, *FP8_TYPES) and scale.shape in ((), (1,), (1, 1), *per_row):
            values = self.file.read(stored).astype(np.float32)
            wrong = values[~((values > 0) & np.isfinite(values))]
            return Fault("have a scale that is no positive number", f"{wrong[0]:g}") if wrong.size else None
        named = self._format(name)
        return Fault(
            f"have scales per block{named and f' ({named})'}, which are not supported",
            f"{scale.dtype} {list(scale.shape)}",
        )

    def _column_fault(self, name: str) -> Fault | None:
        factors = self._sibling(name, (PRE_QUANT,))
        if factors is None:
            return None
        entry, factor = self.file.entries[name], self.file.entries[factors]
        if factor.dtype not in FLOAT_TYPES or len(entry.shape) != 2 or factor.shape != entry.shape[1:]:
            return Fault(f"have a {PRE_QUANT} of another shape", f"{factor.dtype} {list(factor.shape)}")
        values = self.file.read(factors).astype(np.float32)
        return None if np.isfinite(values).all() else Fault(f"have a {PRE_QUANT} that is not finite")

    def _sibling(self, name: str, lasts: Iterable[str]) -> str | None:
        layer = _layer(name)
        return next((f"{layer}.{x}" for x in lasts if x in self._siblings.get(layer, ())), None)

    def _format(self, name: str) -> str:
        """The name of a format that is not read, or nothing."""
        if form := self.options(name).get("format"):
            return shown(form)
        entry, stored = self.file.entries[name], self.scale(name)
        if stored is None:
            return ""
        scale = self.file.entries[stored]
        if f"{stored}_2" in self.file.entries:
            return "nvfp4"
        if scale.dtype in ("U8", "F8_E8M0"):
            return "mxfp8"
        return "musubi tuner's" if len(scale.shape) == 3 and entry.dtype in FP8_TYPES else ""

    def _descriptions(self) -> dict[str, Mapping[str, object]]:
        """By layer, the options of comfy_quant; those of `params` inside it are the layer's too."""
        found: dict[str, object] = {}
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            layers = json.loads(str(self.file.metadata["_quantization_metadata"]))["layers"]
            for layer in self._siblings if isinstance(layers, dict) else ():
                plain = layer.removeprefix("model.").removeprefix("diffusion_model.")
                if (options := layers.get(layer, layers.get(plain))) is not None:
                    found[layer] = options
        for layer, lasts in self._siblings.items():
            if COMFY in lasts:
                found[layer] = None
                entry = self.file.entries[f"{layer}.{COMFY}"]
                if entry.stop - entry.start > LONGEST:
                    continue
                with suppress(ValueError, KeyError, RecursionError):
                    found[layer] = json.loads(self.file.read(f"{layer}.{COMFY}").tobytes())
        return {layer: _options(described) for layer, described in found.items()}


def _options(described: object) -> Mapping[str, object]:
    if not isinstance(described, dict):
        return {BROKEN: True}
    inner = described.get("params", {})
    if not isinstance(inner, dict):
        return described
    return {key: value for key, value in described.items() if key != "params"} | inner


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _spoken(dtype: str) -> str:
    return "FP8" if dtype in FP8_TYPES else "int8"
