"""The tensors that a checkpoint file must hold: all that a part's networks read, by canonical name and shape.

Canonical names are the official Wan names for the transformer and the VAE and the Hugging Face names for umT5
and CLIP (model_spec.md 1.3, 5.4), without prefixes. Layers that the runtime never runs (CLIP's last block and
its projection) are not required.
"""

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.lynx import FacePlan, Kind, LynxPlan
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import CameraPlan, Plan

PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "image_encoder")
LYNX_PARTS: tuple[Part, ...] = ("lynx_resampler", "lynx_ip", "lynx_ref")
OPTIONAL_PARTS: tuple[Part, ...] = ("camera_control", *LYNX_PARTS)  # opened for jobs that use them

TOKEN_EMBEDDING = "shared.weight"
FINAL_TEXT_NORM = "encoder.final_layer_norm.weight"
DIRECTION = "motion_encoder.dec.direction.weight"
# The graph's input; it is computed from DIRECTION when the weights are loaded.
ORTHONORMAL = "motion_encoder.dec.direction.orthonormal"


def networks_of(
    model: ModelConfig, part: Part, precision: Precision = "fp32", kind: Kind = "full"
) -> list[Network]:
    """The networks with the weights of a part, at any size: weights do not depend on it. `kind` is that of
    Lynx's IP adapter or resampler.
    """
    plans: tuple[Plan, ...] = (Plan(precision=precision),)
    if part == "camera_control":
        plans = (CameraPlan.beside(plans[0], model.camera.ffn_dim),)
    elif part in LYNX_PARTS:
        plans = LynxPlan(precision=precision, kind=kind), FacePlan(precision=precision)
    return [network for plan in plans for network in networks(model, plan).values() if network.part == part]


def required_tensors(model: ModelConfig, part: Part, kind: Kind = "full") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the file of `part` must have, in a stable order. `kind` is that of
    Lynx's IP adapter or resampler.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for network in networks_of(model, part, kind=kind):
        for n in range(network.repeats):
            shapes |= {network.weight_key(w.name, n): w.shape for w in network.weights}
    if part == "transformer":
        shapes[DIRECTION] = shapes.pop(ORTHONORMAL)
    if part == "text_encoder":
        shapes[TOKEN_EMBEDDING] = (model.text.vocabulary, model.text.dim)
        shapes[FINAL_TEXT_NORM] = (model.text.dim,)
    return shapes
