"""The IP adapter: from a face embedding to keys and values, and the attention to them (addons_spec.md 2.3,
2.4).

Weights have ByteDance's names: set i of the lite adapter belongs to block 2i.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, exact_linear, linear
from trt_wan.engines.lynx import EMBEDDING, LynxPlan, ip_blocks, lynx_of


def _norm(name: str, dim: int) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (dim,)), Tensor(f"{name}.bias", (dim,))


def resampler(model: ModelConfig, plan: LynxPlan) -> Network:
    """The tokens of a face embedding."""
    c = lynx_of(model)
    inner, out = c.heads * c.head_dim, c.result_dim(model, plan.kind)
    weights = [Tensor("latents", (1, c.queries, c.dim)), *exact_linear("proj_in", c.dim, EMBEDDING)]
    for layer in range(c.layers):
        weights += [
            *_norm(f"layers.{layer}.0.norm1", c.dim),
            *_norm(f"layers.{layer}.0.norm2", c.dim),
            Tensor(f"layers.{layer}.0.to_q.weight", (inner, c.dim)),
            Tensor(f"layers.{layer}.0.to_kv.weight", (2 * inner, c.dim)),
            Tensor(f"layers.{layer}.0.to_out.weight", (c.dim, inner)),
            *_norm(f"layers.{layer}.1.0", c.dim),
            Tensor(f"layers.{layer}.1.1.weight", (4 * c.dim, c.dim)),
            Tensor(f"layers.{layer}.1.3.weight", (c.dim, 4 * c.dim)),
        ]
    weights += [*exact_linear("proj_out", out, c.dim), *_norm("norm_out", out)]
    return Network(
        name="lynx_resampler",
        part="lynx_resampler",
        inputs=(Tensor("face", (1, EMBEDDING)),),
        weights=tuple(weights),
        outputs=(Tensor("ip_tokens", (c.queries, out)),),
    )


def kv(model: ModelConfig, plan: LynxPlan) -> Network:
    """Full: keys before their norm, which is that of the block's text keys. Lite: finished keys."""
    c, t = lynx_of(model), model.transformer
    inner, keys, full = c.result_dim(model, plan.kind), c.keys(plan.kind), plan.kind == "full"
    heads = (t.heads, keys, t.head_dim)
    weights = [*linear("to_k_ip", t.dim, inner), *linear("to_v_ip", t.dim, inner)]
    if full:
        weights.insert(0, Tensor("registers", (1, c.registers, t.dim)))
    return Network(
        name="lynx_ip_kv",
        part="lynx_ip",
        scope="{n}.",
        repeats=len(ip_blocks(model, plan.kind)),
        inputs=(Tensor("ip_tokens", (c.queries, inner)),),
        weights=tuple(w for w in weights if full or not w.name.endswith("bias")),
        outputs=(
            Tensor("ip_keys", (keys, t.dim)) if full else Tensor("ip_k", heads, "activation"),
            Tensor("ip_v", heads, "activation"),
        ),
    )


def norm(model: ModelConfig, plan: LynxPlan) -> Network:
    """Finishes the keys of the full adapter."""
    t, keys = model.transformer, lynx_of(model).keys(plan.kind)
    return Network(
        name="lynx_ip_norm",
        part="transformer",
        scope="blocks.{n}.cross_attn.",
        repeats=t.layers,
        inputs=(Tensor("ip_keys", (keys, t.dim)),),
        weights=(Tensor("norm_k.weight", (t.dim,)),),
        outputs=(Tensor("ip_k", (t.heads, keys, t.head_dim), "activation"),),
    )


def attention(model: ModelConfig, plan: LynxPlan) -> Network:
    """Adds the attention to the face to the result of cross-attention, of any kind."""
    t, tokens = model.transformer, (plan.tokens, model.transformer.dim)
    heads = (t.heads, lynx_of(model).keys(plan.kind), t.head_dim)
    return Network(
        name="lynx_ip",
        part="transformer",
        inputs=(
            Tensor("cross_q", tokens, "activation"),
            Tensor("cross_attended", tokens, "activation"),
            Tensor("ip_k", heads, "activation"),
            Tensor("ip_v", heads, "activation"),
            Tensor("ip_scale", (1,)),
        ),
        weights=(),
        outputs=(Tensor("cross_attended_out", tokens, "activation"),),
        optional=True,
    )
