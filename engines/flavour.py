"""The two flavours of TensorRT, and the choice between them.

`tensorrt_rtx` (1.6, 1.7) compiles on any machine for any RTX GPU, `tensorrt` (10.13 to 11) only for the GPU
of this machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from trt_wan.engines.gpu import DATA_CENTRE, HOPPER, Capability
from trt_wan.errors import EnvironmentBroken, UsageError, with_commands
from trt_wan.install import install_command

FlavourName = Literal["tensorrt", "tensorrt_rtx"]
Progress = Callable[[str, int, int], None]  # TensorRT's name of the phase, steps done, steps in all


@dataclass(frozen=True)
class Flavour:
    name: FlavourName
    version: str
    module: Any
    reason: str  # why this one, for people; kept with its engines


@dataclass(frozen=True)
class FlavourRow:
    extra: str  # the extra of trt-wan that installs it
    oldest: tuple[int, int]


FLAVOURS: dict[FlavourName, FlavourRow] = {
    "tensorrt": FlavourRow("tensorrt", (10, 13)),
    "tensorrt_rtx": FlavourRow("rtx", (1, 6)),
}


def choose_flavour(forced: str | None, capability: Capability | None) -> Flavour:
    """The flavour for a GPU of this compute capability, or, for None, for engines of other GPUs.

    Raises UsageError for an unknown flavour, EnvironmentBroken if no installed one works here.
    """
    order: tuple[FlavourName, ...] = ("tensorrt_rtx", "tensorrt")
    if capability is None:
        why = "it builds without a GPU"
    elif capability in DATA_CENTRE:
        order, why = ("tensorrt", "tensorrt_rtx"), "its kernels are tuned for data-centre GPUs"
    else:
        why = "it is made for RTX GPUs and builds in seconds"
    if forced is not None:
        order, why = tuple(name for name in FLAVOURS if name == forced), "it was asked for"
        if not order:
            raise UsageError(f"There is no flavour {forced!r}.", f"Use one of: {', '.join(FLAVOURS)}.")

    problems: list[str] = []
    for name in order:
        module = _load(name, capability, problems)
        if module is not None:
            reason = "; ".join([*problems, "" if problems else why]).removesuffix("; ")
            if name == "tensorrt_rtx" and capability == HOPPER:
                reason += "; compute capability 9.0 is not on its list, but it runs there"
            return Flavour(name, module.__version__, module, reason)
    hopper = capability == HOPPER  # the extra rtx would take a release that refuses it
    command = "pip install 'tensorrt-rtx>=1.6,<1.7'" if hopper else install_command(FLAVOURS[order[0]].extra)
    raise EnvironmentBroken(
        f"No TensorRT can be used here: {'; '.join(problems)}.", with_commands("Run:", command)
    )


def _load(name: FlavourName, capability: Capability | None, problems: list[str]) -> Any:
    """The module, or None and one problem more."""
    if name == "tensorrt" and capability is None:
        problems.append("tensorrt builds only for a GPU of this machine")
        return None
    try:
        module = import_module(name)
    except Exception as error:  # a missing library, or one for another CUDA, raises any class
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problems.append(f"{name} is not installed" if missing else f"{name} does not load ({error})")
        return None
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < FLAVOURS[name].oldest:
        oldest = ".".join(map(str, FLAVOURS[name].oldest))
        problems.append(f"{name} {module.__version__} is older than {oldest}")
        return None
    if name == "tensorrt_rtx" and capability == HOPPER and version >= (1, 7):
        problems.append(f"{name} {module.__version__} refuses compute capability 9.0")
        return None
    return module
