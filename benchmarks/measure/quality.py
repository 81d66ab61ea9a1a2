"""The price of speed: our rows, and diffusers on the same weights and inputs, against the bf16 reference.

Velocities are compared on equal latents: each step gets the reference's. Frames are compared at the end of
independent runs. Without peers there is the noise floor: the reference with another attention kernel. On the
CPU the reference is float32, and the floor is ONNX Runtime without fused kernels.

Velocities of all rows are compared with each other as well. A row with 8-bit attention against the same row
without it has the error of the attention alone.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child, is_lost, rows_of
from trt_wan.benchmarks.measure.record_velocities import Recording
from trt_wan.benchmarks.measure.similarity import psnr, relative_error, ssim
from trt_wan.benchmarks.measure.workplace import with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.engines.choice.candidates import CANDIDATES
from trt_wan.errors import TrtWanError, UsageError
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.executors import Array

QUALITY_SCHEMA = "trt-wan-bench-quality/2"
REFERENCE = {"precision": "bf16", "tier": "exact"}
ATTENTION = "attention"
OURS_MODULE = "trt_wan.benchmarks.measure.record_velocities"
PEERS_MODULE = "trt_wan.benchmarks.peers.diffusers_velocities"


@dataclass(frozen=True)
class Wanted:
    """Our row to measure: fields of runtime.settings.Settings under a name."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class QualityRow:
    """One configuration against the reference."""

    name: str
    settings: Mapping[str, Any]
    velocity_errors: list[float]  # relative, by step
    candidates: Mapping[str, str] = field(default_factory=dict)  # networks with several candidates alone
    frames: bool = False  # whether they were compared
    psnr: float | None = None  # None for equal frames
    ssim: float | None = None
    lpips: float | None = None  # None if not measured


@dataclass(frozen=True)
class Quality:
    shape: Shape
    card: Card
    weights: str
    seed: int
    reference: str
    rows: list[QualityRow]  # ours, then the noise floor if a second kernel runs here, or peers
    between: dict[str, dict[str, float]]  # the error of a row against another, in its worst step
    not_measured: list[str]
    finished: bool = True  # False: more rows are to come
    lost: list[str] = field(default_factory=list)  # entries of `not_measured` whose rank or process was lost
    schema: str = QUALITY_SCHEMA
    stem: ClassVar[str] = "quality"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sheets(self) -> list[Sheet | str]:
        title = f"Against {self.reference}: {self.shape.title}, seed {self.seed}, {self.card.hardware}"
        heads = ("velocity, worst", "by step", "PSNR dB", "SSIM", "LPIPS")
        rows = [Sheet("quality", title, heads, [_cells(row) for row in self.rows])]
        if self.between:
            names = list(self.between)
            pairs = [
                (
                    f"{n}: {name}",
                    *("" if other == name else Figure(self.between[name][other], "error") for other in names),
                )
                for n, name in enumerate(names, 1)
            ]
            title = "Velocity of a row against that of another, the worst step"
            rows.append(Sheet("against", title, [f"{n}" for n in range(1, len(names) + 1)], pairs))
        chosen = [(row.name, _listed(row.candidates)) for row in self.rows if row.candidates]
        if chosen:
            rows.append(Sheet("candidates", "Candidates", (), chosen))
        return [*rows, f"Weights: {self.weights}.", *(f"Not measured: {x}" for x in self.not_measured)]

    def draw(self) -> Mapping[str, Any]:
        """Relative error of the velocity over the steps, by row."""
        from trt_wan.benchmarks.report.plots import errors_by_step

        title = f"Velocity against {self.reference}, on equal latents"
        under = f"{self.shape.title}, {self.card.hardware}; weights {self.weights}"
        rows = {row.name: row.velocity_errors for row in self.rows}
        return {"quality": errors_by_step(title, under, rows)}


def _cells(row: QualityRow) -> Row:
    errors = row.velocity_errors
    steps = ", ".join(f"{e:.1e}" for e in errors)
    frames: Row = ("", "", "")
    if row.frames:
        lpips = "not measured" if row.lpips is None else Figure(row.lpips, "times")
        frames = ("equal" if row.psnr is None else Figure(row.psnr), Figure(row.ssim), lpips)
    return row.name, Figure(max(errors), "error"), steps, *frames


def _listed(candidates: Mapping[str, str]) -> str:
    return ", ".join(f"{network} = {name}" for network, name in candidates.items())


def measure_quality(
    shape: Shape,
    wanted: Sequence[Wanted],
    steps: int,
    seed: int,
    weights: str | None = None,
    peers: bool = False,
    frames: bool = True,
    progress: Progress = silent,
    keep: Callable[[Quality], object] = lambda unfinished: None,
    budget: float | None = None,
) -> Quality:
    """`keep` gets the rows so far after every row. Rows that `budget` seconds end are not measured. Raises
    UsageError for peers without `weights`: they read the same file.
    """
    if peers and weights is None:
        raise UsageError(
            "Peers need weights in files, which they read too.", "Name their folder with --weights DIR."
        )
    card = read_card()
    not_measured: list[str] = []
    base = {} if card.gpu is None else REFERENCE
    with workplace(shape) as (env, clips), tempfile.TemporaryDirectory() as temporary:
        spec = Spec(shape, clips, steps, {}, weights, seed)
        bench = _Recorder(Path(temporary), env, spec, frames, not_measured, progress, Budget(budget))
        bench.record("reference", base)
        rows: list[QualityRow] = []

        def found() -> Quality:
            compared = len(rows) > (1 if peers else 2)
            return Quality(
                shape,
                card,
                weights or "random: errors are of numerics, no picture can be judged",
                seed,
                ", ".join(f"{k} {v}" for k, v in base.items()) or "float32, ONNX Runtime",
                list(rows),
                bench.between([row.name for row in rows]) if compared else {},
                not_measured,
                lost=list(bench.lost),
            )

        def add(row: QualityRow | None) -> None:
            if row is not None:
                rows.append(row)
                worst = max(row.velocity_errors)
                progress(Note(f"{row.name}: velocity off by {worst:.2e} in the worst step"))
                keep(replace(found(), finished=False))

        for one in wanted:
            add(bench.compared(one.name, one.settings))
        if wanted and not rows:
            raise bench.failures[0]
        if peers:
            for row in bench.peers("cpu" if card.gpu is None else "cuda"):
                add(row)
        else:
            add(bench.floor(base))
        return found()


