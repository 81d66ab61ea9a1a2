"""The graphs, written in torch to be exported: plain functions of the tensors a contract names.

Each takes the contract's inputs in order, then `w` (the contract's weights by name), the model and the plan.
It returns the contract's outputs in order. `GRAPHS` pairs the graphs with the contracts by name.
"""

from collections.abc import Callable

from torch import Tensor

from trt_wan.build.models import block, embed, face, head, image_encoder, lynx, text_encoder, uni3c, vae

GRAPHS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "text_encoder_layer": text_encoder.layer,
    "image_encoder_embed": image_encoder.embed,
    "image_encoder_layer": image_encoder.layer,
    "vae_encode_first": vae.encode_first,
    "vae_encode_next": vae.encode_next,
    "text_embed": embed.text_embed,
    "image_embed": embed.image_embed,
    "context_kv": block.context_kv,
    "motion_encoder": face.motion_encoder,
    "face_encoder": face.face_encoder,
    "fuser_kv": face.fuser_kv,
    "time_embed": embed.time_embed,
    "patch_embed": embed.patch_embed,
    "attn_in": block.attn_in,
    "attention": block.attention,
    "sparse_attention": block.sparse_attention,
    "attn_out": block.attn_out,
    "cross_attention": block.cross_attention,
    "cross_attention_nag": block.cross_attention_nag,
    "ffn": block.ffn,
    "fuser": face.fuser,
    "head": head.head,
    "vae_decode_first": vae.decode_first,
    "vae_decode_next": vae.decode_next,
    "uni3c_modulation": uni3c.modulation,
    "uni3c_patch": uni3c.patch,
    "uni3c_in": uni3c.block_in,
    "uni3c_attention": block.attention,
    "uni3c_out": uni3c.block_out,
    "uni3c_add": uni3c.add,
    "lynx_resampler": lynx.resampler,
    "lynx_ip_kv": lynx.ip_kv,
    "lynx_ip_norm": lynx.ip_norm,
    "lynx_ip": lynx.ip,
    "lynx_face_encode": lynx.face_encode,
    "lynx_face_embed": lynx.face_embed,
    "lynx_features": lynx.features,
    "lynx_ref_kv": lynx.ref_kv,
    "lynx_ref_norm": lynx.ref_norm,
    "lynx_ref": lynx.ref,
}
