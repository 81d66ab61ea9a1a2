"""Records a job: the latent and the velocity of each step, the transformer's inputs, and the frames.

    python -m trt_wan.benchmarks.measure.record_velocities RECORDING

RECORDING is a `Recording` in JSON. With `latents_of` every step gets the latent of another recording, so that
velocities can be compared on equal inputs. The frames are those of a second job on the same open model, which
goes its own way.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.benchmarks.measure.measured_process import Opened, Spec
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.engines.contract import Network
from trt_wan.errors import Stopped
from trt_wan.runtime.events import Event, StepDone
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from trt_wan.runtime.pipeline import to_pixels


@dataclass(frozen=True)
class Recording:
    spec: Spec
    target: str  # .npz
    latents_of: str | None = None  # .npz
    frames: bool = True  # whether they are recorded too
    other_kernels: bool = False  # on the CPU: ONNX Runtime without its optimisations

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "spec": self.spec.to_json()})

    @staticmethod
    def from_json(text: str) -> "Recording":
        values = json.loads(text)
        return Recording(**{**values, "spec": Spec.from_json(values["spec"])})


# The inputs of a forward pass beside the latent, by network and by the name of the network's input.
CONDITIONS = {
    ("patch_embed", "condition"): "condition",
    ("patch_embed", "pose_latent"): "pose",
    ("text_embed", "text"): "text",
    ("image_embed", "image"): "image",
    ("motion_encoder", "face"): "face",
}


@dataclass
class Tape:
    """The recording of one job, on the host: the latent that every step begins with, its velocity, and
    CONDITIONS, once each, the faces of all batches. With `given` every step gets its latent from there, and
    the conditions are not kept.
    """

    given: NDArray[np.float32] | None = None
    latents: list[Array] = field(default_factory=list)
    velocities: list[Array] = field(default_factory=list)
    conditions: dict[str, list[Array]] = field(default_factory=dict)
    frames: list[Array] = field(default_factory=list)

    def write(self, path: str, timesteps: Sequence[float]) -> None:
        arrays: dict[str, Any] = {name: np.concatenate(kept) for name, kept in self.conditions.items()}
        arrays |= {"latents": np.stack(self.latents), "velocities": np.stack(self.velocities)}
        frames = np.concatenate(self.frames) if self.frames else np.zeros((0, 0, 0, 3), np.uint8)
        np.savez(path, frames=frames, timesteps=np.asarray(timesteps), **arrays)


class RecordingExecutor(ForwardingExecutor):
    def __init__(self, executor: Executor, tape: Tape) -> None:
        super().__init__(executor)
        self.tape = tape

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        tape = self.tape
        if network.name == "patch_embed":
            if tape.given is not None:
                inputs = {**inputs, "latent": tape.given[len(tape.latents)]}
            tape.latents.append(np.array(inputs["latent"], np.float32))
        for (name, wanted), called in CONDITIONS.items() if tape.given is None else ():
            if network.name == name and (name == "motion_encoder" or called not in tape.conditions):
                tape.conditions.setdefault(called, []).append(np.array(inputs[wanted], np.float32))
        outputs = self.executor.run(network, n, inputs)
        if network.name == "head":
            tape.velocities.append(np.array(outputs[0], np.float32))
        return outputs


class PlainOnnxRuntime(OnnxRuntimeExecutor):
    """Runs the same graphs unfused: other kernels and other orders of summation."""

    def _session(self, name: str) -> Any:
        import onnxruntime as ort

        if name not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            path = self.graphs / f"{name}.onnx"
            self._sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self._sessions[name]


def record(recording: Recording) -> None:
    told = Opened()
    observed: list[RecordingExecutor] = []
    led = Tape(np.load(recording.latents_of)["latents"]) if recording.latents_of else Tape()
    tape, job = led, recording.spec.job()

    def observe(executor: Executor) -> Executor:
        if recording.other_kernels and isinstance(executor, OnnxRuntimeExecutor):
            executor = PlainOnnxRuntime(executor.graphs, executor.weights)
        observed.append(RecordingExecutor(executor, tape))
        return observed[0]

    def progress(event: Event) -> None:
        told(event)
        if isinstance(event, StepDone) and event.step == event.steps:
            if tape.given is not None or not recording.frames:
                raise Stopped("All velocities are there.")

    with recording.spec.open(progress, observe) as model:
        while True:
            with suppress(Stopped):
                tape.frames += [to_pixels(piece) for piece in model.pieces(job, progress=progress)]
            if tape.given is None or not recording.frames:
                break
            tape = observed[0].tape = Tape()
    led.frames = tape.frames
    led.write(recording.target, job.schedule.timesteps)
    say("recorded", **asdict(told))


def main() -> None:
    answering(lambda: record(Recording.from_json(sys.argv[1])))


if __name__ == "__main__":
    main()
