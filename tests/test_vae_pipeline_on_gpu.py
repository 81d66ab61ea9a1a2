"""The native VAE over two GPUs or more has the bits of one."""

from collections.abc import Iterator
from typing import Any

import pytest
from peers_on_gpu import Processes, gpu_count
from vae_on_gpus import close_vae, digests, open_vae

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.shape import Plan
from trt_wan.runtime.segments import native


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    if gpu_count() < 2:
        pytest.skip("Two GPUs are needed.")
    processes = Processes(gpu_count())
    yield processes
    processes.close()


def missing(gpu: Any, ranks: Any, candidate: str) -> str | None:
    return native.missing(VAE[0], gpu.capability, candidate)


@pytest.mark.parametrize("candidate", ["native", "cudnn"])
@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("tiny", Plan(80, 48, 21, "bf16")),
        ("tiny", Plan(80, 48, 17, "bf16", vae_chunk=2)),
        ("14b", Plan(208, 112, 21, "bf16")),
        ("tiny", Plan(80, 48, 145, "bf16")),  # more chunks than latents may be unread
    ],
    ids=str,
)
def test_ranks_have_the_bits_of_one_gpu(processes: Processes, model: str, plan: Plan, candidate: str) -> None:
    for reason in processes.call(missing, candidate):
        if reason is not None:
            pytest.skip(reason)
    processes.call(open_vae, model, plan, candidate, 2 << 30, seconds=120)
    alone = processes.call(digests, False, seconds=60)
    made = processes.call(digests, True, seconds=60)
    processes.call(close_vae)
    assert made[0] == alone[0]
    for rank in made[1:]:
        assert rank == {**alone[0], "decoded": "", "decoded again": ""}
