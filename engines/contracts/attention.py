"""Self-attention over all tokens. It is a separate network so that other kernels can compute it."""

from dataclasses import replace

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan

PLACES = 4  # numbers of `places` in front of the ranks' addresses: hopper.cu says which


def network(model: ModelConfig, plan: Plan) -> Network:
    c, tokens = model.transformer, plan.undivided.tokens
    count = plan.attended_heads(c.heads)
    heads = (count, tokens, c.head_dim)
    return Network(
        name="attention",
        part="transformer",
        inputs=(
            Tensor("q", heads, "activation"),
            Tensor("k", heads, "activation"),
            Tensor("v", heads, "activation"),
        ),
        weights=(),
        outputs=(Tensor("attended", (tokens, count * c.head_dim), "activation"),),
    )


def of_heads(network: Network, heads: int) -> Network:
    """A contract of self-attention, for that many of its heads."""
    (whole, *shape), (attended,) = network.inputs[0].shape, network.outputs
    if heads == whole:
        return network
    tokens, channels = attended.shape
    return replace(
        network,
        name=f"{network.name} of {heads} heads",
        inputs=(*(replace(t, shape=(heads, *shape)) for t in network.inputs[:3]), *network.inputs[3:]),
        outputs=(replace(attended, shape=(tokens, channels // whole * heads)),),
    )


def to_rows(network: Network, ranks: int) -> Network:
    """A contract of self-attention that writes every rank's rows where `places` says (peer_sequence.py), and
    returns nothing.
    """
    places = Tensor("places", (PLACES + ranks,), "int64")
    return replace(network, name=rows_name(network.name), inputs=(*network.inputs, places), outputs=())


def rows_name(name: str) -> str:
    return f"{name} to rows"
