"""Our VAE in a measured process: a window's decode and encode, as a job runs them.

    python -m trt_wan.benchmarks.measure.vae_job SPEC INPUTS TARGET REPEATS

SPEC is a `Spec` in JSON. INPUTS (.npz) has `latents` [16, T, h, w] and `frames` uint8 [F, H, W, 3]. TARGET
(.npz) gets `decoded` float32 [3, F, H, W] and `encoded` [16, T, h, w]. Seconds include the copies from and to
the host; `networks` are those on the GPU alone.
"""

import sys
import time
from collections.abc import Callable

import numpy as np

from trt_wan.benchmarks.measure.measured_process import Opened, Spec
from trt_wan.benchmarks.measure.processes import answering, say
from trt_wan.benchmarks.measure.timed import TimedExecutor, timed
from trt_wan.runtime.conditioning import to_signal
from trt_wan.runtime.executors import Array, Executor
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
        signal = to_signal(given["frames"])
        decoded, decoding = _timed(
            lambda: np.concatenate(list(decode(model, given["latents"])), 1), executors[0], repeats
        )
        encoded, encoding = _timed(lambda: encode(model, signal), executors[0], repeats)
    np.savez(target, decoded=decoded, encoded=encoded)
    chosen = {name: row for name, row in told.candidates.items() if name.startswith("vae_")}
    say("vae", decode=decoding, encode=encoding, candidates=chosen, files=told.files)


def _timed(
    act: Callable[[], Array], executor: TimedExecutor, repeats: int
) -> tuple[Array, dict[str, list[float]]]:
    """The result of `act` and the seconds of each run but the first."""
    result = act()
    executor.watched()  # forgets what was timed so far
    seconds, networks = [], []
    for _ in range(repeats):
        executor.start_watching()
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
        networks.append(sum(sum(calls) for calls in executor.watched().values()))
    return result, {"seconds": seconds, "networks": networks}


def main() -> None:
    spec, inputs, target, repeats = sys.argv[1:]
    answering(lambda: run_vae(Spec.from_json(spec), inputs, target, int(repeats)))


if __name__ == "__main__":
    main()
