"""The self-attention for Hopper on the CPU: tiles.cu packs, hopper.cu attends, against numpy in float32."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hopper_on_cpu import gpu_on_cpu

from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.segments.attention import hopper
from trt_wan.runtime.segments.attention.hopper import HEAD_DIM

BF16 = np.dtype(ml_dtypes.bfloat16)
HEADS, VALUE = 2, 1.0
GUARD = 64  # elements behind a result


def inputs(tokens: int) -> list[Any]:
    """k and v far from zero. In the first head scores rise along the keys, so that maxima grow from tile to
    tile. In the second the tiles' scales differ. The first query sees all keys alike. Four channels of v have
    two numbers each, whose rounding errors do not average out.
    """
    rng = np.random.default_rng(tokens)
    q, k, v = rng.standard_normal((3, HEADS, tokens, HEAD_DIM), np.float32)
    direction = np.sign(rng.standard_normal(HEAD_DIM)).astype(np.float32)
    q[0] += direction
    k[0] += direction * np.linspace(0, 1, tokens, dtype=np.float32)[:, None]
    k[1, BLOCK : 2 * BLOCK] *= 0.4
    k[..., 5:9] += 4
    v[..., 40] *= 8
    v[..., 60:64] = 4 * (v[..., 60:64] > 0.5)
    q[:, 0] = 0
    return [x.astype(BF16) for x in (q * np.float32(HEAD_DIM**-0.5), k, v + np.float32(VALUE))]


def means(x: Any) -> Any:
    """bf16 [heads, blocks, head_dim]"""
    return np.stack(
        [x[:, i : i + BLOCK].astype(np.float32).mean(1) for i in range(0, x.shape[1], BLOCK)], 1
    ).astype(BF16)


def reference(q: Any, k: Any, v: Any, seen: Any) -> tuple[Any, Any]:
    """[tokens, heads, head_dim], and the log-sum-exp [heads, tokens]. `seen`: which keys each query sees; the
    blocks of the others count by their means. True: all.
    """
    mean_k, mean_v = (means(x).astype(np.float32) for x in (k, v))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    scores = np.where(seen, q @ k.swapaxes(1, 2), -np.inf)
    if seen is not True:
        others = np.where(seen[:, :, ::BLOCK], -np.inf, q @ mean_k.swapaxes(1, 2) + np.log(np.float32(BLOCK)))
        scores, v = np.concatenate((scores, others), -1), np.concatenate((v, mean_v), 1)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    sums = weights.sum(-1, keepdims=True)
    return (weights @ v / sums).swapaxes(0, 1), (most + np.log(sums))[..., 0]


def listed(lists: Sequence[Sequence[int]], tokens: int, step: int = 1) -> tuple[Any, Any, Any, Any]:
    """Arguments of `attend_listed`, and the keys that each `step`-th query sees. Heads take turns."""
    rows, blocks = -(-tokens // QUERIES), -(-tokens // BLOCK)
    numbers = np.full((HEADS, rows, blocks), 1 << 20, np.int32)
    counts = np.zeros((HEADS, rows), np.int32)
    kept = np.ones((HEADS, rows, -(-blocks // BLOCK) * BLOCK), bool)
    kept[..., :blocks] = False
    for head, row in np.ndindex(HEADS, rows):
        blocks_seen = lists[(head + row) % len(lists)]
        numbers[head, row, : len(blocks_seen)] = blocks_seen
        counts[head, row] = len(blocks_seen)
        kept[head, row, list(blocks_seen)] = True
    seen = kept[:, np.arange(0, tokens, step) // QUERIES].repeat(BLOCK, -1)[..., :tokens]
    return numbers, counts, np.packbits(kept, axis=-1, bitorder="little").copy(), seen


def attend(
    folder: Path,
    patch: pytest.MonkeyPatch,
    scores: Any,
    values: Any,
    given: Any,
    *lists: Any,
    late: bool = False,
) -> tuple[Any, Any]:
    """[tokens, heads, head_dim], and the log-sum-exp [heads, tokens]. NaN lies in all memory before."""
    tokens, gpu = given[0].shape[1], gpu_on_cpu(folder, patch, late=late)
    if lists:
        segment: Any = hopper.ListedAttention(gpu, HEADS, tokens, HEAD_DIM)
    else:
        segment = hopper.HopperAttention(gpu, HEADS, tokens, HEAD_DIM, scores, values)
    scratch = np.full(segment.scratch_bytes + 256, 0xFF, np.uint8)
    out = np.full(tokens * HEADS * HEAD_DIM + GUARD, np.nan, BF16)
    shift, lse = (np.full(HEADS * tokens + GUARD, np.nan, np.float32) for _ in range(2))
    segment.start(scratch.ctypes.data + -scratch.ctypes.data % 256)
    order = np.random.default_rng(1).permutation(tokens).astype(np.int32)
    if lists:  # given and results are in the order of the blocks
        made, blocks = np.stack([means(x) for x in given[1:]]), range(0, tokens, BLOCK)
        each = [[x[:, i : i + BLOCK].astype(np.float32) for i in blocks] for x in given[1:]]
        sums = np.array([[(y.sum(1), y.min(1), y.max(1)) for y in x] for x in each])
        partial = sums.transpose(0, 3, 1, 2, 4).copy()  # [2, heads, blocks, 3, head_dim]
        ctypes.memmove(segment.partial, partial.ctypes.data, partial.nbytes)
        by_block, given = given, [np.empty_like(x) for x in given]
        for x, y in zip(given, by_block, strict=True):
            x[:, order] = y
    addresses = {name: x.ctypes.data for name, x in zip("qkv", given, strict=True)}
    if lists:
        segment.pack_listed(addresses, made.ctypes.data, order.ctypes.data, shift.ctypes.data)
        rest = order.ctypes.data, shift.ctypes.data, lse.ctypes.data
        segment.attend_listed(out.ctypes.data, *(x.ctypes.data for x in lists), *rest)
    else:
        segment.pack(addresses, shift.ctypes.data)
        segment.attend(out.ctypes.data, shift.ctypes.data, lse.ctypes.data)
    for result in (out, shift, lse):
        assert np.isnan(result[-GUARD:].astype(np.float32)).all(), "wrote behind its result"
    attended = out[:-GUARD].reshape(tokens, HEADS, HEAD_DIM).astype(np.float32)
    if lists:
        attended = attended[order]
    return attended, lse[:-GUARD].reshape(HEADS, tokens)


@pytest.mark.parametrize(
    ("scores", "values", "tokens", "lists", "largest"),
    [
        ("int8", "e4m3", 300, (), 5e-2),
        ("int8", "e4m3", 300, ((0, 2), (2,), (0, 1)), 5e-2),
        ("bf16", "bf16", 300, (), 1e-2),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("int8", "bf16", 300, (), 3e-2),
                ("int8", "e4m3", 1, (), 5e-2),
                ("int8", "e4m3", 97, (), 5e-2),
                ("int8", "e4m3", 1300, (), 5e-2),
                ("int8", "e4m3", 1, ((0,),), 5e-2),
                ("int8", "e4m3", 97, ((0,),), 5e-2),
                ("int8", "e4m3", 128, ((0,),), 5e-2),
                ("int8", "e4m3", 400, ((0, 1, 2, 3), (0, 1, 2), (1, 3)), 5e-2),
                ("int8", "e4m3", 1300, (range(11), (0, 1, 3, 5, 7, 9, 10), (0, 2, 3, 4, 8)), 5e-2),
                ("int8", "e4m3", 4097, (range(33), range(0, 33, 2), range(1, 32)), 5e-2),
                ("int8", "e4m3", 16645, ((0, 127, 128, 130), (129,)), 5e-2),  # two tiles of means
                ("int8", "bf16", 1300, (), 3e-2),
                ("bf16", "bf16", 1300, (), 1e-2),
            )
        ),
    ],
)
def test_attention_on_the_cpu(
    scores: Any,
    values: Any,
    tokens: int,
    lists: Sequence[Sequence[int]],
    largest: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, step = inputs(tokens), 1 if tokens < 5000 else 41
    *arguments, seen = listed(lists, tokens, step) if lists else (True,)
    got, lse = attend(tmp_path, monkeypatch, scores, values, given, *arguments)
    got, lse = got[::step], lse[:, ::step]
    q, *others = given
    expected, expected_lse = reference(q[:, ::step], *others, seen)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected - np.float32(VALUE))
    assert error <= largest
    if not lists:
        np.testing.assert_allclose(got[0], expected[0], rtol=2**-8, atol=1e-3)
    assert np.abs(lse - expected_lse).max() <= (5e-2 if scores == "int8" else 1e-4)


@pytest.mark.parametrize(
    ("scores", "values", "tokens", "lists"),
    [
        ("int8", "e4m3", 300, ()),
        pytest.param("int8", "e4m3", 700, (range(6), (0, 2, 3, 5)), marks=pytest.mark.long),
        *(pytest.param(x, "bf16", 400, (), marks=pytest.mark.long) for x in ("int8", "bf16")),
    ],
)
def test_products_may_run_late(
    scores: Any,
    values: Any,
    tokens: int,
    lists: Sequence[Sequence[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A product runs at any time between its start and its wait. Its operands must stay until then, and its
    result must not be read before.
    """
    given, results = inputs(tokens), []
    for late in (False, True):
        folder = tmp_path / str(late)
        folder.mkdir()
        arguments = listed(lists, tokens)[:-1] if lists else ()
        results.append(attend(folder, monkeypatch, scores, values, given, *arguments, late=late))
    for at_once, in_the_end in zip(*results, strict=True):
        np.testing.assert_array_equal(at_once, in_the_end)


