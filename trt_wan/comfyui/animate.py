"""TrtWan Animate: the video."""

from typing import Any

from comfy_api.latest import io

from trt_wan.api.names import RENAMED
from trt_wan.comfyui.asking import CATEGORY, MODEL, ChosenModel, TrtWanModel, told
from trt_wan.comfyui.messages import Animate
from trt_wan.comfyui.tensors import shared, tensor
from trt_wan.runtime.context.settings import SCHEDULES, Context
from trt_wan.runtime.events import StepDone
from trt_wan.runtime.presets import RECIPE_FIELDS, Recipe
from trt_wan.runtime.prompts import DEFAULT_NEGATIVE_PROMPT, DEFAULT_PROMPT
from trt_wan.runtime.references import MOST, USES, References
from trt_wan.runtime.sampling.samplers import SAMPLERS

OFF, AS_PRESET = "off", "as the preset"
COLOUR_MATCHES = ("mkl", "hm", "reinhard", "mvgd", "hm-mvgd-hm", "hm-mkl-hm")  # runtime/colour_transfer.py
MOST_SEED = 2**64 - 1
MOST_FRAMES = 10_000


class AnimateCharacter(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrtWanAnimate",
            display_name="TrtWan Animate",
            category=CATEGORY,
            description="Makes the video, as large and as long as its clips. 0 is the preset's number.",
            inputs=[
                TrtWanModel.Input("model"),
                io.Image.Input("reference_image"),
                io.Image.Input("pose_video", optional=True),
                io.Image.Input("face_video", optional=True),
                io.Image.Input(
                    "background_video",
                    optional=True,
                    tooltip="With character_mask: the person in it is replaced.",
                ),
                io.Mask.Input("character_mask", optional=True),
                io.String.Input("prompt", default=DEFAULT_PROMPT, multiline=True),
                io.String.Input(
                    "negative_prompt",
                    default=DEFAULT_NEGATIVE_PROMPT,
                    multiline=True,
                    tooltip="Read where guidance is above 1.",
                ),
                io.Int.Input("seed", default=0, min=0, max=MOST_SEED, control_after_generate=True),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="0: as the preset."),
                io.Float.Input(
                    "guidance", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="0: as the preset."
                ),
                io.Combo.Input("sampler", options=[AS_PRESET, *SAMPLERS]),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="0: as the preset."
                ),
                io.Int.Input(
                    "window", default=0, min=0, max=MOST_FRAMES, tooltip="Frames, 4k+1; 0: as the preset."
                ),
                io.Int.Input(
                    "overlap",
                    default=0,
                    min=0,
                    max=MOST_FRAMES,
                    tooltip="Frames from one window to the next, 4k+1; 0: as the preset.",
                ),
                io.Float.Input("pose_strength", default=1.0, min=0.0, max=10.0, step=0.05),
                io.Float.Input("face_strength", default=1.0, min=0.0, max=10.0, step=0.05),
                io.Combo.Input(
                    "context",
                    options=[OFF, *SCHEDULES],
                    optional=True,
                    tooltip="Denoises a long video in parts that overlap. With window, each window.",
                ),
                io.Int.Input("context_frames", default=77, min=5, max=MOST_FRAMES, step=4, optional=True),
                io.Int.Input("context_overlap", default=16, min=4, max=MOST_FRAMES, step=4, optional=True),
                io.Combo.Input(
                    "colour_match",
                    options=[OFF, *COLOUR_MATCHES],
                    optional=True,
                    tooltip="Keeps colours from drifting from window to window.",
                ),
                io.Boolean.Input(
                    "keep_open",
                    default=True,
                    optional=True,
                    tooltip="Off: the model is closed after each run, and its GPU memory is free for other "
                    "nodes.",
                ),
                # Saved workflows have the widgets' values in their order: new ones come last.
                io.Image.Input(
                    "more_references",
                    optional=True,
                    tooltip=f"Up to {MOST - 1} other pictures of the character, as a batch.",
                ),
                io.Combo.Input(
                    "references_as",
                    options=list(USES),
                    optional=True,
                    tooltip="With more_references. " + "; ".join(f"{use}: {USES[use]}" for use in USES) + ".",
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(
        cls,
        model: ChosenModel,
        reference_image: Any,
        pose_video: Any = None,
        face_video: Any = None,
        background_video: Any = None,
        character_mask: Any = None,
        colour_match: str = OFF,
        more_references: Any = None,
        references_as: str = References.use,
        keep_open: bool = True,
        **widgets: Any,
    ) -> io.NodeOutput:
        media = {
            "image": reference_image[:1],
            "pose_video": pose_video,
            "face_video": face_video,
            "background_video": background_video,
            "mask_video": character_mask,
            "reference_images": more_references,
        }
        replace = background_video is not None or character_mask is not None
        with told(), shared(media) as frames:
            settings = _settings(model.recipe, **widgets) | {"mode": "replace" if replace else "animate"}
            if more_references is not None:
                settings["reference_as"] = references_as
            colour = None if colour_match == OFF else colour_match
            try:
                pixels = model.ask(Animate(model.choice, frames, settings, colour), StepDone)
            finally:
                if not keep_open:
                    MODEL.close()
            return io.NodeOutput(tensor(pixels, reference_image))


def _settings(
    recipe: Recipe,
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    pose_strength: float,
    face_strength: float,
    sampler: str,
    context: str = OFF,
    context_frames: int = 77,
    context_overlap: int = 16,
    **numbers: float,
) -> dict[str, Any]:
    """Arguments of `AnimatePipeline.__call__`. `numbers` of 0 are those of the recipe."""
    chosen = {name: getattr(recipe, name) for name in RECIPE_FIELDS}
    chosen |= {} if sampler == AS_PRESET else {"sampler": sampler}
    if context != OFF and not numbers["window"]:
        chosen |= {"window": Recipe.window, "overlap": Recipe.overlap}  # context windows have no others
    chosen |= {name: value for name, value in numbers.items() if value}
    diffusers = {ours: name for name, ours in RENAMED.items()}
    settings = {diffusers.get(name, name): value for name, value in chosen.items()}
    if context != OFF:
        whole = not numbers["window"]
        settings["context"] = Context(context, context_frames, overlap=context_overlap, whole=whole)  # type: ignore[arg-type]  # it checks
    return settings | {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "generator": seed,
        "pose_strength": pose_strength,
        "face_strength": face_strength,
    }
