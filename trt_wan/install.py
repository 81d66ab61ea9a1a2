"""The command that installs an extra's packages, for the way in which this trt-wan was installed.

The name trt-wan is not on PyPI: `pip install 'trt-wan[rtx]'` would install a stranger's package. An
installation from a folder, a file or a git repository is told its own place again (PEP 610). Any other one is
told the extra's packages, from its metadata.
"""

import json
import shlex
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "trt-wan"


def install_command(extra: str, python: Path | None = None) -> str:
    """A shell command, on one line. `extra` is a key of [project.optional-dependencies] in pyproject.toml.
    With `python` the command installs trt-wan itself too, into another Python than this one.
    """
    pip = ["pip"] if python is None else [str(python), "-m", "pip"]
    try:
        installed = distribution(NAME)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return shlex.join([*pip, "install", "-e", f"{Path(__file__).parents[1]}[{extra}]"])
    has_uv = (installed.read_text("INSTALLER") or "").strip() == "uv"
    tool = ["uv", "pip"] if has_uv and python is None else pip
    where = _where(installed, extra) or _packages(installed, extra)
    return shlex.join([*tool, "install", *where])


def _where(installed: Distribution, extra: str) -> list[str]:
    """The arguments that name the place again, or nothing where it is not known or has gone."""
    try:
        origin: dict[str, Any] = json.loads(installed.read_text("direct_url.json") or "{}")
        url = origin.get("url", "")
        if url.startswith("file:"):
            path = url2pathname(urlsplit(url).path)
            editable = ["-e"] if origin.get("dir_info", {}).get("editable") else []
            return [*editable, f"{path}[{extra}]"] if Path(path).exists() else []
        if vcs := origin.get("vcs_info"):
            url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        return [f"{NAME}[{extra}] @ {url}{folder}"] if url else []
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def _packages(installed: Distribution, extra: str) -> list[str]:
    """The requirements of the extra that hold on this machine, such as tensorrt-rtx<1.8,>=1.6."""
    from packaging.requirements import Requirement

    found = []
    for line in installed.requires or []:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            found.append(str(requirement))
    return found
