"""The price of speed: our output against the bf16 reference on the same seed and inputs, step by step and as
frames. Beside it stands the noise floor: the reference against itself with another attention kernel.

Velocities are compared on equal latents: each step gets the reference's. Frames are compared at the end of
independent runs. On the CPU the reference is float32, and the floor is ONNX Runtime without fused kernels.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.record_velocities import Recording
from trt_wan.benchmarks.measure.similarity import psnr, relative_error, ssim
from trt_wan.benchmarks.measure.workplace import with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.engines.choice.candidates import CANDIDATES
from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Note, Progress, silent

QUALITY_SCHEMA = "trt-wan-bench-quality/1"
REFERENCE = {"precision": "bf16", "tier": "exact"}
ATTENTION = "attention"


@dataclass(frozen=True)
class QualityRow:
    """One configuration against the reference. PSNR is None for equal frames, LPIPS if not measured."""

    name: str
    settings: Mapping[str, Any]
    velocity_errors: list[float]  # relative, by step
    psnr: float | None
    ssim: float
    lpips: float | None


@dataclass(frozen=True)
class Quality:
    shape: Shape
    card: Card
    weights: str
    seed: int
    reference: str
    rows: list[QualityRow]  # ours, then the noise floor if a second kernel runs here
    not_measured: list[str]
    schema: str = QUALITY_SCHEMA
    stem: ClassVar[str] = "quality"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sheets(self) -> list[Sheet | str]:
        def cells(row: QualityRow) -> Row:
            errors = row.velocity_errors
            steps = ", ".join(f"{e:.1e}" for e in errors)
            frames = ("equal" if row.psnr is None else Figure(row.psnr), Figure(row.ssim))
            lpips = "not measured" if row.lpips is None else Figure(row.lpips, "times")
            return row.name, Figure(max(errors), "error"), steps, *frames, lpips

        heads = ("velocity, worst", "by step", "PSNR dB", "SSIM", "LPIPS")
        title = f"Against {self.reference}: {self.shape.title}, seed {self.seed}, {self.card.hardware}"
        shown = Sheet("quality", title, heads, [cells(row) for row in self.rows])
        return [shown, f"Weights: {self.weights}.", *(f"Not measured: {x}" for x in self.not_measured)]

    def draw(self) -> Mapping[str, Any]:
        """Relative error of the velocity over the steps, ours and the noise floor."""
        from trt_wan.benchmarks.report.plots import errors_by_step

        title = f"Velocity against {self.reference}, on equal latents"
        under = f"{self.shape.title}, {self.card.hardware}; weights {self.weights}"
        rows = {row.name: row.velocity_errors for row in self.rows}
        return {"quality": errors_by_step(title, under, rows)}


def measure_quality(
    shape: Shape,
    settings: Mapping[str, Any],
    steps: int,
    seed: int,
    weights: str | None = None,
    progress: Progress = silent,
) -> Quality:
    card = read_card()
    not_measured: list[str] = []
    base = {} if card.gpu is None else REFERENCE
    with workplace(shape) as (env, clips), tempfile.TemporaryDirectory() as temporary:
        bench = _Recorder(Path(temporary), env, Spec(shape, clips, steps, {}, weights, seed), progress)
        reference = bench.record("reference", base)
        rows = [bench.compared("trt-wan", settings, reference, not_measured)]
        floor = bench.floor(base, reference, not_measured)
        if floor is not None:
            rows.append(floor)
    return Quality(
        shape,
        card,
        weights or "random: errors are of numerics, no picture can be judged",
        seed,
        ", ".join(f"{k} {v}" for k, v in base.items()) or "float32, ONNX Runtime",
        rows,
        not_measured,
    )


class _Recorder:
    """Runs each job in a new process and keeps its recording in `folder`."""

    def __init__(self, folder: Path, env: Mapping[str, str], spec: Spec, progress: Progress) -> None:
        self.folder, self.env, self.spec, self.progress = folder, env, spec, progress
        self.choices: dict[str, list[str]] = {}

    def record(
        self,
        name: str,
        settings: Mapping[str, Any],
        latents_of: str | None = None,
        other_kernels: bool = False,
    ) -> str:
        self.progress(Note(f"recording {name}"))
        spec = Spec(**{**self.spec.__dict__, "settings": dict(settings)})
        target = str(self.folder / f"{name}.npz".replace(" ", "_"))
        recording = Recording(spec, target, latents_of, other_kernels)

        def recorded() -> list[str]:
            with Child(
                "trt_wan.benchmarks.measure.record_velocities", [recording.to_json()], self.env
            ) as child:
                return list(child.read()["choices"])

        self.choices[name] = with_graphs(recorded, self.progress)
        return target

    def compared(
        self,
        name: str,
        settings: Mapping[str, Any],
        reference: str,
        not_measured: list[str],
        other_kernels: bool = False,
    ) -> QualityRow:
        free = self.record(name, settings, other_kernels=other_kernels)
        led = self.record(f"{name} on equal latents", settings, reference, other_kernels)
        a, b, expected = np.load(free), np.load(led), np.load(reference)
        errors = [relative_error(*pair) for pair in zip(b["velocities"], expected["velocities"], strict=True)]
        frames, wanted = a["frames"], expected["frames"]
        perceived = _lpips(free, reference, not_measured)
        return QualityRow(name, settings, errors, psnr(frames, wanted), ssim(frames, wanted), perceived)

    def floor(self, base: Mapping[str, Any], reference: str, not_measured: list[str]) -> QualityRow | None:
        """Returns the reference with the first other kernel that runs here, or None."""
        if not base:
            return self.compared("floor: unfused kernels", base, reference, not_measured, other_kernels=True)
        for name in _other_attention(self.choices["reference"]):
            try:
                with_it = {**base, "segments": {ATTENTION: name}}
                return self.compared(f"floor: attention {name}", with_it, reference, not_measured)
            except TrtWanError as error:
                self.progress(Note(f"no floor from {name}: {error.message}"))
        not_measured.append("noise floor: no second bf16 attention runs here")
        return None


def _other_attention(choices: Sequence[str]) -> list[str]:
    """Returns the exact bf16 candidates for the attention, without the reference's."""
    taken = next((c.removeprefix(f"{ATTENTION} = ") for c in choices if c.startswith(f"{ATTENTION} = ")), "")
    rows = [row for row in CANDIDATES if row.network == ATTENTION and row.tier == "exact"]
    return [row.name for row in rows if "bf16" in row.precisions and not taken.startswith(f"{row.name} (")]


def _lpips(first: str, second: str, not_measured: list[str]) -> float | None:
    command = [sys.executable, "-m", "trt_wan.benchmarks.measure.lpips_score", first, second]
    answer = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(answer.stdout.splitlines()[-1]) if answer.stdout.strip() else {"reason": "no answer"}
    if "lpips" in found:
        return float(found["lpips"])
    reason = f"LPIPS: {found['reason']}"
    if reason not in not_measured:
        not_measured.append(reason)
    return None
