"""Names the other model in a file that was given or found as a part of this one.

Signatures are tensors that ComfyUI, diffusers or the model's own code tell them by. The first row that fits
counts. A file is matched by the ends of its names, so that prefixes do not matter.
"""

from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]

# Parts of names, anywhere. An adapter has the names of the model that it is for, so these come first.
ADAPTERS = (
    ("a Stand-In adapter", ("q_loras.down", "_loras.down.weight")),
    (
        "a LoRA",
        (".lora_A", ".lora_B", ".lora_down", ".lora_up", ".lokr_w", ".hada_w", "_lora.down", ".lora.down"),
    ),
    ("a Lynx adapter", (".ip_adapter.to_k_ip", ".ref_adapter.to_k_ref")),
    ("a UniAnimate adapter", ("dwpose_embedding.",)),
    ("an IP-Adapter", ("ip_adapter.1.to_k_ip", "image_proj.")),
    ("the camera control Uni3C", ("controlnet_patch_embedding.weight",)),
    (
        "a ControlNet",
        ("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_blocks."),
    ),
)
WAN = ("head.modulation", "condition_embedder.time_proj.weight")
WAN_PATCH, WAN_PATCH_SHAPE = "patch_embedding.weight", 5
WAN_VARIANTS = (
    ("Wan VACE", ("vace_patch_embedding.", "vace_blocks.")),
    ("Wan2.2 S2V", ("casual_audio_encoder.",)),
    ("HuMo", ("audio_proj.audio_proj_glob",)),
    ("Wan Fun Camera", ("control_adapter.conv.",)),
    ("SCAIL-2", ("patch_embedding_mask.",)),
    ("SCAIL", ("patch_embedding_pose.",)),
    ("WanDancer", ("patch_embedding_global.",)),
    ("Wan-Animate-2", ("blocks.0.block.",)),
    ("Wan2.1 FLF2V", ("img_emb.emb_pos",)),
    ("Wan2.2-Animate without its motion encoder", ("pose_patch_embedding.",)),
)
IMAGE_EMBEDDER = ("img_emb.proj.", "condition_embedder.image_embedder.")
WIDTHS = {1536: "1.3B", 3072: "5B", 5120: "14B"}
OTHERS = (
    ("FLUX.2", ("double_stream_modulation_img.lin.",)),
    ("FLUX", ("double_blocks.0.img_attn.norm.key_norm.scale", "single_transformer_blocks.0.proj_mlp.")),
    ("HunyuanVideo", ("txt_in.individual_token_refiner.",)),
    ("LTX-Video", ("patchify_proj.weight",)),
    ("Qwen-Image", ("txt_norm.weight",)),
    ("Z-Image or Lumina", ("cap_embedder.1.weight",)),
    ("Stable Diffusion 3", ("joint_blocks.0.",)),
    ("SDXL", ("conditioner.embedders.1.", "label_emb.0.0.weight", "add_embedding.linear_1.weight")),
    ("Stable Diffusion 1 or 2", ("input_blocks.0.0.weight", "down_blocks.0.attentions.0.")),
    (
        "the VAE of Wan2.2 5B",
        ("decoder.upsamples.0.upsamples.0.", "decoder.up_blocks.0.upsampler.time_conv."),
    ),
    ("a VAE of images", ("decoder.up.0.block.0.", "decoder.mid_block.attentions.0.group_norm.")),
    ("SAM2", ("sam_mask_decoder.", "mask_decoder.output_hypernetworks_mlps.")),
    ("an upscaler", ("RDB1.conv1.", "body.0.rdb1.conv1.", "residual_group.blocks.0.")),
    ("a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.", "enc.blk.0.attn_q.")),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.", "transformer.resblocks.0.attn.in_proj_weight")),
    ("a language model", ("model.layers.0.self_attn.q_proj.", "model.layers.0.self_attn.qkv_proj.")),
)


def other_model(shapes: Shapes) -> str:
    """The model or adapter that a file holds, for a sentence; nothing if it is not known."""
    text = "\n".join(("", *shapes))
    for said, signs in ADAPTERS:
        if any(sign in text for sign in signs):
            return said
    if any(f"{sign}\n" in f"{text}\n" for sign in WAN):
        return _wan(text, shapes)
    return next((said for said, signs in OTHERS if _holds(text, signs)), "")


def _wan(text: str, shapes: Shapes) -> str:
    patch = next((s for n, s in shapes.items() if _is(n, WAN_PATCH) and len(s) == WAN_PATCH_SHAPE), None)
    size = f" {WIDTHS[patch[0]]}" if patch is not None and patch[0] in WIDTHS else ""
    for said, signs in WAN_VARIANTS:
        if _holds(text, signs):
            return f"{said}{size}"
    if patch is None:
        return "a Wan transformer"
    image = any(sign in text for sign in IMAGE_EMBEDDER)
    channels = patch[1]
    if channels == 48 and patch[0] == 3072:
        return "Wan2.2 TI2V 5B"
    if channels == 16:
        return f"Wan T2V{size}"
    if channels == 36:
        return f"Wan2.1 I2V{size}, or Wan-Animate-2 with the same tensors" if image else f"Wan2.2 I2V{size}"
    return f"a Wan transformer{size} of {channels} input channels"


def _holds(text: str, signs: Iterable[str]) -> bool:
    """Whether a name begins with a sign, behind any prefix."""
    return any(f"\n{sign}" in text or f".{sign}" in text for sign in signs)


def _is(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
