"""Writes the folder `trt-wan` into a ComfyUI's custom_nodes. It imports the package, which has to be in
ComfyUI's Python.
"""

import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from trt_wan import __version__
from trt_wan.errors import OutputError, UsageError

PACK = Path(__file__).parent / "pack"
NAME = "trt-wan"
UNUSED = ".disabled"  # ComfyUI loads no folder with such a name
# Where a ComfyUI keeps its own Python: a virtual environment, or the one of the portable version for Windows.
PYTHONS = (
    *("venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe", ".venv/Scripts/python.exe"),
    "../python_embeded/python.exe",
)


def install(comfyui: Path) -> Path:
    """Writes the folder and returns it; our older one is replaced. Raises UsageError for a folder
    without ComfyUI, and OutputError.
    """
    nodes = comfyui / "custom_nodes"
    if not (nodes.is_dir() and ((comfyui / "folder_paths.py").exists() or (comfyui / "models").is_dir())):
        raise UsageError(
            f"{comfyui} is no ComfyUI: it needs the folders custom_nodes and models.",
            "Name the folder that has ComfyUI's main.py, or the one of --base-directory.",
        )
    target = nodes / NAME
    if target.exists() and not _is_ours(target):
        raise UsageError(f"{target} is there and is not ours.", "Move it away first.")
    try:
        for left in nodes.glob(f".{NAME}-*{UNUSED}"):  # by a killed process
            shutil.rmtree(left)
        making = Path(tempfile.mkdtemp(prefix=f".{NAME}-", suffix=UNUSED, dir=nodes))
        try:
            _write(making / "new")
            if target.exists():
                target.replace(making / "old")
            (making / "new").replace(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written ({error.strerror}).", "Check the disk and its rights."
        ) from error
    return target


def own_python(comfyui: Path) -> Path | None:
    """The Python in ComfyUI's folder, if it has one that cannot import this version of trt_wan."""
    for name in PYTHONS:
        python = comfyui / name
        if python.exists():
            code = "import trt_wan; print(trt_wan.__version__)"
            command = [str(python), "-P", "-c", code]
            try:
                ran = subprocess.run(command, capture_output=True, text=True, cwd=comfyui.anchor or None)
            except OSError:  # it is for another system
                return python
            return None if ran.stdout.strip() == __version__ else python
    return None


def _write(folder: Path) -> None:
    shutil.copytree(PACK, folder, ignore=shutil.ignore_patterns("__pycache__"))
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace('"0.0.0"', f'"{__version__}"'))


def _is_ours(folder: Path) -> bool:
    return bool(_publisher(folder) == _publisher(PACK))


def _publisher(folder: Path) -> Any:
    try:
        return tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["comfy"]["PublisherId"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
