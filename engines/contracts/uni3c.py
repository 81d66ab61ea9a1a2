"""Uni3C's networks (addons_spec.md 1.2): a small transformer beside the large one. It turns the noisy
latent and a render of the wanted camera path into a residual for each of the first blocks.

`uni3c_modulation` runs once per block for all steps of a job, the others in every step. `uni3c_add` is apart
from `uni3c_out` because both sides of the guidance add the same residuals: they share `features`,
[tokens, 1024], where the residuals themselves would be [tokens, 5120]. Attention is a separate network for
the same reason as the large one's: TensorRT-RTX cannot build it for Hopper at full size, other libraries can.

The mask and camera branch of the published file (controlnet_mask_embedding) is not run: ComfyUI and its
wrapper feed it nothing either.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, exact_linear, linear
from trt_wan.engines.shape import CameraPlan

BLOCK = "controlnet_blocks.{n}."
STEPS = 32  # that one call of `uni3c_modulation` takes: its weights, 2.5 GB in float32, pass once for all


def networks(model: ModelConfig, plan: CameraPlan) -> tuple[Network, ...]:
    u, c = model.camera, model.transformer
    z, x = (plan.tokens, u.dim), (plan.tokens, c.dim)
    heads = (u.heads, plan.tokens, u.head_dim)
    modulation = Tensor("modulation", (6, u.dim))
    video = (plan.slots, plan.latent_height, plan.latent_width)
    channels = 2 * c.latent_channels + 4
    eight = plan.precision == "fp8"  # int8 is the transformer's alone
    return (
        Network(
            name="uni3c_modulation",
            part="camera_control",
            scope=BLOCK,
            repeats=u.layers,
            inputs=(Tensor("time_embeddings", (STEPS, c.dim)),),
            weights=(
                *exact_linear("norm1.linear", 3 * u.dim, c.dim),
                *exact_linear("norm2.linear", 3 * u.dim, c.dim),
            ),
            outputs=(Tensor("modulations", (STEPS, 6, u.dim)),),
        ),
        Network(
            name="uni3c_patch",
            part="camera_control",
            inputs=(
                Tensor("latent", (c.latent_channels, *video)),
                Tensor("condition", (c.condition_channels, *video)),  # its mask is read
                Tensor("render_latent", (c.latent_channels, *video)),
            ),
            weights=(
                Tensor("controlnet_patch_embedding.weight", (c.dim, channels, 1, 2, 2)),
                Tensor("controlnet_patch_embedding.bias", (c.dim,)),
                *linear("proj_in", u.dim, c.dim),
            ),
            outputs=(Tensor("z", z),),
        ),
        Network(
            name="uni3c_in",
            part="camera_control",
            scope=BLOCK,
            repeats=u.layers,
            quantised=eight,
            inputs=(
                Tensor("z", z),
                modulation,
                Tensor("rope_cos", (plan.tokens, u.head_dim // 2)),
                Tensor("rope_sin", (plan.tokens, u.head_dim // 2)),
            ),
            weights=(
                *_norm("norm1.norm", u.dim),
                *linear("self_attn.to_q", u.dim, u.dim),
                *linear("self_attn.to_k", u.dim, u.dim),
                *linear("self_attn.to_v", u.dim, u.dim),
                Tensor("self_attn.norm_q.weight", (u.dim,)),
                Tensor("self_attn.norm_k.weight", (u.dim,)),
            ),
            outputs=tuple(Tensor(name, heads, "activation") for name in "qkv"),
        ),
        Network(
            name="uni3c_attention",
            part="camera_control",
            inputs=tuple(Tensor(name, heads, "activation") for name in "qkv"),
            weights=(),
            outputs=(Tensor("attended", z, "activation"),),
        ),
        Network(
            name="uni3c_out",
            part="camera_control",
            scope=BLOCK,
            repeats=u.layers,
            quantised=eight,
            inputs=(Tensor("z", z), Tensor("attended", z, "activation"), modulation),
            weights=(
                *linear("self_attn.to_out.0", u.dim, u.dim),
                *_norm("norm2.norm", u.dim),
                *linear("ffn.0", plan.ffn_dim, u.dim),
                *linear("ffn.2", u.dim, plan.ffn_dim),
            ),
            outputs=(Tensor("z_out", z), Tensor("features", z, "activation")),
        ),
        Network(
            name="uni3c_add",
            part="camera_control",
            scope="proj_out.{n}.",
            repeats=u.layers,
            quantised=eight,
            inputs=(Tensor("x", x), Tensor("features", z, "activation"), Tensor("strength", (1,))),
            weights=(Tensor("weight", (c.dim, u.dim), "linear"), Tensor("bias", (c.dim,))),
            outputs=(Tensor("x_out", x),),
        ),
    )


def _norm(name: str, dim: int) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (dim,)), Tensor(f"{name}.bias", (dim,))
