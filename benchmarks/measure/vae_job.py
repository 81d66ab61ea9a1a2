"""Our VAE in a measured process: a window's decode and encode, as a job runs them.

    python -m trt_wan.benchmarks.measure.vae_job SPEC INPUTS TARGET REPEATS

SPEC is a `Spec` in JSON. INPUTS (.npz) has `latents` [16, T, h, w] and `frames` uint8 [F, H, W, 3]. TARGET
(.npz) gets `decoded` float32 [3, F, H, W] and `encoded` [16, T, h, w]. Seconds are from latents or frames on
the host to all results on the host; `networks` are those on the GPU alone. Frames are checked and dropped as
they come, as the pipeline hands them on: keeping a window means 0.4 GB of new pages a run.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trt_wan.benchmarks.measure.measured_process import Opened, Spec
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.timed import TimedExecutor, timed
from trt_wan.engines.choice.candidates import VAE
from trt_wan.runtime.conditioning import to_signal
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.finite import is_finite_sum
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.vae import decode, encode


def run_vae(spec: Spec, inputs: str, target: str, repeats: int) -> None:
    given = np.load(inputs)
    executors: list[TimedExecutor] = []
    told = Opened()

    def observe(executor: Executor) -> Executor:
        executors.append(timed(executor))
        return executors[0]

    shape = spec.shape
    with spec.open(told, observe) as opened:
        model = opened.begin(spec.job(), shape.width, shape.height, shape.window, told)
        results, times = halves(model, executors[0], given["latents"], to_signal(given["frames"]), repeats)
    np.savez(target, decoded=results["decoded"], encoded=results["encoded"])
    chosen = {name: row for name, row in told.candidates.items() if name.startswith("vae_")}
    say("vae", **times, candidates=chosen, files=told.files)


def halves(
    model: Model, executor: TimedExecutor, latents: Array, signal: Array, repeats: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The results `decoded` and `encoded`, and the times `decode` and `encode`."""
    # A thread loads the transformer from now on. In a job that has ended before a window is decoded; here
    # decode took three times as long beside it.
    model.release(*(name for name in model.networks if name not in VAE))

    def take() -> None:
        for frames in decode(model, latents):
            is_finite_sum(frames)

    results = {"decoded": np.concatenate(list(decode(model, latents)), 1), "encoded": encode(model, signal)}
    times = {
        "decode": _timed(take, executor, repeats),
        "encode": _timed(lambda: encode(model, signal), executor, repeats),
    }
    return results, times


def _timed(act: Callable[[], object], executor: TimedExecutor, repeats: int) -> dict[str, list[float]]:
    """The seconds of each run but the first."""
    act()
    executor.watched()  # forgets the times so far
    seconds, networks = [], []
    for _ in range(repeats):
        executor.start_watching()
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
        networks.append(sum(sum(calls) for calls in executor.watched().values()))
    return {"seconds": seconds, "networks": networks}


def main() -> None:
    spec, inputs, target, repeats = sys.argv[1:]
    answering(lambda: run_vae(Spec.from_json(spec), inputs, target, int(repeats)))


if __name__ == "__main__":
    main()
