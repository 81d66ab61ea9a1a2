"""The folders that are searched for weights: the named ones, else those of TRT_WAN_WEIGHTS, else those that
`trt-wan pull` has made in the cache of huggingface_hub. A ComfyUI adds the folders of its
extra_model_paths.yaml.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trt_wan.errors import WeightsError
from trt_wan.runtime.published.files import FILES
from trt_wan.runtime.published.places import hub_cache
from trt_wan.runtime.weights.find_files import require_folders

VARIABLE = "TRT_WAN_WEIGHTS"
EXTRA_PATHS = "extra_model_paths.yaml"
# ComfyUI's kinds of models that are ours, with the older names.
KINDS = (
    *("diffusion_models", "unet", "text_encoders", "clip", "clip_vision", "vae", "loras", "checkpoints"),
    *("detection", "sam2", "sams", "controlnet", "model_patches"),
)
BASE, DEFAULT = "base_path", "is_default"
LARGEST = 1 << 20  # bytes of the file


def searched_folders(named: Sequence[Path]) -> tuple[Path, ...]:
    """`named`, which win; else the folders that need no naming and exist. Raises WeightsError."""
    folders = tuple(named)
    if not folders:
        listed = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
        folders = tuple(Path(os.path.expanduser(folder)) for folder in listed)
        require_folders(folders, VARIABLE)
    if not folders:
        folders = pulled_folders()
    places = (
        place for folder in folders for place in (folder, folder.parent)[: 1 + (folder.name == "models")]
    )
    extra = (path for place in places for path in comfy_extra_folders(place))
    return tuple(dict.fromkeys((*folders, *extra)))


def pulled_folders() -> tuple[Path, ...]:
    """The snapshots of the published repositories in the cache, each newest one; never the whole cache, which
    has the files of other programs.
    """
    found: dict[Path, None] = {}
    for file in FILES:
        if (path := hub_cache().find(file)) is not None:
            depth = file.path.count("/")
            found[path.parents[depth]] = None
    return tuple(found)


def comfy_extra_folders(comfy: Path) -> list[Path]:
    """The folders with models of extra_model_paths.yaml in a ComfyUI, those of `is_default` first.

    A section maps kinds of models to folders, several of them on lines of one text or in a list; `base_path`
    stands before relative ones. Without sections the kinds stand at the top. Raises WeightsError for a file
    that is no such YAML.
    """
    file = comfy / EXTRA_PATHS
    if not file.is_file():
        return []
    described = _parsed(file)
    if not isinstance(described, dict | None):
        raise _refused(file, "holds no sections with names")
    sections = _sections(described or {})
    sections.sort(key=lambda section: section.get(DEFAULT) is not True)  # stable
    folders = [folder for section in sections for folder in _folders(section, comfy)]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def _parsed(file: Path) -> Any:
    import yaml

    try:
        if file.stat().st_size > LARGEST:
            raise _refused(file, f"has more than {LARGEST >> 20} MB")
        return yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = type(error).__name__
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            why = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise _refused(file, f"cannot be read ({why})") from error


def _refused(file: Path, fault: str) -> WeightsError:
    return WeightsError(f"{file} {fault}.", "Mend it, or move it away and name the folders with --weights.")


def _sections(described: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    nested: list[Mapping[str, Any]] = [value for value in described.values() if isinstance(value, dict)]
    flat = {key: value for key, value in described.items() if isinstance(value, str | bool | list)}
    return [flat, *nested] if any(kind in flat for kind in KINDS) else nested


def _folders(section: Mapping[str, Any], comfy: Path) -> Iterator[Path]:
    base = comfy
    if isinstance(named := section.get(BASE), str):
        base = comfy / _expanded(named.strip())
    for kind in KINDS:
        lines = section.get(kind)
        texts = lines if isinstance(lines, list) else [lines]
        for text in texts:
            for line in filter(None, map(str.strip, text.splitlines() if isinstance(text, str) else ())):
                yield base / _expanded(line)


def _expanded(path: str) -> str:
    """Path.expanduser raises for a user who does not exist."""
    return os.path.expanduser(os.path.expandvars(path))
