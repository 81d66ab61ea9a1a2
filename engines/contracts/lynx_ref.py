"""The ref adapter: from a face picture to keys and values, and the attention to them (addons_spec.md 2.4).

The features of block b are the modulated input of its self-attention, in one forward of the transformer on
the picture's latent. That forward uses the block's own networks, at the size of a `FacePlan`.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, linear
from trt_wan.engines.contracts import vae_layers
from trt_wan.engines.lynx import FacePlan, LynxPlan


def encode(model: ModelConfig, plan: FacePlan) -> Network:
    """The picture's latent, drawn from the encoder's distribution: mean + deviation·noise."""
    latent = (model.vae.latent_channels, 1, plan.latent_height, plan.latent_width)
    layers = vae_layers.encoder(model.vae)
    return Network(
        name="lynx_face_encode",
        part="vae",
        inputs=(Tensor("frames", (3, 1, plan.height, plan.width)), Tensor("noise", latent)),
        weights=tuple(weight for layer in layers for weight in vae_layers.weights(layer, first=True)),
        outputs=(Tensor("latent", latent),),
    )


def embed(model: ModelConfig, plan: FacePlan) -> Network:
    """The latent's tokens. The channels of mask and condition are 0."""
    t = model.transformer
    return Network(
        name="lynx_face_embed",
        part="transformer",
        inputs=(Tensor("latent", (t.latent_channels, 1, plan.latent_height, plan.latent_width)),),
        weights=(
            Tensor("patch_embedding.weight", (t.dim, t.latent_channels + t.condition_channels, 1, 2, 2)),
            Tensor("patch_embedding.bias", (t.dim,)),
        ),
        outputs=(Tensor("x", (plan.tokens, t.dim)),),
    )


def features(model: ModelConfig, plan: FacePlan) -> Network:
    """The input of a block's self-attention: normed and modulated."""
    t, tokens = model.transformer, (plan.tokens, model.transformer.dim)
    return Network(
        name="lynx_features",
        part="transformer",
        scope="blocks.{n}.",
        repeats=t.layers,
        inputs=(Tensor("x", tokens), Tensor("time_modulation", (6, t.dim))),
        weights=(Tensor("modulation", (1, 6, t.dim)),),
        outputs=(Tensor("features", tokens),),
    )


def kv(model: ModelConfig, plan: FacePlan) -> Network:
    """Keys before their norm, and values."""
    t, tokens = model.transformer, (plan.tokens, model.transformer.dim)
    return Network(
        name="lynx_ref_kv",
        part="lynx_ref",
        scope="{n}.",
        repeats=t.layers,
        inputs=(Tensor("features", tokens),),
        weights=(*linear("to_k_ref", t.dim, t.dim), *linear("to_v_ref", t.dim, t.dim)),
        outputs=(
            Tensor("ref_keys", tokens),
            Tensor("ref_v", (t.heads, plan.tokens, t.head_dim), "activation"),
        ),
    )


def norm(model: ModelConfig, plan: FacePlan) -> Network:
    """Finishes the keys, with the norm of the block's own keys and without RoPE."""
    t = model.transformer
    return Network(
        name="lynx_ref_norm",
        part="transformer",
        scope="blocks.{n}.self_attn.",
        repeats=t.layers,
        inputs=(Tensor("ref_keys", (plan.tokens, t.dim)),),
        weights=(Tensor("norm_k.weight", (t.dim,)),),
        outputs=(Tensor("ref_k", (t.heads, plan.tokens, t.head_dim), "activation"),),
    )


def attention(model: ModelConfig, plan: LynxPlan) -> Network:
    """Adds the attention to the face to the result of self-attention. The queries are those of `attn_in`;
    the tables undo their rotation.
    """
    t, tokens = model.transformer, (plan.tokens, model.transformer.dim)
    heads, table = (t.heads, FacePlan().tokens, t.head_dim), (plan.tokens, t.head_dim // 2)
    return Network(
        name="lynx_ref",
        part="transformer",
        inputs=(
            Tensor("q", (t.heads, plan.tokens, t.head_dim), "activation"),
            Tensor("rope_cos", table),
            Tensor("rope_sin", table),
            Tensor("attended", tokens, "activation"),
            Tensor("ref_k", heads, "activation"),
            Tensor("ref_v", heads, "activation"),
            Tensor("ref_scale", (1,)),
        ),
        weights=(),
        outputs=(Tensor("attended_out", tokens, "activation"),),
        optional=True,
    )
