"""The first job of a worker: one window, one step, at the server's usual size. It opens the model, loads the
weights and keeps the features of the usual prompt, so that the first client waits for its own steps alone.
"""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

from trt_wan.serve.settings import ServeSettings
from trt_wan.worker.worker import Runs

RATE = Fraction(30)


def warm_up(id: str, worker: Runs, settings: ServeSettings, place: Path) -> dict[str, Any] | None:
    """The outcome as the worker tells it."""
    from trt_wan.cli.sizes import size_of

    width, height = size_of(str(settings.defaults.get("size", "832x480")))
    window = int(settings.defaults.get("window", 77))
    folder = place / id
    shutil.rmtree(folder, ignore_errors=True)
    write_clips(folder, width, height, window)
    command = ["run", f"--inputs={folder}", "-o", str(folder / "out.mp4"), *settings.plain_model]
    command += ["--no-sidecar", f"--window={window}", "--steps=1"]
    try:
        return worker.run(id, command, lambda event: None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_clips(folder: Path, width: int, height: int, frames: int) -> None:
    """Prepared clips of that size, grey."""
    import numpy as np

    from trt_wan.runtime.video.clips import FACE_SIZE
    from trt_wan.runtime.video.pictures import write_picture
    from trt_wan.runtime.video.writer import VideoWriter

    folder.mkdir(parents=True)
    grey = np.full((height, width, 3), 128, np.uint8)
    write_picture(folder / "src_ref.png", grey)
    for name, frame in (
        ("src_pose.mp4", grey),
        ("src_face.mp4", np.full((FACE_SIZE, FACE_SIZE, 3), 128, np.uint8)),
    ):
        with VideoWriter(folder / name, frame.shape[1], frame.shape[0], RATE) as writer:
            for _ in range(frames):
                writer.write(frame)
            writer.finish()
