"""The candidates for a network's place on a GPU: one row each. A network without rows has one engine.

A candidate is a TensorRT engine (perhaps for another target, or by another recipe than the network's graph),
our kernels, or an attention library. choose.py picks one; runtime/opening/segments.py opens it and knows
whether its library is installed.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import HOPPER, Capability, GpuKind, Target
from trt_wan.engines.precision import PRECISIONS, Precision
from trt_wan.errors import UsageError

Tier = Literal["exact", "fast", "turbo"]
TIERS: tuple[Tier, ...] = get_args(Tier)  # each may use the candidates of those before it
Maker = Literal["engine", "native", "attention"]  # TensorRT, runtime/native, runtime/attention

ATTENTION_FP8 = "attention_fp8"  # the recipe of the contract `attention`, computed in FP8


@dataclass(frozen=True)
class Machine:
    """The GPU of this machine, and its TensorRT."""

    gpu: GpuKind
    capability: Capability
    flavour: Flavour

    @property
    def version(self) -> str:
        return f"{self.flavour.name} {self.flavour.version}"


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine: the name of its recipe, and the target it is built for."""

    recipe: str
    target: Target = "current"

    @property
    def title(self) -> str:
        return self.recipe if self.target == "current" else f"{self.recipe} {self.target}"


@dataclass(frozen=True)
class Candidate:
    network: str
    name: str  # for users, who read and write it
    precisions: tuple[Precision, ...]
    tier: Tier = "exact"  # the lowest that may use it
    maker: Maker = "engine"
    engine: Engine | None = None  # set if the maker is "engine", and only then
    on_request: bool = False  # measured, but taken only if it is asked for

    def __post_init__(self) -> None:
        assert (self.maker == "engine") == (self.engine is not None), self


ALL: tuple[Precision, ...] = tuple(PRECISIONS)
BF16: tuple[Precision, ...] = ("bf16", "fp8", "int8")  # q, k, v and the fusers' weights are bf16
FP8: tuple[Precision, ...] = ("fp8",)
INT8: tuple[Precision, ...] = ("int8",)

VAE = ("vae_encode_first", "vae_encode_next", "vae_decode_first", "vae_decode_next")

CANDIDATES = (
    Candidate("attn_in", "tensorrt", ALL, engine=Engine("attn_in")),
    Candidate("attn_in", "native", FP8, maker="native"),
    Candidate("attn_in", "native int8", INT8, maker="native"),
    Candidate("attention", "tensorrt", ALL, engine=Engine("attention")),
    Candidate("attention", "tensorrt sm89", ALL, engine=Engine("attention", "sm89")),
    Candidate("attention", "native", BF16, maker="attention"),
    Candidate("attention", "cudnn", BF16, maker="attention"),
    # It imports torch and compiles itself at every start: 14 s on an H200, which it saves in 60 steps.
    Candidate("attention", "flash4", BF16, maker="attention", on_request=True),
    Candidate("attention", "tensorrt fp8", FP8, "fast", engine=Engine(ATTENTION_FP8)),
    Candidate("attention", "cudnn fp8", FP8, "fast", maker="attention"),
    # int8 scores; their weighted values in bf16, or in E4M3.
    Candidate("attention", "native int8", FP8, "fast", maker="attention"),
    Candidate("attention", "native fp8", FP8, "fast", maker="attention"),
    Candidate("sparse_attention", "native sparse", FP8, "turbo", maker="attention"),
    Candidate("attn_out", "tensorrt", ALL, engine=Engine("attn_out")),
    Candidate("attn_out", "native", FP8, maker="native"),
    Candidate("attn_out", "native int8", INT8, maker="native"),
    Candidate("cross_attention", "tensorrt", ALL, engine=Engine("cross_attention")),
    Candidate("cross_attention", "native", FP8 + INT8, maker="native"),
    Candidate("ffn", "tensorrt", ALL, engine=Engine("ffn")),
    Candidate("ffn", "native", FP8, maker="native"),
    Candidate("ffn", "native int8", INT8, maker="native"),
    *(Candidate(name, "tensorrt", ALL, engine=Engine(name)) for name in VAE),
    *(Candidate(name, made, BF16, maker="native") for name in VAE for made in ("cudnn", "native")),
    Candidate("fuser", "tensorrt", ALL, engine=Engine("fuser")),
    Candidate("fuser", "native", BF16, maker="native"),
    Candidate("fuser", "native fp8", FP8, "fast", maker="native"),
    # 16 heads of 64 channels; our own kernels have 128.
    Candidate("uni3c_attention", "tensorrt", ALL, engine=Engine("uni3c_attention")),
    Candidate("uni3c_attention", "tensorrt sm89", ALL, engine=Engine("uni3c_attention", "sm89")),
    Candidate("uni3c_attention", "cudnn", BF16, maker="attention"),
)
SEGMENTS = tuple(dict.fromkeys(candidate.network for candidate in CANDIDATES))
SPARSE = next(row for row in CANDIDATES if row.tier == "turbo")

