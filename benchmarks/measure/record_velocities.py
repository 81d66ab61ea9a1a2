"""Records a job: the latent and the velocity of each step, and the frames.

    python -m trt_wan.benchmarks.measure.record_velocities RECORDING

RECORDING is a `Recording` in JSON. With `latents_of` every step gets the latent of another recording, so that
velocities can be compared on equal inputs. The frames then mean nothing and are not kept.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.engines.contract import Network
from trt_wan.errors import Stopped
from trt_wan.runtime.events import Event, Note, StepDone
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from trt_wan.runtime.pipeline import to_pixels


@dataclass(frozen=True)
class Recording:
    spec: Spec
    target: str  # .npz
    latents_of: str | None = None  # .npz
    other_kernels: bool = False  # on the CPU: ONNX Runtime without its optimisations

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "spec": self.spec.to_json()})

    @staticmethod
    def from_json(text: str) -> "Recording":
        values = json.loads(text)
        return Recording(**{**values, "spec": Spec.from_json(values["spec"])})


class RecordingExecutor(ForwardingExecutor):
    """Keeps copies of the inputs of a step's first network and of the outputs of its last one on the host."""

    def __init__(self, executor: Executor, latents: NDArray[np.float32] | None) -> None:
        super().__init__(executor)
        self.given = latents
        self.latents: list[Array] = []
        self.velocities: list[Array] = []

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        if network.name == "patch_embed":
            if self.given is not None:
                inputs = {**inputs, "latent": self.given[len(self.latents)]}
            self.latents.append(np.array(inputs["latent"], np.float32))
        outputs = self.executor.run(network, n, inputs)
        if network.name == "head":
            self.velocities.append(np.array(outputs[0], np.float32))
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
    notes: list[str] = []
    kept: list[RecordingExecutor] = []
    given = np.load(recording.latents_of)["latents"] if recording.latents_of else None

    def observe(executor: Executor) -> Executor:
        if recording.other_kernels and isinstance(executor, OnnxRuntimeExecutor):
            executor = PlainOnnxRuntime(executor.graphs, executor.weights)
        kept.append(RecordingExecutor(executor, given))
        return kept[0]

    def progress(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if isinstance(event, StepDone) and event.step == event.steps and given is not None:
            raise Stopped("All velocities are there.")

    frames = []
    with recording.spec.open(progress, observe) as model, suppress(Stopped):
        pieces = model.pieces(recording.spec.job(), progress=progress)
        frames = [to_pixels(piece) for piece in pieces]
    np.savez(
        recording.target,
        latents=np.stack(kept[0].latents),
        velocities=np.stack(kept[0].velocities),
        frames=np.concatenate(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8),
    )
    say("recorded", choices=notes)


def main() -> None:
    answering(lambda: record(Recording.from_json(sys.argv[1])))


if __name__ == "__main__":
    main()
