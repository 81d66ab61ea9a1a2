"""Peer: LightX2V from a checkout, with the user's checkpoint: it takes no random weights.

    python -m trt_wan.benchmarks.peers.lightx2v --path ~/LightX2V --weights ~/Wan2.2-Animate-14B --steps 20

It runs its own command on our clips with the repository's own configuration for Animate, at our size, and
reads the step times that it logs (it synchronises around each). Every measurement is a whole job.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trt_wan.benchmarks.measure.sample_clips import write_clips
from trt_wan.benchmarks.peers.child import WARM_UP, NotRun, Peer, main
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.runtime.prompts import DEFAULT_NEGATIVE_PROMPT, DEFAULT_PROMPT

CONFIG = "configs/wan22/wan_animate.json"
STEP = re.compile(r"Run Dit every step cost ([0-9.]+) seconds")
# Its scripts/base/base.sh: bf16 throughout, and the profiler that logs steps.
ENVIRONMENT = {"DTYPE": "BF16", "SENSITIVE_LAYER_DTYPE": "None", "PROFILING_DEBUG_LEVEL": "2"}


class LightX2V:
    def __init__(self, shape: Shape, checkout: Path, weights: Path) -> None:
        self.shape, self.checkout, self.weights = shape, checkout, weights
        self.config = json.loads((checkout / CONFIG).read_text())
        self.config |= {
            "target_width": shape.width,
            "target_height": shape.height,
            "target_video_length": shape.window,
            "enable_cfg": False,
        }
        environment = ", ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        self.settings = {
            "command": f"python -m lightx2v.infer --model_cls wan2.2_animate --task animate, {environment}",
            "configuration": json.dumps(self.config),
            "commit": self._commit(),
            "weights": str(weights),
            "in the step": "its scheduler and one forward pass, faces and pose encoded anew as its code does",
        }

    def warm_up(self) -> None:
        return None  # every measurement has its own

    def timed(self, steps: int) -> list[float]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            clips = write_clips(folder / "clips", self.shape.width, self.shape.height, self.shape.window)
            config = folder / "config.json"
            config.write_text(json.dumps({**self.config, "infer_steps": WARM_UP + steps}))
            command = [
                *(sys.executable, "-m", "lightx2v.infer", "--model_cls", "wan2.2_animate"),
                *("--task", "animate", "--model_path", str(self.weights), "--config_json", str(config)),
                *("--src_pose_path", str(clips / "src_pose.mp4")),
                *("--src_face_path", str(clips / "src_face.mp4")),
                *("--src_ref_images", str(clips / "src_ref.png")),
                *("--prompt", DEFAULT_PROMPT, "--negative_prompt", DEFAULT_NEGATIVE_PROMPT),
                *("--save_result_path", str(folder / "out.mp4")),
            ]
            paths = os.pathsep.join(filter(None, (str(self.checkout), os.environ.get("PYTHONPATH"))))
            env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
            ran = subprocess.run(command, capture_output=True, text=True, env=env)
        seconds = [float(found) for found in STEP.findall(ran.stdout + ran.stderr)]
        if ran.returncode or len(seconds) != WARM_UP + steps:
            last = [line for line in ran.stderr.splitlines() if line.strip()][-1:]
            raise NotRun(f"it ended with {ran.returncode} after {len(seconds)} steps: {' '.join(last)}")
        return seconds[WARM_UP:]

    def memory(self) -> Mapping[str, int]:
        return {}

    def parts(self) -> Mapping[str, float]:
        return {}

    def rest(self) -> None:
        pass  # nothing runs between two measurements

    def wake(self) -> None:
        pass

    def _commit(self) -> str:
        asked = ["git", "-C", str(self.checkout), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "not known"


def make(shape: Shape, device: str, options: argparse.Namespace) -> Peer:
    if options.path is None or options.weights is None:
        raise NotRun("it needs --lightx2v PATH and --weights DIR: a checkout, and real weights")
    if not (options.path / CONFIG).exists():
        raise NotRun(f"{options.path} has no {CONFIG}")
    return LightX2V(shape, options.path, options.weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", type=Path, help="the checkout")
    parser.add_argument("--weights", type=Path, help="the checkpoint's folder")


if __name__ == "__main__":
    main("lightx2v", make, add_arguments)
