"""Face crops in [-1, 1] to motion vectors (model_spec.md 1.6).

Convolution and linear weights are the checkpoint's, unscaled: the graph has the equalising factors. The
loader computes `dec.direction.orthonormal`, the Q of the Householder QR of `dec.direction.weight`: its signs
must be LAPACK's, and ONNX has no QR.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Tensor, exact_linear
from trt_wan.engines.shape import Plan


def network(model: ModelConfig, plan: Plan) -> Network:
    m = model.motion
    convs = "enc.net_app.convs"
    weights = [
        Tensor(f"{convs}.0.0.weight", (m.channels[0], 3, 1, 1)),
        Tensor(f"{convs}.0.1.bias", (1, m.channels[0], 1, 1)),
    ]
    for i, (inner, out) in enumerate(zip(m.channels, m.channels[1:], strict=False), start=1):
        weights += [
            Tensor(f"{convs}.{i}.conv1.0.weight", (inner, inner, 3, 3)),
            Tensor(f"{convs}.{i}.conv1.1.bias", (1, inner, 1, 1)),
            Tensor(f"{convs}.{i}.conv2.1.weight", (out, inner, 3, 3)),
            Tensor(f"{convs}.{i}.conv2.2.bias", (1, out, 1, 1)),
            Tensor(f"{convs}.{i}.skip.1.weight", (out, inner, 1, 1)),
        ]
    weights.append(Tensor(f"{convs}.{len(m.channels)}.weight", (m.style_dim, m.channels[-1], 4, 4)))
    for i in range(4):
        weights += exact_linear(f"enc.fc.{i}", m.style_dim, m.style_dim)
    weights += exact_linear("enc.fc.4", m.motion_dim, m.style_dim)
    weights.append(Tensor("dec.direction.orthonormal", (m.style_dim, m.motion_dim)))
    return Network(
        name="motion_encoder",
        part="transformer",
        scope="motion_encoder.",
        inputs=(Tensor("face", (plan.face_batch, 3, m.size, m.size)),),
        weights=tuple(weights),
        outputs=(Tensor("motion", (plan.face_batch, m.style_dim)),),
    )