# GPUs that may gain by an engine for a named target, for attention only: on Hopper TensorRT-RTX's engine for
# SM89 beats the one for the GPU itself (docs/log.md). On SM89 both are the same engine.
GUESTS: dict[Target, tuple[Capability, ...]] = {"sm89": (HOPPER,)}


@dataclass(frozen=True)
class Default:
    """The order of trying candidates where they were not measured."""

    network: str
    capability: Capability | None  # None: every other one
    exact: tuple[str, ...]
    fast: tuple[str, ...]


# The H200's figures are in docs/log.md. TensorRT-RTX cannot build bf16 attention for it at full size: it asks
# for 68 GB, the whole score matrix.
_HOPPER_ATTENTION = ("native", "cudnn", "tensorrt sm89", "tensorrt")
_NATIVE = ("native", "tensorrt")
_VAE = ("native", "cudnn", "tensorrt")
_BLOCK = ("attn_in", "attn_out", "cross_attention", "ffn")
DEFAULTS = (
    Default("attention", HOPPER, _HOPPER_ATTENTION, ("native fp8", "tensorrt fp8", *_HOPPER_ATTENTION)),
    Default("attention", None, ("tensorrt",), ("tensorrt fp8", "tensorrt")),
    Default("uni3c_attention", HOPPER, _HOPPER_ATTENTION[1:], _HOPPER_ATTENTION[1:]),
    Default("uni3c_attention", None, ("tensorrt",), ("tensorrt",)),
    Default("sparse_attention", None, (), ("native sparse",)),
    *(Default(name, HOPPER, _NATIVE, _NATIVE) for name in _BLOCK),
    *(Default(name, HOPPER, _VAE, _VAE) for name in VAE),
    Default("fuser", HOPPER, _NATIVE, ("native fp8", *_NATIVE)),
    *(Default(name, None, ("tensorrt",), ("tensorrt",)) for name in (*_BLOCK, *VAE, "fuser")),
)


def candidates(network: str, precision: Precision, machine: Machine) -> tuple[Candidate, ...]:
    """The candidates of all tiers that the machine and the precision allow."""
    rows = [row for row in CANDIDATES if row.network == network]
    if not rows:
        return (Candidate(network, "tensorrt", ALL, engine=Engine(network)),)
    return tuple(row for row in rows if precision in row.precisions and _fits(row, machine))


def _fits(candidate: Candidate, machine: Machine) -> bool:
    if candidate.engine is None or candidate.engine.target == "current":
        return True
    built_elsewhere = machine.flavour.name == "tensorrt_rtx"  # the other flavour knows no targets
    return built_elsewhere and machine.capability in GUESTS[candidate.engine.target]


def default_order(network: str, tier: Tier, capability: Capability) -> tuple[str, ...]:
    """Names of candidates; a machine may lack some of them."""
    if network not in SEGMENTS:
        return ("tensorrt",)
    rows = [row for row in DEFAULTS if row.network == network]
    row = next(row for row in rows if row.capability in (capability, None))
    return row.exact if tier == "exact" else row.fast


def tiers(precision: Precision) -> tuple[Tier, ...]:
    """The tiers of a precision: 8-bit attention goes with 8-bit linear layers."""
    return TIERS if PRECISIONS[precision].fp8 else ("exact",)


def may_use(tier: Tier, lowest: str) -> bool:
    """Whether a tier may use a candidate whose lowest tier that is."""
    return lowest in TIERS[: TIERS.index(tier) + 1]


def has_engine(network: str) -> bool:
    """Whether TensorRT computes the network anywhere; a build compiles no others."""
    rows = [row for row in CANDIDATES if row.network == network]
    return not rows or any(row.maker == "engine" for row in rows)


def require_known(network: str, name: str) -> None:
    """Raises UsageError with the known names if there is no such row."""
    if network not in SEGMENTS:
        raise UsageError(
            f"There is no choice for a network called {network!r}.", f"Use one of: {', '.join(SEGMENTS)}."
        )
    names = [row.name for row in CANDIDATES if row.network == network]
    if name not in names:
        raise UsageError(f"{network} has no candidate called {name!r}.", f"Use one of: {', '.join(names)}.")
