"""The timestep's sinusoid to its embedding and the six modulation vectors (model_spec.md 1.4, step 8)."""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, exact_linear


def network(model: ModelConfig) -> Network:
    c = model.transformer
    return Network(
        name="time_embed",
        part="transformer",
        inputs=(Tensor("sinusoid", (1, c.frequency_dim)),),
        weights=(
            *exact_linear("time_embedding.0", c.dim, c.frequency_dim),
            *exact_linear("time_embedding.2", c.dim, c.dim),
            *exact_linear("time_projection.1", 6 * c.dim, c.dim),
        ),
        outputs=(Tensor("time_embedding", (1, c.dim)), Tensor("time_modulation", (6, c.dim))),
    )
