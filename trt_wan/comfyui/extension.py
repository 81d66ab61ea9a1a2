"""The extension that ComfyUI loads."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from trt_wan.comfyui.animate import AnimateCharacter
from trt_wan.comfyui.build_engines import BuildEngines
from trt_wan.comfyui.load_model import LoadModel
from trt_wan.comfyui.model_files import DETECTION
from trt_wan.comfyui.preprocess_clip import PreprocessClip


class Extension(ComfyExtension):  # type: ignore[misc]
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, PreprocessClip, AnimateCharacter, BuildEngines]


def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI, once."""
    for name in DETECTION:
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    return Extension()
