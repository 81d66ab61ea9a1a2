"""A start with weights from files beside generated weights: resident and streamed, prompt known and new.

    python -m trt_wan.benchmarks.measure.weights_table --fp8 DIR --bf16 DIR --vram 12 --tier fast --out FOLDER

`tests/full_size.py` writes files of full size. The page cache is warm: every file is read before its first
job. Every case is a new process. A prompt is new once; the same job again finds it in the text cache.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trt_wan.benchmarks.machine.card import Card, read_card
from trt_wan.benchmarks.machine.monitor import Monitor
from trt_wan.benchmarks.measure.measured_process import Spec
from trt_wan.benchmarks.measure.plain_jobs import as_argument
from trt_wan.benchmarks.measure.processes import Child
from trt_wan.benchmarks.measure.script import add_arguments, finish, say_note, settings_from
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.workplace import with_graphs, workplace
from trt_wan.benchmarks.peers.shape import Shape, shape_from
from trt_wan.benchmarks.report.sheet import Figure, Row, Sheet
from trt_wan.runtime.events import Note, Progress

MODULE = "trt_wan.benchmarks.measure.plain_jobs"
PIECE = 1 << 24  # bytes


@dataclass(frozen=True)
class StartRow:
    weights: str  # fp8 files, bf16 files, generated
    memory: str  # resident, or the limit
    prompt: str  # new, known
    precision: str
    first_step_seconds: float  # from the process's start to the first finished step
    step_seconds: list[float]
    loaded_bytes: int | None
    loading_seconds: float | None
    pinned_bytes: int | None
    host_bytes: int | None  # peak without the page cache
    device_bytes: int | None
    job_seconds: float  # from the process's start to the last frame
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.weights}, {self.memory}, {self.prompt} prompt"


@dataclass(frozen=True)
class WeightsTable:
    card: Card
    shape: Shape
    settings: Mapping[str, Any]
    rows: list[StartRow]
    stem: ClassVar[str] = "weights-table"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sheets(self) -> list[Sheet | str]:
        def cells(row: StartRow) -> Row:
            rate = (
                row.loaded_bytes / row.loading_seconds if row.loaded_bytes and row.loading_seconds else None
            )
            return (
                row.name,
                Figure(row.first_step_seconds, "s"),
                Figure(Spread.of(row.step_seconds[1:] or row.step_seconds).median, "s"),
                Figure(rate, "GB/s"),
                Figure(row.host_bytes, "GB"),
                Figure(row.pinned_bytes, "GB"),
                Figure(row.device_bytes, "GB"),
                Figure(row.job_seconds, "s"),
            )

        heads = ("first step s", "s/step", "GB/s", "host peak", "pinned", "GPU peak", "whole job s")
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        title = f"Starts, {self.shape.title}, {self.card.hardware}; {settings}; page cache warm"
        return [Sheet("start", title, heads, [cells(row) for row in self.rows])]

    def draw(self) -> Mapping[str, Any]:
        return {}


def warm_page_cache(folder: Path, progress: Progress) -> None:
    """Reads every checkpoint in `folder` once."""
    start, size, piece = time.perf_counter(), 0, bytearray(PIECE)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(piece):
                    size += count
    rate = size / 1e9 / (time.perf_counter() - start)
    progress(Note(f"read {size / 1e9:.1f} GB in {folder} at {rate:.1f} GB/s"))


def measure(
    shape: Shape,
    files: Mapping[str, str | None],
    limits: Sequence[float | None],
    steps: int,
    settings: Mapping[str, Any],
    progress: Progress,
) -> WeightsTable:
    """`files` are folders by name, None for generated weights. `limits` are GB of GPU memory or None."""
    rows = []
    with workplace(shape) as (env, clips):
        base = Spec(shape, clips, steps, dict(settings))
        progress(Note("a job that is not counted: it finishes the kernels"))
        with_graphs(partial(_start, base, env), progress)
        for name, folder in files.items():
            if folder is not None:
                warm_page_cache(Path(folder), progress)
            for limit in limits:
                limited = dict(settings) | ({} if limit is None else {"vram": limit})
                memory = "resident" if limit is None else f"{limit:g} GB"
                spec = replace(base, weights=folder, settings=limited, prompt=f"{name}, {memory}")
                for prompt in ("new", "known"):
                    said = with_graphs(partial(_start, spec, env), progress)
                    row = StartRow(name, memory, prompt, **said)
                    progress(Note(f"{row.name}: first step after {row.first_step_seconds:.2f} s"))
                    rows.append(row)
    return WeightsTable(read_card(), shape, settings, rows)


def _start(spec: Spec, env: Mapping[str, str]) -> dict[str, Any]:
    """The figures of `StartRow` for one job in a new process."""
    with Monitor.open() as monitor, Child(MODULE, [as_argument([spec])], env) as child:
        job = child.read()
        ended = job["at"]
        closed = child.read()
    return {
        "precision": job["precision"],
        "first_step_seconds": job["first_step_at"] - child.started_at,
        "step_seconds": job["steps"],
        "loaded_bytes": job["loaded_bytes"],
        "loading_seconds": job["loading_seconds"],
        "pinned_bytes": job["pinned_bytes"],
        "host_bytes": closed["host_bytes"],
        "device_bytes": monitor.usage().peak_memory_bytes,
        "job_seconds": ended - child.started_at,
        "sha256": job["sha256"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--fp8", help="folder of checkpoints with a scaled FP8 transformer")
    parser.add_argument("--bf16", help="folder of checkpoints with a bf16 transformer")
    parser.add_argument("--vram", type=float, action="append", default=[], help="GB; may be repeated")
    options = parser.parse_args()
    given = {"fp8 files": options.fp8, "bf16 files": options.bf16}
    files = {name: folder for name, folder in given.items() if folder} | {"generated": None}
    settings = settings_from(options)
    limits = [None, *options.vram]
    finish(measure(shape_from(options), files, limits, options.steps, settings, say_note), options.out)


if __name__ == "__main__":
    main()
