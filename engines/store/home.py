"""The folder that holds everything trt-wan keeps on disk: see folders.py."""

import os
from pathlib import Path


def home() -> Path:
    """`TRT_WAN_HOME`, or the user's cache folder."""
    if chosen := os.environ.get("TRT_WAN_HOME"):
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("trt-wan")
