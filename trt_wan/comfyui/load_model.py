"""TrtWan Load Model: the files, precision and memory of a model."""

from typing import Any

from comfy_api.latest import io

from trt_wan.comfyui.asking import CATEGORY, ChosenModel, TrtWanModel, told
from trt_wan.comfyui.messages import ModelChoice, Open
from trt_wan.comfyui.model_files import LORAS, PARTS, files_in, folders, path_of, stamps
from trt_wan.runtime.presets import PRESETS
from trt_wan.runtime.published.files import FAST4

AUTOMATIC, NONE = "automatic", "none"
TINY = "tiny, of random weights (for trying)"
SLOTS = range(1, 4)  # for LoRAs


class LoadModel(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types for us
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrtWanLoadModel",
            display_name="TrtWan Load Model",
            category=CATEGORY,
            description="Chooses Wan2.2-Animate's files. The model is opened in a process of its own and "
            "stays open between runs.",
            inputs=[
                io.Combo.Input(
                    name, options=[AUTOMATIC, *([TINY] if part == "transformer" else []), *files_in(folder)]
                )
                for name, (part, folder) in PARTS.items()
            ]
            + [
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, NONE],
                    default=FAST4,
                    tooltip="Settings of the steps, and their LoRAs, which are found in the lora folder.",
                )
            ]
            + [
                made
                for k in SLOTS
                for made in (
                    io.Combo.Input(f"lora_{k}", options=[NONE, *files_in(LORAS)], optional=True),
                    io.Float.Input(
                        f"lora_{k}_strength", default=1.0, min=-100.0, max=100.0, step=0.05, optional=True
                    ),
                )
            ]
            + [
                io.Combo.Input(
                    "precision",
                    options=[AUTOMATIC, "fp8", "int8", "bf16", "fp32"],
                    optional=True,
                    tooltip="automatic: fp8 where the GPU has it, else bf16; fp32 on the CPU.",
                ),
                io.Combo.Input(
                    "tier",
                    options=["exact", "fast", "turbo"],
                    optional=True,
                    tooltip="fast: attention in 8 bits, on a GPU; turbo: also only to the blocks of keys "
                    "that weigh most.",
                ),
                io.Float.Input(
                    "vram",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="GB of GPU memory to use at most; 0: all that is free.",
                ),
                io.Float.Input(
                    "attention_keep",
                    default=0.5,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    optional=True,
                    tooltip="turbo: the share of the blocks of keys that attention takes exactly.",
                ),
                io.Int.Input(
                    "gpus",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="GPUs that share each video, a process each.",
                ),
            ],
            outputs=[TrtWanModel.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        precision: str = AUTOMATIC,
        tier: str = "exact",
        attention_keep: float = 0.5,
        vram: float = 0.0,
        gpus: int = 1,
        **files: Any,
    ) -> io.NodeOutput:
        with told():
            random = "tiny" if files["diffusion_model"] == TINY else None
            named = {PARTS[name]: files[name] for name in PARTS if files[name] not in (AUTOMATIC, TINY)}
            loras = [(files.get(f"lora_{k}", NONE), files.get(f"lora_{k}_strength", 1.0)) for k in SLOTS]
            settings: dict[str, Any] = {"tier": tier, "gpus": gpus}
            settings |= {"attention_keep": attention_keep} if tier == "turbo" else {}
            settings |= {} if precision == AUTOMATIC else {"precision": precision}
            settings |= {"vram": vram} if vram else {}
            choice = ModelChoice(
                folders=() if random else folders(),
                files={part: path_of(folder, file) for (part, folder), file in named.items()},
                random=random,
                settings=settings,
                preset="" if preset == NONE else preset,
                loras=tuple((path_of(LORAS, file), strength) for file, strength in loras if file != NONE),
            )
            model = ChosenModel(choice, preset)
            model.ask(Open(choice))
            return io.NodeOutput(model)

    @classmethod
    def fingerprint_inputs(cls, **chosen: Any) -> Any:
        """Changes with the files in the model folders; then the node runs again."""
        return repr(stamps())
