"""The VAE of a window: its seconds and errors, beside diffusers' on the same weights and inputs.

Latents are Gaussian, frames those of a sample clip. Errors are against diffusers in float32, of frames before
clamping; on the CPU ours is float32 too. PSNR is that of the relative error at a deviation of 0.5 in [-1, 1],
about that of a picture: random weights give frames of any size.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.processes import Child, rows_of
from trt_wan.benchmarks.measure.quality import Wanted
from trt_wan.benchmarks.measure.similarity import relative_error
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.video.reader import Clip

OURS_MODULE = "trt_wan.benchmarks.measure.vae_job"
PEERS_MODULE = "trt_wan.benchmarks.peers.diffusers_vae"
SCHEMA = "trt-wan-bench-vae/1"
DEVIATION = 0.5  # of a picture's levels in [-1, 1]


@dataclass(frozen=True)
class VaeRow:
    """Medians in seconds. `networks` are ours on the GPU, without the copies."""

    name: str
    decode: float
    encode: float
    decode_networks: float | None = None
    encode_networks: float | None = None
    decode_error: float | None = None  # relative, against float32
    encode_error: float | None = None
    candidates: Mapping[str, str] = field(default_factory=dict)

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
            f"Weights: {self.weights}. Ours includes the copies from and to the host, diffusers does not.",
            *(f"Not measured: {text}" for text in self.not_measured),
        ]

    def draw(self) -> Mapping[str, Any]:
        return {}


def measure_vae(
    shape: Shape,
    wanted: Sequence[Wanted],
    weights: str,
    repeats: int = 3,
    progress: Progress = silent,
    keep: Callable[[VaeTimes], object] = lambda unfinished: None,
) -> VaeTimes:
    """`weights` is a folder of files, which diffusers reads too. `keep` gets the rows so far after every one:
    compiling diffusers' takes minutes.
    """
    card, not_measured = read_card(), list[str]()
    answers: list[dict[str, Any]] = []
    with workplace(shape) as (env, clips), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def found(finished: bool) -> VaeTimes:
            exact = next((a["target"] for a in answers if a["name"] == "diffusers float32"), None)
            rows = [_row(answer, exact) for answer in answers]
            return VaeTimes(shape, card, weights, rows, not_measured, finished)

        def add(answer: dict[str, Any]) -> None:
            answers.append(answer)
            progress(_told(answer))
            keep(found(finished=False))

        inputs = _write_inputs(folder / "inputs.npz", shape, clips)
        for n, one in enumerate(wanted):
            progress(Note(f"the VAE of {one.name}"))
            spec = Spec(shape, clips, 1, dict(one.settings), weights)
            arguments = [spec.to_json(), inputs, target := str(folder / f"{n}.npz"), str(repeats)]

            def run(arguments: list[str] = arguments) -> dict[str, Any]:
                with Child(OURS_MODULE, arguments, env) as child:
                    return child.read()

            try:
                add({**with_graphs(run, progress), "name": one.name, "target": target})
            except TrtWanError as error:
                not_measured.append(f"{one.name}: {error.message}")
                failure = error
        if not answers:
            raise failure
        progress(Note("the VAE of diffusers"))
        given = {
            "weights": answers[0]["files"]["vae"],
            "inputs": inputs,
            "out": temporary,
            "device": "cpu" if card.gpu is None else "cuda",
            "repeats": str(repeats),
        }
        options = [text for name, value in given.items() for text in (f"--{name}", value)]
        for answer in rows_of(PEERS_MODULE, [*shape.arguments(), *options], env, not_measured, progress):
            add(answer)
        return found(finished=True)


def _write_inputs(path: Path, shape: Shape, clips: str) -> str:
    plan = shape.plan
    latents = (shape.config.vae.latent_channels, plan.latent_frames, plan.latent_height, plan.latent_width)
    with Clip(Path(clips) / "src_pose.mp4") as clip:
        frames = clip.window(list(range(plan.frames)))
    np.savez(path, latents=np.random.default_rng(0).standard_normal(latents, np.float32), frames=frames)
    return str(path)


def _told(answer: Mapping[str, Any]) -> Note:
    decode, encode = (Spread.of(answer[half]["seconds"]).median for half in ("decode", "encode"))
    return Note(f"{answer['name']}: decode {decode:.3f} s, encode {encode:.3f} s")


def _row(answer: Mapping[str, Any], exact: str | None) -> VaeRow:
    def median(half: str, of: str) -> float | None:
        return Spread.of(answer[half][of]).median if of in answer[half] else None

    errors: dict[str, float | None] = {}
    if exact is not None and exact != answer["target"]:
        made, expected = np.load(answer["target"]), np.load(exact)
        errors = {name: relative_error(made[name], expected[name]) for name in ("decoded", "encoded")}
    return VaeRow(
        answer["name"],
        Spread.of(answer["decode"]["seconds"]).median,
        Spread.of(answer["encode"]["seconds"]).median,
        median("decode", "networks"),
        median("encode", "networks"),
        errors.get("decoded"),
        errors.get("encoded"),
        answer.get("candidates", {}),
    )
