"""Ranks: what they tell each other through memory and sockets, in threads of one process."""

import pickle
import time
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from ranks_in_threads import at_once, connected

from trt_wan.engines.config import ANIMATE_14B, TINY, ModelConfig
from trt_wan.engines.shape import Plan, ShardPlan
from trt_wan.errors import GraphError, MemoryShort, TrtWanError, UsageError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.parallel.planner import attend_seconds, choose_split, groups_of
from trt_wan.runtime.parallel.ranks import TOGETHER, RankLost, Ranks, shared_out
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.step_ratios import NotCalibrated

COUNTS = (1, 2, 3, 4)


@pytest.mark.parametrize("count", COUNTS)
def test_every_rank_gets_what_all_have_given_in_order(count: int) -> None:
    def rank(ranks: Ranks) -> tuple[list[bytes], list[bool], int, list[Array]]:
        told = ranks.exchange(f"from {ranks.rank}".encode())
        known = ranks.all_have([True, ranks.rank != 1, ranks.rank < 2])
        first = ranks.of_first([np.full(3, ranks.rank)] if ranks.rank == 0 else [])
        return told, known, ranks.least(7 - ranks.rank), first

    with connected(count) as all_ranks:
        for told, known, least, first in at_once([partial(rank, ranks) for ranks in all_ranks]):
            assert told == [f"from {k}".encode() for k in range(count)]
            assert known == [True, count == 1, count < 3] and least == 8 - count
            np.testing.assert_array_equal(first, [[0, 0, 0]])


@pytest.mark.parametrize("count", COUNTS)
def test_arrays_of_any_shape_type_and_layout_arrive(count: int) -> None:
    """In many calls in a row, which take turns with two halves of the memory. Ranks are slow at different
    times, so one that is ahead would write over what another still reads.
    """

    def arrays(rank: int, turn: int) -> list[Array]:
        rng = np.random.default_rng(100 * turn + rank)
        whole = rng.standard_normal((5 + rank, 6, turn % 3 + 1)).astype(np.float32)
        some = [whole, whole.transpose(2, 0, 1)[:, ::2], rng.integers(0, 9, 77, np.int8)]
        return [*some, np.float32(rank * turn) * np.ones(()), np.empty((0, 4), np.float16)][: turn % 5 + 1]

    def rank(ranks: Ranks) -> None:
        slow = np.random.default_rng(ranks.rank)
        for turn in range(30):
            given = ranks.gather(arrays(ranks.rank, turn))
            time.sleep(slow.uniform(0, 0.003))
            for other, made in enumerate(given):
                for array, expected in zip(made, arrays(other, turn), strict=True):
                    assert array.dtype == expected.dtype
                    np.testing.assert_array_equal(array, expected)

    with connected(count) as all_ranks:
        at_once([partial(rank, ranks) for ranks in all_ranks])


def test_views_may_be_given_on() -> None:
    """The arrays of one call are valid until the next has taken its own."""

    def rank(ranks: Ranks) -> list[int]:
        views = [np.full(1000, ranks.rank)]
        for _ in range(20):  # each rank passes on its neighbour's
            views = ranks.gather(views)[(ranks.rank + 1) % ranks.count]
        return [int(value) for value in np.unique(views[0])]

    with connected(3) as all_ranks:
        found = at_once([partial(rank, ranks) for ranks in all_ranks])
    assert found == [[(k + 20) % 3] for k in range(3)]


@pytest.mark.parametrize("count", COUNTS)
def test_tasks_of_all_ranks_come_first_in_step(count: int) -> None:
    """A task that needs all ranks, here to add their numbers, stands between tasks of one rank."""

    def rank(ranks: Ranks) -> list[Array]:
        def added() -> Array:
            return sum(number for (number,) in ranks.gather([np.array([1.0 + ranks.rank])]))

        def alone() -> Array:
            return np.array([0.5])

        return ranks.divide([(1.0, alone), (TOGETHER, added), (1.0, alone), (TOGETHER, added)])

    with connected(count) as all_ranks:
        for made in at_once([partial(rank, ranks) for ranks in all_ranks]):
            assert [float(array[0]) for array in made] == [0.5, count * (count + 1) / 2] * 2


def test_a_large_array_crosses() -> None:
    def rank(ranks: Ranks) -> float:
        (first,), (second,) = ranks.gather([np.full(40_000_000, 1 + ranks.rank, np.float32)])
        return float(first[-1] + second[0] + second[-1])

    with connected(2) as all_ranks:
        assert at_once([partial(rank, ranks) for ranks in all_ranks]) == [5.0, 5.0]


