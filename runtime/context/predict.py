"""The velocity of a window of the loop: by one forward of the model, or fused from those of its parts."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from trt_wan.runtime.conditioning import WindowLatents, condition_of
from trt_wan.runtime.context.faces import PartFaces
from trt_wan.runtime.context.parts import ContextPlan, Part
from trt_wan.runtime.denoise import Predict
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import WindowCondition, fuser_keys

# The velocity under a condition, with everything that does not depend on the place. The part is None where
# the model takes the window whole.
PredictUnder = Callable[[WindowCondition, Part | None], Predict]


def predict_latents(
    model: Model,
    window: WindowLatents,
    plan: ContextPlan | None,
    under: PredictUnder,
    before_each: Callable[[], None] = lambda: None,
) -> Predict:
    """The velocity of a window of the loop. `before_each` is called before each part of a step and may raise
    to end the run. Fusing happens on the executor; conditions are kept on the host, and those of one part at
    a time are placed.
    """
    if plan is None or plan.is_one:
        face = None if window.motion is None else fuser_keys(model, window.motion, window.pictures)
        return under(condition_of(model, window, face), None)
    faces = PartFaces(model, window.motion, window.pictures)

    def predict(step: int, latent: Array) -> Array:
        def forward(part: Part) -> Array:
            before_each()
            seen = replace(
                window,
                condition=window.condition[:, part.seen],
                pose=window.pose[:, part.posed],
                render=None if window.render is None else window.render[:, part.seen],
            )
            predict_part = under(condition_of(model, seen, faces.of(part)), part)
            return predict_part(step, model.executor.take(latent, part.slots))

        parts = plan.parts(step)
        made: Iterable[Array] = map(forward, parts)
        if model.split == "windows":
            made = model.ranks.divide([(1.0, partial(forward, part)) for part in parts])
        fused: Array | None = None
        for part, velocity in zip(parts, made, strict=True):
            fused = model.executor.blend(plan.slots, [(part.slots, part.weights, velocity)], fused)
        assert fused is not None, "a latent has parts"
        return fused

    return predict
