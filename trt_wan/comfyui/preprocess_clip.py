"""TrtWan Preprocess: from a picture and a video of a person to the clips that drive the character."""

from typing import Any

from comfy_api.latest import io

from trt_wan.comfyui.asking import CATEGORY, MOST_SIZE, ask, told
from trt_wan.comfyui.messages import Preprocess
from trt_wan.comfyui.model_files import detection_files, detection_path
from trt_wan.comfyui.process import Process
from trt_wan.comfyui.tensors import shared, tensor
from trt_wan.runtime.events import StageProgress

NONE, OFF = "none", "off"


class PreprocessClip(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        networks = [NONE, *detection_files()]
        return io.Schema(
            node_id="TrtWanPreprocess",
            display_name="TrtWan Preprocess",
            category=CATEGORY,
            description="Makes the clips that drive the character from any video of a person.",
            inputs=[
                io.Image.Input("reference_image"),
                io.Image.Input("driving_video"),
                io.Combo.Input(
                    "mode",
                    options=["animate", "replace"],
                    tooltip="animate: the picture moves as the person does. replace: the person in the video "
                    "is replaced; background_video and character_mask are made for this mode alone.",
                ),
                io.Int.Input("width", default=832, min=16, max=MOST_SIZE, step=16),
                io.Int.Input("height", default=480, min=16, max=MOST_SIZE, step=16),
                io.Float.Input(
                    "fps", default=30.0, min=1.0, max=1000.0, step=0.01, tooltip="Of driving_video."
                ),
                io.Int.Input(
                    "person", default=0, min=0, max=1000, tooltip="From left to right; 0: the largest."
                ),
                io.Int.Input(
                    "point_x", default=-1, min=-1, max=MOST_SIZE, tooltip="A pixel on the person; -1: none."
                ),
                io.Int.Input("point_y", default=-1, min=-1, max=MOST_SIZE),
                io.Combo.Input(
                    "retarget",
                    options=[OFF, "safe", "official"],
                    tooltip="Fits the poses to the body of the character.",
                ),
                io.Int.Input(
                    "grow", default=-1, min=-1, max=512, tooltip="Pixels around the person; -1: the default."
                ),
                io.Combo.Input(
                    "detector",
                    options=networks,
                    optional=True,
                    tooltip="YOLO as .onnx; without it MediaPipe finds one person.",
                ),
                io.Combo.Input("pose", options=networks, optional=True, tooltip="ViTPose as .onnx."),
                io.Combo.Input("sam2", options=networks, optional=True, tooltip="For the mask of replace."),
                io.Combo.Input("segmenter", options=["auto", "sam2", "mediapipe", "box"], optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="pose_video"),
                io.Image.Output(display_name="face_video"),
                io.Image.Output(display_name="background_video"),
                io.Mask.Output(display_name="character_mask"),
            ],
        )

    @classmethod
    def execute(
        cls,
        reference_image: Any,
        driving_video: Any,
        mode: str,
        width: int,
        height: int,
        fps: float,
        person: int,
        point_x: int,
        point_y: int,
        retarget: str,
        grow: int,
        segmenter: str = "auto",
        **networks: str,
    ) -> io.NodeOutput:
        with told(), shared({"image": reference_image[:1], "driving_video": driving_video}) as media:
            options: dict[str, Any] = {"segmenter": segmenter}
            options |= {name: detection_path(file) for name, file in networks.items() if file != NONE}
            options |= {} if retarget == OFF else {"retarget": retarget}
            request = Preprocess(
                media,
                mode,
                (width, height),
                fps,
                options,
                person or None,
                None if min(point_x, point_y) < 0 else (point_x, point_y),
                None if grow < 0 else grow,
            )
            with Process(grace=0) as process:
                made = ask(process, request, StageProgress)
            names = ("pose_video", "face_video", "background_video", "mask_video")
            return io.NodeOutput(
                *(tensor(made[name], reference_image) if name in made else None for name in names)
            )
