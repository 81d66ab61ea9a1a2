"""Peer memory on two GPUs or more: the bits of one GPU, and no wait for a rank that is gone."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from peers_on_gpu import Processes, check_numbers, gpu_count, open_waiting, wait_for_lost

from trt_wan.runtime.parallel.shards import Shards

# Slots, tokens of a slot, heads, channels, and heads of the first group of two; 0: one group
CASES = [
    (3, 48, 40, 128, 3),
    (3, 50, 40, 128, 0),
    (3, 51, 40, 128, 3),
    (2, 33, 12, 64, 1),
    (5, 7, 2, 128, 0),
    (2, 5, 3, 16, 1),
]


@pytest.fixture(scope="module")
def count() -> int:
    if gpu_count() < 2:
        pytest.skip("Two GPUs are needed.")
    return gpu_count()


@pytest.fixture(scope="module")
def processes(count: int) -> Iterator[Processes]:
    processes = Processes(count)
    yield processes
    processes.close()


@pytest.mark.parametrize("to_rows", (False, True))
@pytest.mark.parametrize("kernels", (False, True))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_have_the_bits_of_one_gpu(
    processes: Processes, count: int, case: tuple[int, int, int, int, int], kernels: bool, to_rows: bool
) -> None:
    slots, tokens, heads, channels, first = case
    rest = -(-heads // count) - first
    groups = (first, rest) if first and rest > 0 else ()
    shards = Shards(count, slots, tokens, heads, channels, groups)
    if to_rows and not shards.is_even:
        pytest.skip("ranks would lack tokens or heads")
    shards = replace(shards, to_rows=to_rows)
    processes.call(check_numbers, shards, kernels)


@pytest.mark.parametrize("kernels", (False, True))
def test_a_lost_rank_ends_all_waits(count: int, kernels: bool) -> None:
    shards = Shards(2, 3, 50, 4, 128)
    processes = Processes(2)
    try:
        processes.call(open_waiting, shards, kernels)
        processes.send(wait_for_lost, shards)
        time.sleep(2)
        assert not processes.controls[0].poll(), "it did not wait"
        killed = time.monotonic()
        processes.kill(1)
        ended, problem = processes.result(0)
        assert not problem and 0 < ended - killed < 1, (problem, ended - killed)
    finally:
        processes.close()