@pytest.mark.parametrize("count", COUNTS)
def test_each_task_is_computed_once_and_known_to_all(count: int) -> None:
    by: list[tuple[int, int]] = []

    def task(rank: int, number: int) -> Array:
        by.append((rank, number))
        return np.full((2, number), number * 1.5)

    def rank(ranks: Ranks) -> list[Array]:
        return ranks.divide([(cost, partial(task, ranks.rank, k)) for k, cost in enumerate((1, 5, 2, 2, 1))])

    with connected(count) as all_ranks:
        for made in at_once([partial(rank, ranks) for ranks in all_ranks]):
            assert [array.shape[1] for array in made] == [0, 1, 2, 3, 4]
            assert all((array == number * 1.5).all() for number, array in enumerate(made))
        assert at_once([partial(ranks.divide, []) for ranks in all_ranks]) == [[]] * count
    assert sorted(number for _, number in by) == [0, 1, 2, 3, 4]
    assert {rank for rank, _ in by} == set(range(count))


def test_work_is_shared_out_by_its_cost() -> None:
    assert shared_out([1, 1], 2) == [0, 1] and shared_out([1], 4) == [0] and shared_out([], 3) == []
    assert shared_out([1, 5, 2, 2, 1], 2) == [1, 0, 1, 1, 0]


def test_a_rank_that_ends_is_noticed_at_once_and_one_that_hangs_in_time() -> None:
    with connected(3, seconds=0.3) as (first, second, third):
        third.close()
        for ranks in (first, second):
            started = time.monotonic()
            with pytest.raises(RankLost, match="The process of GPU 2 has ended") as lost:
                ranks.exchange(b"")
            assert lost.value.rank == 2 and time.monotonic() - started < 0.3
    with connected(2, seconds=0.3) as (first, _), pytest.raises(RankLost, match="not answered for 0.3 s"):
        first.gather([np.zeros(2)])


def test_errors_of_all_classes_can_be_sent() -> None:
    errors: list[TrtWanError] = [
        MemoryShort("Too large.", "Use less."),
        GraphError("No graph.", command=("build", "--size", "64x48")),
        RankLost(3, "has ended"),
        NotCalibrated("No ratios.", "Make them.", ("bench",)),
        UsageError("No.", "Yes."),
    ]
    for error in errors:
        error.add_hint("And more.")
        sent = pickle.loads(pickle.dumps(error))
        assert type(sent) is type(error) and vars(sent) == vars(error) and str(sent) == str(error)


SIZES = [Plan(), Plan(1280, 720), Plan(112, 48, 13), Plan(64, 48, 13), Plan(48, 32, 77)]


@pytest.mark.parametrize("plan", SIZES, ids=lambda plan: f"{plan.width}x{plan.height}")
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("model", [ANIMATE_14B, TINY], ids=lambda model: model.name)
def test_every_token_and_head_belongs_to_one_rank(model: ModelConfig, plan: Plan, count: int) -> None:
    share = ShardPlan.of(plan, count)
    shards = Shards.of(model, share)
    tokens = [token for rank in range(count) for token in shards.tokens_of(rank)]
    assert tokens == list(range(plan.tokens_per_slot))
    assert [head for rank in range(count) for head in shards.heads_of(rank)] == list(range(shards.heads))
    assert share.tokens == plan.slots * shards.share and share.slots == plan.slots
    assert share.attended_heads(shards.heads) == shards.heads_each == sum(groups_of(shards, 132))


@pytest.mark.parametrize(("tokens", "heads", "count"), [(12, 2, 2), (21, 2, 2), (21, 3, 4), (5, 4, 8)])
def test_rows_and_heads_come_back_as_they_were(tokens: int, heads: int, count: int) -> None:
    rng, slots, size = np.random.default_rng(1), 3, 4
    shards = Shards(count, slots, tokens, heads, size)
    x = rng.standard_normal((slots * tokens, 7)).astype(np.float32)
    rows = [shards.split(x, rank) for rank in range(count)]
    assert {each.shape for each in rows} == {(slots * shards.share, 7)}
    np.testing.assert_array_equal(shards.join(rows), x)
    q = rng.standard_normal((heads, slots * tokens, size)).astype(np.float32)
    held = [shards.split(q.transpose(1, 0, 2), rank).transpose(1, 0, 2) for rank in range(count)]
    of_heads = [shards.to_heads(held, rank) for rank in range(count)]
    for rank, each in enumerate(of_heads):
        own = shards.heads_of(rank)
        np.testing.assert_array_equal(each[: len(own)], q[own.start : own.stop])
        assert not each[len(own) :].any()
    attended = [each.transpose(1, 0, 2).reshape(slots * tokens, -1) for each in of_heads]
    back = [shards.to_tokens(attended, rank) for rank in range(count)]
    np.testing.assert_array_equal(shards.join(back), q.transpose(1, 0, 2).reshape(slots * tokens, -1))


