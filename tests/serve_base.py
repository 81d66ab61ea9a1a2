"""For the scripts about the real server: weights, graphs and clips of tiny_job.py, and a few checks."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from serving import Server, serving
from tiny_job import BUILD, PLAN, TRT_WAN, as_argv, prepare, write_sound

from trt_wan.runtime.weights.tiny import write_tiny_weights

PATIENCE = float(os.environ.get("PATIENCE", 60))  # seconds for an end, a step or a job
WORKER = "trt_wan.worker.child"


@dataclass(frozen=True)
class Base:
    folder: Path
    home: Path

    @classmethod
    def made(cls, folder: Path, home: Path | None = None) -> "Base":
        """`home` has the graphs of tiny_job.py."""
        folder = folder.absolute()
        base = cls(folder, home or folder / "home")
        if not base.clips.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if home is None:
                subprocess.run(as_argv(BUILD), env=base.environment, check=True, capture_output=True)
            write_tiny_weights(base.weights, seed=0)
            prepare(folder / "clips", write_sound(folder / "tone.m4a", 2))
            shutil.make_archive(str(folder / "clips"), "zip", folder / "clips")
        return base

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def clips(self) -> Path:
        return self.folder / "clips.zip"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TRT_WAN_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def single(self, seed: int, steps: int) -> bytes:
        """The video of `trt-wan run` with this seed and so many steps."""
        path = self.folder / f"single-{seed}-{steps}.mp4"
        if not path.exists():
            files = [f"--inputs={self.folder / 'clips'}", f"--weights={self.weights}", "-o", str(path)]
            job = [f"--window={PLAN.frames}", f"--seed={seed}", f"--steps={steps}", "--no-sidecar"]
            command = [*TRT_WAN, "run", *files, *job]
            subprocess.run(command, env=self.environment, check=True, capture_output=True)
        return path.read_bytes()

    @contextmanager
    def serving(self, data: Path, *options: str, token: str | None = None) -> Iterator[Server]:
        with serving(data, self.home, f"--weights={self.weights}", *options, token=token) as server:
            yield server


def children(server: Server, module: str = "") -> list[psutil.Process]:
    """The server's processes whose command line names `module`."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(server.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if module in " ".join(child.cmdline()):
                    found.append(child)
    return found


def resident(process: psutil.Process) -> float:
    """MB of memory; 0 for a process that has ended."""
    with suppress(psutil.Error):
        return float(process.memory_info().rss / 1e6)
    return 0.0


def verdict(faults: Sequence[str]) -> int:
    """Prints the faults and returns the exit code."""
    for fault in faults[:50]:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults" if faults else "no faults", flush=True)
    return 1 if faults else 0
