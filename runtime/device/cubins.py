"""Code of kernels, kept on disk: NVRTC takes a second or more for ours, in every process that needs them.

    $TRT_WAN_HOME/kernels/cubin/<key>.cubin     sha256 of the code, 32 bytes, then the code

The key covers everything that decides the code: source, macros, architecture, and the NVRTC library itself. A
file that was cut or edited is made again. What cannot be written is compiled every time.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from trt_wan.engines.store.files import keep
from trt_wan.engines.store.home import home

DIGEST = 32  # bytes of a sha256


def folder() -> Path:
    return home() / "kernels" / "cubin"


def kept(origin: Iterable[str], compile: Callable[[], bytes]) -> bytes:
    """What `compile` makes of `origin`, or has made of it before with the same NVRTC."""
    compiler = _compiler()
    if compiler is None:
        return compile()
    key = hashlib.sha256("\0".join((*origin, *compiler)).encode()).hexdigest()[:32]
    path = folder() / f"{key}.cubin"
    with suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]:
            return data[DIGEST:]
    code = compile()
    keep(path, hashlib.sha256(code).digest() + code)
    return code


def _compiler() -> tuple[str, ...] | None:
    """Which NVRTC compiles here, by its file: a release that differs in code need not in its version. None if
    the file is not known.
    """
    from cuda.pathfinder import load_nvidia_dynamic_lib

    library = load_nvidia_dynamic_lib("nvrtc").abs_path
    if library is None:
        return None
    status = os.stat(library)
    return os.path.realpath(library), str(status.st_size), str(status.st_mtime_ns)
