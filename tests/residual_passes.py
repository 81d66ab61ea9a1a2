"""The residual stream of every forward pass of a job, whether a step cache has added what it must, and the
published ratios of another model. Needs no torch.
"""

from typing import Any

import numpy as np
from tiny_job import FRAMES

from trt_wan.engines.contract import Network
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.job import Job

# Wan2.1-I2V-480, 40 steps, the prompt's side (addons_spec.md 4.1).
PUBLISHED = tuple(
    map(
        float,
        """
    1 .98783 .97559 .98311 .98202 .9888 .98762 .98957 .99052 .99383 .98857 .99065 .98845 .99057 .98957 .98601
    .98823 .98756 .98808 .98721 .98571 .98543 .98157 .98411 .97952 .98149 .9774 .97825 .97355 .97085 .97056
    .96588 .96113 .9567 .94961 .93973 .93217 .91878 .90955 .92617""".split(),
    )
)


class Passes(ForwardingExecutor):
    """The residual stream before the first block and behind the last, of every forward pass."""

    def __init__(self, executor: Executor, made: list[tuple[Array, Array, bool]]) -> None:
        super().__init__(executor)
        self.made, self.entered, self.ran = made, np.empty(0), False

    def run(self, network: Network, n: int, inputs: Any) -> tuple[Array, ...]:
        if network.name == "head":
            self.made.append((self.entered, np.asarray(inputs["x"]), self.ran))
        outputs = super().run(network, n, inputs)
        self.ran = network.name == "ffn" or (self.ran and network.name != "patch_embed")
        if network.name == "patch_embed":
            self.entered = np.asarray(outputs[0])
        return outputs


def require_held(job: Job, made: list[tuple[Array, Array, bool]]) -> None:
    """Of the first window of a job over FRAMES frames: every skipped pass has added the residual of the last
    computed pass of its side and context window, to the last bit.
    """
    plan, sides, steps = job.context_plan(job.windows(FRAMES).length(0)), 1 + job.guided, job.schedule.steps
    streams = sides * (1 if plan is None else len(plan.parts(0)))
    for k in range(streams):
        held: Any = None
        for step, (entered, left, ran) in enumerate(made[k : steps * streams : streams]):
            assert ran != job.skips[k % sides][step]
            if ran:
                held = left - entered
            else:
                np.testing.assert_array_equal(left, entered + held)
