"""Layouts: how the checkpoints that people have name and cut the canonical tensors (engines/checkpoint.py).

One row per layout. A layout is known by its signature, a tensor that no other kind of file has; what stands
before the signature in the file is the prefix of the part (`model.diffusion_model.`,
`text_encoders.umt5xxl.transformer.`, …), and names without it belong to other parts of the file.

A stored tensor is renamed by all `renames` in order. Then it may be a piece of a canonical tensor (`joined`:
diffusers' to_k and to_v are the two halves of linear1_kv), or hold several of them (`split`: open-clip's
to_qkv), both along rows.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trt_wan.engines.checkpoint import DIRECTION, TOKEN_EMBEDDING
from trt_wan.engines.contract import Part
from trt_wan.engines.lynx import LITE_INTERVAL

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
Shapes = Mapping[str, tuple[int, ...]]

COMPILED = "_orig_mod."  # torch.compile's wrapper, anywhere in a name
EMBEDDED = "spiece_model"  # U8 bytes of a SentencePiece model, in ComfyUI's umT5 files
FUSER = re.compile(r"blocks\.(\d+)\.fuser_block\.")


@dataclass(frozen=True)
class Layout:
    part: Part
    name: str
    signature: str
    renames: tuple[Rename, ...] = ()
    joined: tuple[tuple[str, str, int], ...] = ()  # pattern, replacement, number of the piece
    split: tuple[tuple[str, tuple[str, ...]], ...] = ()
    alone: bool = False  # no other part, and so no prefix, is in such a file


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor lies: stored tensors joined along rows, or one of equal parts of one."""

    stored: tuple[str, ...]
    piece: int = 0
    pieces: int = 1


def _up(match: re.Match[str]) -> str:
    """diffusers groups the decoder's layers by resolution: three residual blocks and an upsampler each."""
    return f"decoder.upsamples.{4 * int(match[1]) + (int(match[3]) if match[2] == 'resnets' else 3)}."


TRANSFORMER_DIFFUSERS: tuple[Rename, ...] = (  # model_spec.md 5.3
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),  # norm3 there has no parameters
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"^(blocks\.\d+\.\w+_attn)\.to_([qkv])\.", r"\1.\2."),
    (r"^(blocks\.\d+\.\w+_attn)\.to_out\.0\.", r"\1.o."),
    (r"^(blocks\.\d+\.cross_attn)\.add_([kv])_proj\.", r"\1.\2_img."),
    (r"^(blocks\.\d+\.cross_attn)\.norm_added_k\.", r"\1.norm_k_img."),
    (r"^face_adapter\.(\d+)\.", r"face_adapter.fuser_blocks.\1."),
    (r"^(face_adapter\..*)\.to_q\.", r"\1.linear1_q."),
    (r"^(face_adapter\..*)\.to_out\.", r"\1.linear2."),
    (r"^(face_adapter\..*)\.norm_([qk])\.", r"\1.\2_norm."),
    (r"^face_encoder\.(conv1_local|conv2|conv3)\.", r"face_encoder.\1.conv."),
    (r"^motion_encoder\.conv_in\.weight$", "motion_encoder.enc.net_app.convs.0.0.weight"),
    (r"^motion_encoder\.conv_in\.act_fn\.bias$", "motion_encoder.enc.net_app.convs.0.1.bias"),
    (r"^motion_encoder\.conv_out\.", "motion_encoder.enc.net_app.convs.8."),
    (
        r"^motion_encoder\.res_blocks\.(\d+)\.",
        lambda match: f"motion_encoder.enc.net_app.convs.{int(match[1]) + 1}.",
    ),
    (r"^(motion_encoder\.enc\..*\.conv1)\.weight$", r"\1.0.weight"),
    (r"^(motion_encoder\.enc\..*\.conv1)\.act_fn\.bias$", r"\1.1.bias"),
    (r"^(motion_encoder\.enc\..*\.conv2)\.weight$", r"\1.1.weight"),
    (r"^(motion_encoder\.enc\..*\.conv2)\.act_fn\.bias$", r"\1.2.bias"),
    (r"^(motion_encoder\.enc\..*)\.conv_skip\.", r"\1.skip.1."),
    (r"^motion_encoder\.motion_network\.", "motion_encoder.enc.fc."),
    (r"^motion_encoder\.motion_synthesis_weight$", DIRECTION),
)

