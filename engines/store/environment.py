"""The environment variables that trt-wan reads, checked before a command does anything."""

import os
from pathlib import Path

from trt_wan.engines.store.home import home
from trt_wan.errors import UsageError

DEFAULT_LIMIT_GB = 4.0
KNOWN = ("TRT_WAN_HOME", "TRT_WAN_WEIGHTS", "TRT_WAN_ENGINES_GB", "TRT_WAN_TOKEN", "TRT_WAN_TRACE")


def limit_bytes() -> float:
    """The room for engines and their kernels. Raises UsageError."""
    text = os.environ.get("TRT_WAN_ENGINES_GB", str(DEFAULT_LIMIT_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1
    if not 0 <= gigabytes < float("inf"):
        raise UsageError(f"TRT_WAN_ENGINES_GB is {text!r}, which is no size.", "Set it to GB, such as 4.")
    return gigabytes * 1e9


def check_environment() -> list[str]:
    """Returns the variables that begin with TRT_WAN_ and that trt-wan does not know. Raises UsageError for a
    value that cannot be used.
    """
    limit_bytes()
    there = next(path for path in (home(), *home().absolute().parents, Path.cwd()) if path.exists())
    if not there.is_dir():
        raise UsageError(
            f"TRT_WAN_HOME is {os.environ.get('TRT_WAN_HOME')!r}, and {there} is no folder.",
            "Set it to a folder; trt-wan makes it where it does not exist.",
        )
    return sorted(name for name in os.environ if name.startswith("TRT_WAN_") and name not in KNOWN)
