"""Attention by our kernels and by libraries other than TensorRT.

Each has a module, imported only when it is chosen. Every provider is a `Segment` for the network `attention`,
or for `sparse_attention`. q, k and v are bf16 [heads, tokens, head_dim]. q is already multiplied by
head_dim^-0.5, so the softmax takes the scores unscaled. `attended` is bf16 [tokens, heads * head_dim]. Only
`flash4` needs torch. `trt-wan build` measures their speed and error.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, cast

from trt_wan.errors import EnvironmentBroken, UsageError, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.cudnn_library import FRONTEND
from trt_wan.runtime.segments.segment import Segment

Capability = tuple[int, int]


@dataclass(frozen=True)
class Provider:
    module: str  # in this package
    segment: str  # a class of the module: (gpu, heads, tokens, head_dim) -> Segment
    packages: tuple[str, ...]  # names on PyPI
    oldest: Capability
    newest: Capability
    head_dims: range
    to_rows: bool = False  # whether it computes the network's variant "to rows" (contracts/attention.py)
    queries: int = 128  # in a tile, of which a multiprocessor takes one at a time


ANY_NEWER: Capability = (99, 9)
HOPPER: Capability = (9, 0)

PROVIDERS = {
    "native": Provider("hopper", "Native", (), HOPPER, HOPPER, range(128, 129), True),
    "native int8": Provider("hopper", "NativeInt8", (), HOPPER, HOPPER, range(128, 129), True),
    "native fp8": Provider("hopper", "NativeFp8", (), HOPPER, HOPPER, range(128, 129), True, 192),
    "cudnn": Provider("cudnn", "Cudnn", (FRONTEND,), (8, 0), ANY_NEWER, range(8, 129, 8)),
    "cudnn fp8": Provider("cudnn", "CudnnFp8", (FRONTEND,), (9, 0), ANY_NEWER, range(16, 129, 16)),
    "native sparse": Provider("sparse", "Sparse", (), (9, 0), (9, 0), range(128, 129)),
    "flash4": Provider("flash", "Flash4", ("flash-attn-4", "torch"), (8, 0), ANY_NEWER, range(8, 129, 8)),
}


def missing(name: str, capability: Capability) -> str | None:
    """Why provider `name` cannot be used on such a GPU, in one sentence. None if it can.

    Looks for installed packages without importing them. Raises UsageError for an unknown provider.
    """
    provider = _provider(name)
    if not provider.oldest <= capability <= provider.newest:
        wanted = "{}.{}".format(*provider.oldest)
        wanted += "" if provider.newest == provider.oldest else " or newer"
        return (
            f"{name} needs a GPU of compute capability {wanted}"
            f" and this one has {capability[0]}.{capability[1]}: choose another attention."
        )
    absent = [package for package in provider.packages if not _installed(package)]
    if absent:
        return f"{name} needs {' and '.join(absent)}, not installed here (the extra hopper)."
    return None


def open_attention(name: str, gpu: Gpu, heads: int, tokens: int, head_dim: int, *blocks: Any) -> Segment:
    """Provider `name` for one shape, with its kernels chosen and compiled. For block-sparse attention
    `blocks` are the order of the tokens, and the number of the reference's (select.py).

    Raises UsageError for an unknown name or shape, EnvironmentBroken if it cannot be used here.
    """
    provider = _provider(name)
    if head_dim not in provider.head_dims:
        raise UsageError(f"{name} cannot do heads of {head_dim} channels.", "Choose another attention.")
    problem = missing(name, gpu.capability)
    if problem is not None:
        raise EnvironmentBroken(problem, with_commands("Run:", install_command("hopper")))
    try:
        module = import_module(f"{__name__}.{provider.module}")
    except ImportError as error:  # packages that do not fit each other
        raise EnvironmentBroken(
            f"{name} does not load ({error}).", with_commands("Run:", install_command("hopper"))
        ) from error
    return cast(Segment, getattr(module, provider.segment)(gpu, heads, tokens, head_dim, *blocks))


def _provider(name: str) -> Provider:
    if name not in PROVIDERS:
        raise UsageError(f"There is no attention {name!r}.", f"Use one of: {', '.join(PROVIDERS)}.")
    return PROVIDERS[name]


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
