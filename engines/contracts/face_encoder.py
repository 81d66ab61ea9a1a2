"""Motion vectors to face tokens, five per slot, zeros in slot 0, the reference (model_spec.md 1.7)."""

from trt_wan.engines.config import FACE_TOKENS, ModelConfig
from trt_wan.engines.contract import Network, Tensor, exact_linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    face, dim = model.face, model.transformer.dim
    hidden = face.hidden_dim

    def conv(name: str, out: int, inner: int) -> tuple[Tensor, Tensor]:
        return Tensor(f"{name}.conv.weight", (out, inner, 3)), Tensor(f"{name}.conv.bias", (out,))

    return Network(
        name="face_encoder",
        part="transformer",
        scope="face_encoder.",
        inputs=(Tensor("motion", (plan.frames, model.motion.style_dim)),),
        weights=(
            *conv("conv1_local", face.heads * hidden, model.motion.style_dim),
            *conv("conv2", hidden, hidden),
            *conv("conv3", hidden, hidden),
            *exact_linear("out_proj", dim, hidden),
            Tensor("padding_tokens", (1, 1, 1, dim)),
        ),
        outputs=(Tensor("face_tokens", (plan.slots, FACE_TOKENS, dim)),),
    )
