"""What full TensorRT measured of kernels while it built, kept for its next build: $TRT_WAN_HOME/timings.

A cache is bound to a GPU and a version of TensorRT, which refuses any other; then the build starts with an
empty one. TensorRT-RTX measures nothing while it builds.
"""

from pathlib import Path
from typing import Any

from trt_wan.engines.store import files
from trt_wan.engines.store.home import home


def _file(version: str) -> Path:
    return home() / "timings" / f"{version}.timings"


def attach(config: Any, version: str) -> None:
    """Gives the builder's `config` the timings of earlier builds."""
    try:
        known = _file(version).read_bytes()
    except FileNotFoundError:
        known = b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep(config: Any, version: str) -> None:
    """Writes the timings that `config` has after a build; of two at once the last one stays."""
    files.keep(_file(version), bytes(config.get_timing_cache().serialize()))