VAE_DIFFUSERS: tuple[Rename, ...] = (  # AutoencoderKLWan
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(\w+)\.conv_in\.", r"\1.conv1."),
    (r"^(\w+)\.norm_out\.", r"\1.head.0."),
    (r"^(\w+)\.conv_out\.", r"\1.head.2."),
    (r"^(\w+)\.mid_block\.attentions\.0\.", r"\1.middle.1."),
    (r"^(\w+)\.mid_block\.resnets\.(\d)\.", lambda match: f"{match[1]}.middle.{2 * int(match[2])}."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", _up),
    (r"\.norm1\.", ".residual.0."),
    (r"(samples\.\d+|middle\.\d)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(samples\.\d+|middle\.\d)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)

TEXT_OFFICIAL: tuple[Rename, ...] = (  # model_spec.md 5.4
    (r"^token_embedding\.", "shared."),
    (r"^norm\.weight$", "encoder.final_layer_norm.weight"),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)

TEXT_LLAMA: tuple[Rename, ...] = (  # llama.cpp's names of a T5 encoder, in GGUF files
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)

IMAGE_OPEN_CLIP: tuple[Rename, ...] = (
    (r"^cls_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^pos_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^patch_embedding\.", "vision_model.embeddings.patch_embedding."),
    (r"^pre_norm\.", "vision_model.pre_layrnorm."),
    (r"^post_norm\.", "vision_model.post_layernorm."),
    (r"^transformer\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"^(vision_model\.encoder\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision_model\.encoder\..*)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"^(vision_model\.encoder\..*)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(vision_model\.encoder\..*)\.mlp\.2\.", r"\1.mlp.fc2."),
)

# ComfyUI's own loader renames the attention's layers so.
CAMERA_COMFY: tuple[Rename, ...] = (
    (r"^(controlnet_blocks\.\d+\.self_attn)\.([qkv])\.", r"\1.to_\2."),
    (r"^(controlnet_blocks\.\d+\.self_attn)\.o\.", r"\1.to_out.0."),
)


def _lite(match: re.Match[str]) -> str:
    """Kijai numbers the adapters of the lite kind by their blocks, ByteDance from 0 on."""
    block = int(match[1])
    return match[0] if block % LITE_INTERVAL else f"{block // LITE_INTERVAL}."


LYNX_IP, LYNX_REF = r"^blocks\.(\d+)\.cross_attn\.ip_adapter\.", r"^blocks\.(\d+)\.self_attn\.ref_adapter\."

LAYOUTS = (
    Layout("transformer", "official names", DIRECTION),
    Layout(
        "transformer",
        "diffusers",
        "motion_encoder.motion_synthesis_weight",
        TRANSFORMER_DIFFUSERS,
        joined=(
            (r"^(face_adapter\..*)\.to_k\.", r"\1.linear1_kv.", 0),
            (r"^(face_adapter\..*)\.to_v\.", r"\1.linear1_kv.", 1),
        ),
    ),
    Layout("vae", "official names", "decoder.upsamples.0.residual.2.weight"),
    Layout("vae", "diffusers", "decoder.up_blocks.0.upsamplers.0.time_conv.weight", VAE_DIFFUSERS),
    # umT5 has a position bias in every block, the T5 of other models in block 0 only.
    Layout(
        "text_encoder",
        "Hugging Face",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        ((r"^encoder\.embed_tokens\.weight$", TOKEN_EMBEDDING),),
    ),
    Layout("text_encoder", "official names", "blocks.1.pos_embedding.embedding.weight", TEXT_OFFICIAL),
    Layout("text_encoder", "llama.cpp", "enc.blk.1.attn_rel_b.weight", TEXT_LLAMA),
    Layout("image_encoder", "Hugging Face", "vision_model.embeddings.class_embedding"),
    Layout(
        "image_encoder",
        "open-clip",
        "cls_embedding",
        IMAGE_OPEN_CLIP,
        split=(
            (
                r"^(vision_model\.encoder\..*)\.attn\.to_qkv\.",
                (r"\1.self_attn.q_proj.", r"\1.self_attn.k_proj.", r"\1.self_attn.v_proj."),
            ),
        ),
    ),
    Layout("camera_control", "Kijai's names", "controlnet_patch_embedding.weight", CAMERA_COMFY),
    # The full IP adapter has all tensors of the lite one, so it comes first.
    Layout(
        "lynx_ip",
        "Kijai, full",
        "blocks.0.cross_attn.ip_adapter.registers",
        ((LYNX_IP, r"\1."),),
        alone=True,
    ),
    Layout("lynx_ip", "ByteDance, full", "0.registers", alone=True),
    Layout(
        "lynx_ip",
        "Kijai, lite",
        "blocks.0.cross_attn.ip_adapter.to_k_ip.weight",
        ((LYNX_IP, _lite),),
        alone=True,
    ),
    Layout("lynx_ip", "ByteDance, lite", "0.to_k_ip.weight", alone=True),
    Layout(
        "lynx_ref",
        "Kijai",
        "blocks.0.self_attn.ref_adapter.to_k_ref.weight",
        ((LYNX_REF, r"\1."),),
        alone=True,
    ),
    Layout("lynx_ref", "ByteDance", "0.to_k_ref.weight", alone=True),
    Layout("lynx_resampler", "official names", "layers.0.0.to_kv.weight", alone=True),
)


def candidates(text: bytes) -> set[Part]:
    """The parts of which a file may hold a layout, by the text of its header (open_file.names_text)."""
    return {layout.part for layout in LAYOUTS if layout.signature.encode() in text}


def find_layout(names: Iterable[str], part: Part | None = None) -> tuple[Layout, str] | None:
    """The layout of a file, for `part` if it is given, and the prefix of its names; None if it has none."""
    known: dict[str, list[Layout]] = {}  # by the last word of the signature
    for layout in LAYOUTS:
        if part in (None, layout.part):
            known.setdefault(layout.signature.rpartition(".")[2], []).append(layout)
    found = []
    for name in names:
        plain = name.replace(COMPILED, "")
        for layout in known.get(plain.rpartition(".")[2], ()):
            prefix = plain.removesuffix(layout.signature)
            if prefix != plain and (not prefix or (prefix.endswith(".") and not layout.alone)):
                found.append((LAYOUTS.index(layout), prefix))
    if not found:
        return None
    index, prefix = min(found, key=lambda pair: (pair[0], len(pair[1])))
    return LAYOUTS[index], prefix


def places(names: Iterable[str], layout: Layout, prefix: str) -> dict[str, Place]:
    """Where each canonical tensor lies, and under their own names all other tensors of the part."""
    whole: dict[str, Place] = {}
    joined: dict[str, dict[int, str]] = {}
    stored = {plain: name for name in names if (plain := _plain(name, prefix)) is not None}
    for plain, name in _with_fusers(stored):
        renamed = plain
        for pattern, replacement in layout.renames:
            renamed = re.sub(pattern, replacement, renamed)
        for pattern, replacement, number in layout.joined:
            target, hits = re.subn(pattern, replacement, renamed)
            if hits:
                joined.setdefault(target, {})[number] = name
                break
        else:
            for pattern, targets in layout.split:
                if re.search(pattern, renamed):
                    for number, replacement in enumerate(targets):
                        whole[re.sub(pattern, replacement, renamed)] = Place((name,), number, len(targets))
                    break
            else:
                if renamed == plain or renamed not in stored:  # a name of its own is preferred to an alias
                    whole.setdefault(renamed, Place((name,)))
    for target, pieces in joined.items():
        if len(pieces) == 1 + max(pieces):
            whole[target] = Place(tuple(pieces[number] for number in sorted(pieces)))
    return whole


def _plain(name: str, prefix: str) -> str | None:
    """The name without the prefix; None for a tensor of another part."""
    plain = name.replace(COMPILED, "")
    if prefix and plain.rpartition(".")[2] == EMBEDDED:
        return EMBEDDED
    return plain.removeprefix(prefix) if plain.startswith(prefix) else None


def _with_fusers(stored: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Kijai's loader renames the fuser behind block b to `blocks.b.fuser_block`; some files keep that."""
    numbers = sorted({int(match[1]) for plain in stored if (match := FUSER.match(plain))})
    for plain, name in stored.items():
        if match := FUSER.match(plain):
            plain = f"face_adapter.fuser_blocks.{numbers.index(int(match[1]))}.{plain[match.end() :]}"
        yield plain, name


def same_but_ones(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes differ by dimensions of 1 only, as layouts do."""
    return [size for size in stored if size != 1] == [size for size in wanted if size != 1]