@pytest.mark.parametrize("rank", [0, 1, pytest.param(2, marks=pytest.mark.long)])
def test_own_tokens_stay_where_they_are(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """132 tokens in two slots of 66, shares of 22: the same bits as from and to one array. The columns of
    other heads are not touched.
    """
    given, shards = inputs(132), Shards(3, 2, 66, 6, HEAD_DIM, to_rows=True)
    attended, _ = attend(tmp_path, monkeypatch, "int8", "e4m3", given)
    own, others, names = shards.tokens_of(rank), [r for r in range(3) if r != rank], {}
    for name, x in zip("qkv", given, strict=True):
        mine = shards.split(x.swapaxes(0, 1), rank).swapaxes(0, 1).copy()
        x.reshape(HEADS, 2, 66, HEAD_DIM)[:, :, own.start : own.stop] = np.nan
        names |= {name: x, f"own_{name}": mine}
    names["attended"] = np.full((2, 44, HEADS, HEAD_DIM), np.nan, BF16)
    rows = np.full((44, 6, HEAD_DIM), np.nan, BF16)
    names["places"] = np.array([66, 22, rank, 44, 6, 3, rows.ctypes.data], np.int64)
    segment = hopper.NativeFp8(gpu_on_cpu(tmp_path, monkeypatch), HEADS, 132, HEAD_DIM)
    scratch = np.full(segment.scratch_bytes + 256, 0xFF, np.uint8)
    segment.start(scratch.ctypes.data + -scratch.ctypes.data % 256)
    segment.enqueue({name: x.ctypes.data for name, x in names.items()})
    want = np.full(rows.shape, np.nan, np.float32)
    want[:, 3:5] = shards.split(attended, rank)
    np.testing.assert_array_equal(rows.astype(np.float32), want)
    want = np.stack([shards.split(attended, other) for other in others])
    np.testing.assert_array_equal(names["attended"].astype(np.float32), want)


def test_what_is_not_finite_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 has no NaN: rounding would hide one."""
    q, k, v = inputs(130)
    q[0, 77, 5] = k[1, 129, 5] = v[0, 3, 6] = np.nan
    got, _ = attend(tmp_path, monkeypatch, "int8", "e4m3", (q, k, v))
    wanted = np.zeros(got.shape, bool)
    wanted[77, 0] = wanted[:, 0, 6] = wanted[:, 1] = True
    assert (np.isnan(got) == wanted).all()
