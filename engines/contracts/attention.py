"""Self-attention over all tokens. It is a separate network so that other kernels can compute it."""

from dataclasses import replace

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor
from trt_wan.engines.shape import Plan

PLACES = 7


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


def to_rows(network: Network, ranks: int, rows: int) -> Network:
    """A contract of self-attention that leaves tokens of the own rank where they are. `own_q`, `own_k` and
    `own_v` are those of its heads, [heads, rows of a rank, head_dim]; q, k and v have zeros there. Their
    results go to the rank's rows of all heads, [rows, heads·head_dim] at an address. `attended` gets those
    of the other ranks, [other ranks·rows, channels].

    `places` are numbers: tokens of a slot, share of a rank, the own rank, rows, the heads of the model, the
    number of the first head, and the address of the own rows (runtime/parallel/shards.py).
    """
    (heads, _, head_dim), (attended,) = network.inputs[0].shape, network.outputs
    own = (replace(t, name=f"own_{t.name}", shape=(heads, rows, head_dim)) for t in network.inputs[:3])
    others = replace(attended, shape=((ranks - 1) * rows, attended.shape[1]))
    inputs = (*network.inputs, *own, Tensor("places", (PLACES,), "int64"))
    return replace(network, name=rows_name(network.name), inputs=inputs, outputs=(others,))


def rows_name(name: str) -> str:
    return f"{name} to rows"