@pytest.mark.parametrize(
    ("passes", "parts", "count", "beside", "split"),
    [
        ([1] * 4, 1, 2, (), "tokens"),
        ([2] * 4, 1, 2, (), "sides"),  # nothing crosses in the blocks
        ([2] * 4, 1, 4, (), "tokens"),  # two of four GPUs would idle
        ([2, 1, 1, 1], 1, 2, (), "tokens"),
        ([1] * 4, 4, 2, (), "windows"),
        ([1] * 4, 3, 2, (), "tokens"),  # one GPU would idle for the third
        ([1] * 4, 4, 2, ("--camera",), "windows"),
        ([2, 1], 1, 2, ("--camera",), "sides"),
    ],
)
def test_the_planner_takes_the_split_that_costs_least(
    passes: list[int], parts: int, count: int, beside: tuple[str, ...], split: str
) -> None:
    chosen = choose_split(passes, parts, count, beside)
    assert chosen.split == split and "times one GPU" in chosen.text


def test_a_job_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match="--camera and --identity cannot be split over 2 GPUs") as refused:
        choose_split([1, 1], 1, 2, ("--camera", "--identity"))
    assert "--guidance" in refused.value.hint


def shards_of(size: tuple[int, int], count: int) -> Shards:
    return Shards.of(ANIMATE_14B, ShardPlan.of(Plan(*size), count))


@pytest.mark.parametrize(
    ("size", "count", "queries", "to_rows", "groups", "milliseconds"),
    [
        ((832, 480), 2, 128, False, (1, 18, 1), 12.66),
        ((832, 480), 2, 128, True, (1, 18, 1), 12.23),
        ((832, 480), 2, 192, False, (10, 10), 11.97),
        ((832, 480), 2, 192, True, (10, 10), 11.75),
        ((832, 480), 4, 192, True, (1, 6, 3), 6.23),
        ((832, 480), 8, 192, True, (2, 3), 3.24),
        ((1280, 720), 2, 128, False, (2, 16, 2), 65.79),
        ((1280, 720), 2, 128, True, (2, 16, 2), 64.86),
        ((1280, 720), 2, 192, False, (1, 18, 1), 61.18),
        ((1280, 720), 2, 192, True, (1, 18, 1), 60.2),
        ((1280, 720), 4, 192, True, (1, 8, 1), 30.23),
        ((1280, 720), 8, 192, True, (1, 3, 1), 15.24),
    ],
)
def test_groups_fill_the_multiprocessors_and_hide_copies(
    size: tuple[int, int],
    count: int,
    queries: int,
    to_rows: bool,
    groups: tuple[int, ...],
    milliseconds: float,
) -> None:
    """The table of `groups_of`, and no other division into up to three groups is faster."""
    shards = replace(shards_of(size, count), to_rows=to_rows)
    assert groups_of(shards, 132, queries) == groups
    least = attend_seconds(shards, groups, 132, queries)
    assert least * 1e3 == pytest.approx(milliseconds, abs=0.006)
    counts = range(1, shards.heads_each + 1)
    others = (parts for n in (1, 2, 3) for parts in product(counts, repeat=n) if sum(parts) == counts[-1])
    assert min(attend_seconds(shards, parts, 132, queries) for parts in others) == least


MEASURED = {  # two H200s, in ms, the mean of the slower GPU's medians (2026-11-29)
    (1, 18, 1): 12.87,
    (20,): 13.11,
    (2, 17, 1): 12.84,
    (2, 18): 13.05,
    (3, 17): 12.95,
    (19, 1): 13.09,
    (1, 19): 12.96,
    (2, 16, 2): 13.01,
}


@pytest.mark.parametrize(("groups", "milliseconds"), MEASURED.items(), ids=str)
def test_the_time_of_attention_in_groups_is_as_measured(groups: tuple[int, ...], milliseconds: float) -> None:
    seconds = attend_seconds(shards_of((832, 480), 2), groups, 132)
    assert seconds * 1e3 + 0.18 == pytest.approx(milliseconds, abs=0.17)


def test_the_groups_that_are_chosen_were_the_fastest() -> None:
    """Within the spread of (1, 18, 1), which was measured four times."""
    assert MEASURED[groups_of(shards_of((832, 480), 2), 132)] <= min(MEASURED.values()) + 0.05
