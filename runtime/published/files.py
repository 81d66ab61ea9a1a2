"""The published files that make up a complete set: the one table of `trt-wan pull`, `doctor` and the README.

Sizes and SHA-256 are those of model_spec.md 5 and 6.1 and of the files' own pages on the Hub; an unknown one
is left out, and the Hub's own is checked instead. A file whose SHA-256 is known may come from `main`: other
bytes under its name are refused.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

KIJAI, KIJAI_FP8 = "Kijai/WanVideo_comfy", "Kijai/WanVideo_comfy_fp8_scaled"
COMFY_21, COMFY_22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
FAST4, UNIPC4, QUALITY20 = "fast4", "unipc4", "quality20"
KIJAI4, NATIVE4, NATIVE8 = "kijai4", "native4", "native8"
# Sets beside the presets. Of Lynx's files only the sizes of the tensors are known: 4.2, 0.34 and 4.2 GB.
CAMERA, LYNX = "camera", "lynx"
EXTRAS = {CAMERA: "the camera control Uni3C (run --camera)", LYNX: "the identity adapters (run --identity)"}
LYNX_LICENCE = "not stated; Lynx's code Apache-2.0"
ALL = (FAST4, UNIPC4, KIJAI4, NATIVE4, NATIVE8, QUALITY20)
FEW_STEPS = (FAST4, UNIPC4, KIJAI4, NATIVE4, NATIVE8)


@dataclass(frozen=True)
class PublishedFile:
    part: str  # a Part, a LoRA, or a network of the preprocessing
    repository: str
    path: str  # in the repository
    folder: str  # below ComfyUI's models/
    size: int | None  # bytes
    sha256: str
    presets: tuple[str, ...]
    licence: str = ""  # as the repository states it; "" where it states none
    revision: str = "main"

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


FILES = (
    PublishedFile(
        "transformer",
        KIJAI_FP8,
        "Wan22Animate/Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors",
        "diffusion_models",
        18_401_760_586,
        "2936b31473a967e7a429a6646bba60e7862d0938e178b58b2a140f391dd5b8e6",
        FEW_STEPS,
        "Apache-2.0",
    ),
    PublishedFile(
        "transformer",
        COMFY_22,
        "split_files/diffusion_models/wan2.2_animate_14B_bf16.safetensors",
        "diffusion_models",
        34_549_787_368,
        "",
        (QUALITY20,),
    ),
    PublishedFile(
        "vae",
        COMFY_21,
        "split_files/vae/wan_2.1_vae.safetensors",
        "vae",
        253_815_318,
        "2fc39d31359a4b0a64f55876d8ff7fa8d780956ae2cb13463b0223e15148976b",
        ALL,
    ),
    PublishedFile(  # has its tokenizer inside
        "text_encoder",
        COMFY_21,
        "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "text_encoders",
        6_735_906_897,
        "c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68",
        ALL,
    ),
    PublishedFile(
        "image_encoder",
        COMFY_21,
        "split_files/clip_vision/clip_vision_h.safetensors",
        "clip_vision",
        1_264_219_396,
        "64a7ef761bfccbadbaa3da77366aac4185a6c58fa5de5f589b42a65bcc21f161",
        ALL,
    ),
    PublishedFile(
        "distill LoRA",
        KIJAI,
        "Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors",
        "loras",
        738_005_744,
        "85c4a61c30e0497aa44b91d93a893b624708461a56fe5485183b28fa07e2dfb3",
        FEW_STEPS,
    ),
    PublishedFile(
        "relight LoRA",
        KIJAI,
        "LoRAs/Wan22_relight/WanAnimate_relight_lora_fp16.safetensors",
        "loras",
        1_436_672_440,
        "fc646c74c73f4b251f5fd9bc440ef21b03b27305f499966c68b2b3aa31498561",
        (FAST4, KIJAI4, NATIVE4, NATIVE8, QUALITY20),
    ),
    PublishedFile(  # YOLOv10's own licence is AGPL-3.0
        "detector",
        "Wan-AI/Wan2.2-Animate-14B",
        "process_checkpoint/det/yolov10m.onnx",
        "detection",
        61_659_339,
        "89b526498a6d55f869a6ab52e3a2eb20ad45b3711c1f7de3dd9ca0b399dfd6d7",
        ALL,
        "Apache-2.0; YOLOv10 itself AGPL-3.0",
    ),
    PublishedFile(
        "pose",
        "Kijai/vitpose_comfy",
        "onnx/vitpose_h_wholebody_model.onnx",
        "detection",
        420_252,
        "f21466cd6c93d0066782ad5923c14a4e6569133def212dc2895c73596c2e553b",
        ALL,
        revision="ae68f4e542151cebec0995b8469c70b07b8c3df4",
    ),
    PublishedFile(  # the weights of the ONNX file above, which finds them by this name beside it
        "pose",
        "Kijai/vitpose_comfy",
        "onnx/vitpose_h_wholebody_data.bin",
        "detection",
        2_548_958_740,
        "f6a9e7cb3a87ed65a098b096029e70150408acfafc3d695019a66b289d7719e1",
        ALL,
        revision="ae68f4e542151cebec0995b8469c70b07b8c3df4",
    ),
    PublishedFile(
        "sam2",
        "Kijai/sam2-safetensors",
        "sam2.1_hiera_base_plus.safetensors",
        "sam2",
        None,
        "eb4b5f725c8b68205aa05bbe6b27efc628b18b4b9c7b9bb8218991b86b9a4932",
        ALL,
        "Apache-2.0",
    ),
    PublishedFile(  # Uni3C; about 2 GB
        "camera_control",
        KIJAI,
        "Wan21_Uni3C_controlnet_fp16.safetensors",
        "controlnet",
        None,
        "",
        (CAMERA,),
    ),
    *(
        PublishedFile(part, KIJAI, f"Lynx/{name}", "diffusion_models", None, "", (LYNX,), LYNX_LICENCE)
        for part, name in (
            ("lynx_ip", "Wan2_1-T2V-14B-Lynx_full_ip_layers_fp16.safetensors"),
            ("lynx_resampler", "lynx_full_resampler_fp32.safetensors"),
            ("lynx_ref", "Wan2_1-T2V-14B-Lynx_full_ref_layers_fp16.safetensors"),
        )
    ),
)


def files_of(preset: str) -> tuple[PublishedFile, ...]:
    return tuple(file for file in FILES if preset in file.presets)


def spoken_size(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
