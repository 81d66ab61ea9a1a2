"""LPIPS (AlexNet) of the frames of two recordings, in a separate process, because it needs torch.

    python -m trt_wan.benchmarks.measure.lpips_score A.npz B.npz

Prints {"lpips": mean over frames}, or {"reason": text} if the package or its network's weights are missing.
"""

import json
import sys
from typing import Any

import numpy as np


def score(first: str, second: str) -> float:
    import lpips
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = lpips.LPIPS(net="alex", verbose=False).to(device)

    def signal(frame: Any) -> torch.Tensor:
        return torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1

    a, b = np.load(first)["frames"], np.load(second)["frames"]
    with torch.inference_mode():
        values = [float(network(signal(x), signal(y))) for x, y in zip(a, b, strict=True)]
    return float(np.mean(values))


def main() -> None:
    try:
        answer: dict[str, Any] = {"lpips": score(*sys.argv[1:])}
    except ModuleNotFoundError as error:  # lpips itself brings torch, and no extra has it
        answer = {"reason": f"{error.name} is not installed. Run:\npip install lpips"}
    except Exception as error:  # no connection to fetch AlexNet, any error of torch
        answer = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
