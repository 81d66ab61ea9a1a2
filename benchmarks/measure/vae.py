"""The VAE of a window: its seconds and errors, beside diffusers' on the same weights and inputs.

Latents are Gaussian, frames those of a sample clip. Errors are against diffusers in float32, of frames before
clamping; on the CPU ours is float32 too. PSNR is that of the relative error at a deviation of 0.5 in [-1, 1],
about that of a picture: random weights give frames of any size.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child, is_lost, rows_of
from trt_wan.benchmarks.measure.quality import Wanted
from trt_wan.benchmarks.measure.similarity import relative_error
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.errors import TrtWanError, UsageError
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.executors import Array
from trt_wan.runtime.video.reader import Clip

OURS_MODULE = "trt_wan.benchmarks.measure.vae_job"
PEERS_MODULE = "trt_wan.benchmarks.peers.diffusers_vae"
SCHEMA = "trt-wan-bench-vae/1"
FLOAT32 = "diffusers float32"  # the row that has no errors
ON_THE_CPU = (
    "Seconds are the medians of the runs after a first one. Networks: their calls alone. Errors: "
    "relative, against float32."
)
CONTAINS = (
    "Seconds are from the host to the host, the medians of the runs after a first one. Ours: pieces are "
    "copied to the host and checked while the GPU goes on, as in a job. diffusers: the clip is copied as a "
    "whole, through page-locked memory. Networks: without copies. Errors: relative, against float32."
)
DEVIATION = 0.5  # a picture's levels lie in [-1, 1]


@dataclass(frozen=True)
class VaeRow:
    """Medians in seconds, from the host to the host. `networks` are without the copies."""

    name: str
    decode: float
    encode: float
    decode_networks: float | None = None
    encode_networks: float | None = None
    decode_error: float | None = None  # relative, against float32
    encode_error: float | None = None
    candidates: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, Any] = field(default_factory=dict)  # seconds and networks of every run, by half

    @property
    def psnr(self) -> float | None:
        return 20 * math.log10(2 / (self.decode_error * DEVIATION)) if self.decode_error else None


@dataclass(frozen=True)
class VaeTimes:
    shape: Shape
    card: Card
    weights: str
    rows: list[VaeRow]
    not_measured: list[str]
    finished: bool = True  # False: more rows are to come
    lost: list[str] = field(default_factory=list)  # entries of `not_measured` whose process was lost
    schema: str = SCHEMA
    stem: ClassVar[str] = "vae"

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "psnr": row.psnr} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def sheets(self) -> list[Sheet | str]:
        def cells(row: VaeRow) -> Row:
            def half(seconds: float, networks: float | None, error: float | None) -> Row:
                return (
                    Figure(seconds, "s"),
                    Figure(networks, "s") if networks else "",
                    Figure(error, "error") if error else "",
                )

            return (
                row.name,
                *half(row.decode, row.decode_networks, row.decode_error),
                Figure(row.psnr) if row.psnr else "",
                *half(row.encode, row.encode_networks, row.encode_error),
            )

        heads = ("decode s", "networks", "error", "PSNR dB", "encode s", "networks ", "error ")
        title = f"The VAE of {self.shape.title}, {self.card.hardware}"
        chosen = [
            (row.name, ", ".join(f"{network} = {name}" for network, name in row.candidates.items()))
            for row in self.rows
            if row.candidates
        ]
        return [
            Sheet("vae", title, heads, [cells(row) for row in self.rows]),
            *([Sheet("candidates", "Candidates", (), chosen)] if chosen else []),
            f"Weights: {self.weights}. {ON_THE_CPU if self.card.gpu is None else CONTAINS}",
            *(f"Not measured: {text}" for text in self.not_measured),
        ]

    def draw(self) -> Mapping[str, Any]:
        return {}


class _Found:
    """The rows so far. Each is told and kept as it comes, with its errors once float32 is known."""

    def __init__(
        self,
        shape: Shape,
        weights: str,
        progress: Progress,
        keep: Callable[[VaeTimes], object],
    ) -> None:
        self.card, self.not_measured, self.rows = read_card(), list[str](), list[VaeRow]()
        self._shape, self._weights, self._progress, self._keep = shape, weights, progress, keep
        self.lost: list[str] = []
        self._files: dict[str, str] = {}  # the results by row
        self._exact: Mapping[str, Array] | None = None

    def times(self, finished: bool) -> VaeTimes:
        rows, left_out = list(self.rows), list(self.not_measured)
        return VaeTimes(self._shape, self.card, self._weights, rows, left_out, finished, lost=list(self.lost))

    def add(self, answer: Mapping[str, Any]) -> None:
        row = _row(answer)
        self._files[row.name] = answer["target"]
        self._tell(f"{row.name}: decode {row.decode:.3f} s, encode {row.encode:.3f} s")
        if row.name == FLOAT32:
            with np.load(answer["target"]) as made:
                self._exact = dict(made)
            self.rows = [self._compared(each) for each in self.rows]
        self.rows.append(self._compared(row))
        self._keep(self.times(finished=False))

    def leave_out(self, text: str) -> None:
        self.not_measured.append(text)
        self._tell(f"not measured: {text}")

    def _tell(self, text: str) -> None:
        self._progress(Note(text))

    def _compared(self, row: VaeRow) -> VaeRow:
        if self._exact is None or row.name == FLOAT32:
            return row
        with np.load(self._files[row.name]) as made:
            errors = {name: relative_error(made[name], exact) for name, exact in self._exact.items()}
        row = replace(row, decode_error=errors["decoded"], encode_error=errors["encoded"])
        psnr = f" (PSNR {row.psnr:.1f} dB)" if row.psnr else ""
        self._tell(
            f"{row.name}: decode off by {errors['decoded']:.2e}{psnr}, encode by {errors['encoded']:.2e}"
        )
        return row


def measure_vae(
    shape: Shape,
    wanted: Sequence[Wanted],
    weights: str,
    repeats: int = 3,
    progress: Progress = silent,
    keep: Callable[[VaeTimes], object] = lambda unfinished: None,
    budget: float | None = None,
) -> VaeTimes:
    """`weights` is a folder of files, which diffusers reads too. `keep` gets the rows so far after every one:
    compiling diffusers' takes minutes, so that comes last. Rows that `budget` seconds end are not measured.
    Raises the error of our first row if no row of ours runs, and UsageError for a row with several GPUs: its
    ranks would wait for each other.
    """
    if any((one.settings.get("gpus") or 1) > 1 for one in wanted):
        raise UsageError(
            "The VAE is timed on one GPU here.", "Leave gpus out of --row, or use bench --gpus 1,2."
        )
    limit, found, failures = Budget(budget), _Found(shape, weights, progress, keep), list[TrtWanError]()
    files: dict[str, Any] = {}
    with workplace(shape) as (env, clips), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = _write_inputs(folder / "inputs.npz", shape, clips)
        for n, one in enumerate(wanted):
            progress(Note(f"the VAE of {one.name}"))
            spec = Spec(shape, clips, 1, dict(one.settings), weights)
            arguments = [spec.to_json(), inputs, target := str(folder / f"{n}.npz"), str(repeats)]

            def run(arguments: list[str] = arguments) -> dict[str, Any]:
                if limit.over:
                    raise UsageError(limit.over, "Use a larger --budget.")
                with Child(OURS_MODULE, arguments, env, limit.patience()) as child:
                    return child.read()

            try:
                answer = with_graphs(run, progress)
            except TrtWanError as error:
                failures.append(error)
                found.leave_out(f"{one.name}: {limit.over or error.message}")
                if is_lost(error, limit):
                    found.lost.append(found.not_measured[-1])
                continue
            files = files or answer["files"]
            found.add({**answer, "name": one.name, "target": target})
        if not files:
            if limit.over:
                raise UsageError(f"Nothing was measured: {limit.over}.", "Use a larger --budget.")
            raise failures[0]
        progress(Note("the VAE of diffusers"))
        given = {
            "weights": files["vae"],
            "inputs": inputs,
            "out": temporary,
            "device": "cpu" if found.card.gpu is None else "cuda",
            "repeats": str(repeats),
        }
        options = [
            *shape.arguments(),
            *(text for name, value in given.items() for text in (f"--{name}", value)),
        ]
        for answer in rows_of(PEERS_MODULE, options, env, found.not_measured, progress, limit):
            found.add(answer)
        return found.times(finished=True)


def _write_inputs(path: Path, shape: Shape, clips: str) -> str:
    plan = shape.plan
    latents = (shape.config.vae.latent_channels, plan.latent_frames, plan.latent_height, plan.latent_width)
    with Clip(Path(clips) / "src_pose.mp4") as clip:
        frames = clip.window(list(range(plan.frames)))
    np.savez(path, latents=np.random.default_rng(0).standard_normal(latents, np.float32), frames=frames)
    return str(path)


def _row(answer: Mapping[str, Any]) -> VaeRow:
    def median(half: str, of: str) -> float | None:
        return Spread.of(answer[half][of]).median if of in answer[half] else None

    return VaeRow(
        answer["name"],
        Spread.of(answer["decode"]["seconds"]).median,
        Spread.of(answer["encode"]["seconds"]).median,
        median("decode", "networks"),
        median("encode", "networks"),
        candidates=answer.get("candidates", {}),
        runs={half: answer[half] for half in ("decode", "encode")},
    )
