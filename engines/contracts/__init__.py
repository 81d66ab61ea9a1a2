"""The contracts of all networks: one module each, one row each in `networks`."""

from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, at_precision
from trt_wan.engines.contracts import (
    attention,
    attn_in,
    attn_out,
    context_kv,
    cross_attention,
    cross_attention_nag,
    face_encoder,
    ffn,
    fuser,
    fuser_kv,
    head,
    image_embed,
    image_encoder,
    lynx_ip,
    lynx_ref,
    motion_encoder,
    patch_embed,
    sparse_attention,
    text_embed,
    text_encoder,
    time_embed,
    uni3c,
    vae_decode,
    vae_encode,
)
from trt_wan.engines.lynx import FacePlan, LynxPlan
from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan, VaeTile

# Raise it whenever an exported graph computes something else or has other inputs or outputs: exported graphs
# are kept under this number. tests/test_graph_hashes.py finds a change that was forgotten.
GRAPHS_VERSION = 3
LYNX_GRAPHS_VERSION = 1  # the same for the graphs of Lynx


@cache
def networks(model: ModelConfig, plan: Plan) -> Mapping[str, Network]:
    """Every network of `model` at the shapes of `plan`, by name, in the order a run first needs them. A tile
    has those of the VAE alone, a share of a GPU those of a block, a camera plan those of Uni3C, and the plans
    of Lynx have those of Lynx.
    """
    rows: Iterable[Network]
    if isinstance(plan, CameraPlan):
        rows = uni3c.networks(model, plan)
    elif isinstance(plan, ShardPlan):
        rows = _block(model, plan)
    elif isinstance(plan, LynxPlan):
        rows = _lynx(model, plan)
    elif isinstance(plan, FacePlan):
        rows = _face(model, plan)
    else:
        rows = _all(model, plan)
    used = (network for network in rows if network.part == "vae" or not isinstance(plan, VaeTile))
    return MappingProxyType({network.name: at_precision(network, plan.precision) for network in used})


def _lynx(model: ModelConfig, plan: LynxPlan) -> tuple[Network, ...]:
    return (
        lynx_ip.resampler(model, plan),
        lynx_ip.kv(model, plan),
        *((lynx_ip.norm(model, plan),) if plan.kind == "full" else ()),
        lynx_ref.attention(model, plan),
        lynx_ip.attention(model, plan),
    )


def _face(model: ModelConfig, plan: FacePlan) -> tuple[Network, ...]:
    """With the networks of a block, at the face's size."""
    return (
        lynx_ref.encode(model, plan),
        lynx_ref.embed(model, plan),
        lynx_ref.features(model, plan),
        lynx_ref.kv(model, plan),
        lynx_ref.norm(model, plan),
        attn_in.network(model, plan),
        attention.network(model, plan),
        attn_out.network(model, plan),
        cross_attention.network(model, plan),
        ffn.network(model, plan),
    )


def _block(model: ModelConfig, plan: Plan) -> tuple[Network, ...]:
    return (
        attn_in.network(model, plan),
        attention.network(model, plan),
        sparse_attention.network(model, plan),
        attn_out.network(model, plan),
        cross_attention.network(model, plan),
        cross_attention_nag.network(model, plan),
        ffn.network(model, plan),
        fuser.network(model, plan),
    )


def _all(model: ModelConfig, plan: Plan) -> tuple[Network, ...]:
    return (
        text_encoder.network(model),
        image_encoder.embed(model),
        image_encoder.layer(model),
        vae_encode.first(model, plan),
        vae_encode.next_chunk(model, plan),
        text_embed.network(model),
        image_embed.network(model),
        context_kv.network(model),
        motion_encoder.network(model, plan),
        face_encoder.network(model, plan),
        fuser_kv.network(model, plan),
        time_embed.network(model),
        patch_embed.network(model, plan),
        *_block(model, plan),
        head.network(model, plan),
        vae_decode.first(model, plan),
        vae_decode.next_chunk(model, plan),
    )