class _Recorder:
    """Runs each row in a new process and keeps its recording in `folder`."""

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str],
        spec: Spec,
        frames: bool,
        not_measured: list[str],
        progress: Progress,
        budget: Budget,
    ) -> None:
        self.budget = budget
        self.folder, self.env, self.spec, self.frames = folder, env, spec, frames
        self.not_measured, self.progress = not_measured, progress
        self.files: dict[str, str] = {}  # recordings by row
        self.failures: list[TrtWanError] = []
        self.lost: list[str] = []
        self.reference: dict[str, Any] = {}  # its answer: candidates, and files of weights by part

    def record(self, name: str, settings: Mapping[str, Any], other_kernels: bool = False) -> dict[str, Any]:
        """Returns the answer. The first recording leads all others. Raises UsageError after the budget."""
        self.progress(Note(f"recording {name}"))
        target = str(self.folder / f"{len(self.files)}.npz")
        first = self.files.get("reference")
        spec = replace(self.spec, settings=dict(settings))
        recording = Recording(spec, target, first, self.frames, other_kernels)

        def recorded() -> dict[str, Any]:
            with Child(OURS_MODULE, [recording.to_json()], self.env, self.budget.patience()) as child:
                return child.read()

        try:
            answer = with_graphs(recorded, self.progress)
        except TrtWanError as error:
            if self.budget.over:
                raise UsageError(f"{name}: {self.budget.over}.", "Use a larger --budget.") from error
            raise
        self.files[name] = target
        if first is None:
            self.reference = answer
        return answer

    def compared(
        self, name: str, settings: Mapping[str, Any], other_kernels: bool = False
    ) -> QualityRow | None:
        """None for a row that cannot run here; the reason is in `not_measured`."""
        try:
            if self.budget.over:
                raise UsageError(self.budget.over, "Use a larger --budget.")
            answer = self.record(name, settings, other_kernels)
        except TrtWanError as error:
            self.not_measured.append(f"{name}: {self.budget.over or error.message}")
            self.progress(Note(f"not measured: {self.not_measured[-1]}"))
            self.failures.append(error)
            if is_lost(error, self.budget):
                self.lost.append(self.not_measured[-1])
            return None
        row = QualityRow(name, settings, self._errors(name, "reference"), answer["candidates"])
        if not self.frames:
            return row
        ours, reference = self.files[name], self.files["reference"]
        frames, expected = np.load(ours)["frames"], np.load(reference)["frames"]
        perceived = _lpips(ours, reference, self.not_measured)
        return replace(
            row, frames=True, psnr=psnr(frames, expected), ssim=ssim(frames, expected), lpips=perceived
        )

    def floor(self, base: Mapping[str, Any]) -> QualityRow | None:
        """Returns the reference with the first other kernel that runs here, or None."""
        if not base:
            return self.compared("floor: unfused kernels", base, other_kernels=True)
        for name in _other_attention(self.reference["candidates"]):
            row = self.compared(f"floor: attention {name}", {**base, "segments": {ATTENTION: name}})
            if row is not None or self.budget.over:
                return row
        self.not_measured.append("noise floor: no second bf16 attention runs here")
        return None

    def peers(self, device: str) -> Iterator[QualityRow]:
        """diffusers on the reference's weights and inputs. Rows that cannot run are in `not_measured`."""
        self.progress(Note("recording diffusers"))
        given = {
            "weights": self.reference["files"]["transformer"],
            "inputs": self.files["reference"],
            "out": str(self.folder),
            "device": device,
        }
        arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
        arguments = [*self.spec.shape.arguments(), *arguments]
        told = self.not_measured, self.progress, self.budget
        for answer in rows_of(PEERS_MODULE, arguments, self.env, *told):
            name = answer["name"]
            self.files[name] = answer["velocities"]
            yield QualityRow(name, {}, self._errors(name, "reference"))

    def between(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        return {a: {b: max(self._errors(a, b)) for b in names} for a in names}

    def _velocities(self, name: str) -> Array:
        found: Array = np.load(self.files[name])["velocities"]
        return found

    def _errors(self, name: str, against: str) -> list[float]:
        pairs = zip(self._velocities(name), self._velocities(against), strict=True)
        return [relative_error(*pair) for pair in pairs]


def _other_attention(candidates: Mapping[str, str]) -> list[str]:
    """Returns the exact bf16 candidates for the attention, without the reference's."""
    rows = [row for row in CANDIDATES if row.network == ATTENTION and row.tier == "exact"]
    return [row.name for row in rows if "bf16" in row.precisions and row.name != candidates.get(ATTENTION)]


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
