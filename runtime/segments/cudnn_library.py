"""cuDNN through nvidia-cudnn-frontend, without torch: the module, and one handle per Gpu on its stream."""

import ctypes
import weakref
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trt_wan.errors import EnvironmentBroken, with_commands
from trt_wan.install import install_command
from trt_wan.runtime.device.gpu import Gpu

FRONTEND = "nvidia-cudnn-frontend"


class Handle:
    """A cuDNN handle on the compute stream. Raises EnvironmentBroken where cuDNN does not start."""

    def __init__(self, gpu: Gpu) -> None:
        cudnn = load()
        try:
            self.handle = cudnn.create_handle()
        except RuntimeError as error:
            raise EnvironmentBroken(
                f"cuDNN does not start ({error}).", with_commands("Run:", "pip install -U nvidia-cudnn-cu13")
            ) from error
        weakref.finalize(self, cudnn.destroy_handle, self.handle).atexit = False
        cudnn.set_stream(self.handle, gpu.handle)


def handle(gpu: Gpu) -> Any:
    return gpu.once(Handle, lambda: Handle(gpu)).handle


def load() -> Any:
    """The frontend's module, bound to cuDNN's library.

    The frontend looks in the interpreter's site-packages, then asks the loader, which knows libraries that
    are loaded already. So the library is loaded first: pip may have put nvidia-cudnn-cu13 into any folder.
    """
    spec = find_spec("nvidia.cudnn") if find_spec("nvidia") else None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        library = Path(folder) / "lib" / "libcudnn.so.9"
        if library.exists():
            ctypes.CDLL(str(library))
    try:
        import cudnn
    except ImportError as error:
        raise EnvironmentBroken(
            f"cuDNN does not load ({error}).", with_commands("Run:", install_command("hopper"))
        ) from error
    return cudnn


def missing() -> str | None:
    """Why cuDNN cannot be used, in a sentence; None if it can. Imports nothing."""
    try:
        distribution(FRONTEND)
    except PackageNotFoundError:
        return f"cuDNN needs {FRONTEND}, not installed here (the extra hopper)."
    return None
