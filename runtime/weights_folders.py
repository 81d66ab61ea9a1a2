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

VARIABLE = "TRT_WAN_WEIGHTS"
EXTRA_PATHS = "extra_model_paths.yaml"
# ComfyUI's kinds of models that are ours, with the older names.
KINDS = (
    *("diffusion_models", "unet", "text_encoders", "clip", "clip_vision", "vae", "loras", "checkpoints"),
    *("detection", "sam2", "sams"),
)
BASE, DEFAULT = "base_path", "is_default"


def searched_folders(named: Sequence[Path]) -> tuple[Path, ...]:
    """`named`, which win; else the folders that need no naming and exist. Raises WeightsError."""
    folders = tuple(named)
    if not folders:
        listed = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
        folders = tuple(Path(folder).expanduser() for folder in listed)
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

    A section maps kinds of models to folders, several of them on lines of one text; `base_path` stands before
    relative ones. Without sections the kinds stand at the top. Raises WeightsError if it is no YAML.
    """
    file = comfy / EXTRA_PATHS
    if not file.is_file():
        return []
    import yaml

    try:
        described = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WeightsError(
            f"{file} cannot be read ({type(error).__name__}).", "Mend it, or name the folders with --weights."
        ) from error
    sections = _sections(described)
    sections.sort(key=lambda section: section.get(DEFAULT) is not True)  # stable
    folders = [folder for section in sections for folder in _folders(section, comfy)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _sections(described: Any) -> list[Mapping[str, Any]]:
    if not isinstance(described, dict):
        return []
    nested: list[Mapping[str, Any]] = [value for value in described.values() if isinstance(value, dict)]
    flat = {key: value for key, value in described.items() if isinstance(value, str | bool)}
    return [flat, *nested] if any(kind in flat for kind in KINDS) else nested


def _folders(section: Mapping[str, Any], comfy: Path) -> Iterator[Path]:
    base = comfy
    if isinstance(named := section.get(BASE), str):
        base = comfy / Path(os.path.expandvars(named)).expanduser()
    for kind in KINDS:
        if isinstance(lines := section.get(kind), str):
            for line in filter(None, map(str.strip, lines.splitlines())):
                yield base / Path(os.path.expandvars(line)).expanduser()
