"""The files in ComfyUI's model folders."""

from pathlib import Path

import folder_paths

from trt_wan.engines.store.files import stamp
from trt_wan.errors import UsageError

# By input: the part of the model, and ComfyUI's folder of its files.
PARTS = {
    "diffusion_model": ("transformer", "diffusion_models"),
    "vae": ("vae", "vae"),
    "text_encoder": ("text_encoder", "text_encoders"),
    "clip_vision": ("image_encoder", "clip_vision"),
}
LORAS = "loras"
FOLDERS = (*(folder for _, folder in PARTS.values()), LORAS)
DETECTION = ("detection", "sam2")  # where `trt-wan pull --into` puts them


def files_in(folder: str) -> list[str]:
    return list(folder_paths.get_filename_list(folder))


def path_of(folder: str, file: str) -> Path:
    found = folder_paths.get_full_path(folder, file)
    if found is None:
        raise UsageError(f"There is no file {file} in ComfyUI's folder {folder}.", "Choose another file.")
    return Path(found)


def folders() -> tuple[Path, ...]:
    """All folders that may have the model's files and LoRAs."""
    named = (Path(path) for folder in FOLDERS for path in folder_paths.get_folder_paths(folder))
    return tuple(path for path in named if path.is_dir())


def stamps() -> list[tuple[str, int, int]]:
    """Path, size and time of change of every file of which the model may consist."""
    found = {folder_paths.get_full_path(folder, file) for folder in FOLDERS for file in files_in(folder)}
    return sorted((path, *stamp(Path(path))) for path in found if path is not None)


def detection_files() -> list[str]:
    return [f"{folder}/{file}" for folder in DETECTION for file in files_in(folder)]


def detection_path(file: str) -> Path:
    folder, _, name = file.partition("/")
    return path_of(folder, name)
