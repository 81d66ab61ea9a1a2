"""One layer of the umT5 encoder, run once per layer (model_spec.md 8.1).

The token embedding is a look-up in the memory-mapped file and the final RMS norm a line of numpy. The runtime
has both. `position_buckets` is the same for every layer; each layer's bias table differs.

`attention_bias` is added to every row of the logits. It is 0, or very negative at padding.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor


def network(model: ModelConfig) -> Network:
    t = model.text
    inner = t.heads * t.head_dim
    return Network(
        name="text_encoder_layer",
        part="text_encoder",
        scope="encoder.block.{n}.layer.",
        repeats=t.layers,
        inputs=(
            Tensor("hidden", (t.length, t.dim)),
            Tensor("attention_bias", (t.length,)),
            Tensor("position_buckets", (t.length, t.length), "int64"),
        ),
        weights=(
            Tensor("0.layer_norm.weight", (t.dim,)),
            Tensor("0.SelfAttention.q.weight", (inner, t.dim), "linear"),
            Tensor("0.SelfAttention.k.weight", (inner, t.dim), "linear"),
            Tensor("0.SelfAttention.v.weight", (inner, t.dim), "linear"),
            Tensor("0.SelfAttention.o.weight", (t.dim, inner), "linear"),
            Tensor("0.SelfAttention.relative_attention_bias.weight", (t.buckets, t.heads)),
            Tensor("1.layer_norm.weight", (t.dim,)),
            Tensor("1.DenseReluDense.wi_0.weight", (t.ffn_dim, t.dim), "linear"),
            Tensor("1.DenseReluDense.wi_1.weight", (t.ffn_dim, t.dim), "linear"),
            Tensor("1.DenseReluDense.wo.weight", (t.dim, t.ffn_dim), "linear"),
        ),
        outputs=(Tensor("hidden_out", (t.length, t.dim)),),
    )
