"""What block-sparse attention costs in quality, by hand, on a GPU or slowly on the CPU.

    python tests/turbo_quality.py --heads 8

The error of the output, relative to dense attention, at 30, 50 and 70 % of the blocks kept, for sampled
blocks of queries. Products are exact (float32), so the choice alone counts, and the means of the blocks that
are skipped; "dropped" is the error without these means. `--queries` are sizes of a block of queries; all
get the same sampled tokens. "gaussian" is noise, in which nothing is worth finding.
"local" are heads over a video: content and positions are smooth in space and time, and q and k carry both. A
head's gain decides how sharply a query looks at what is like it; "rows" are the same heads with blocks of
consecutive tokens.
"""

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F

from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES, block_order
from trt_wan.engines.shape import Plan

HEAD_DIM = 128
SHARES = (0.3, 0.5, 0.7)


def local_heads(slots: int, rows: int, columns: int, heads: int, gain: float, device: str) -> Any:
    """q, k, v [heads, tokens, HEAD_DIM] of a smooth video. With gain 1 logits are as large as RMS norms with
    weights of 1 make them.
    """
    torch.manual_seed(0)
    content = [smooth((slots, rows, columns), length, device) for length in (6.0, 2.0)]
    noise = 0.5 * torch.randn(32, slots * rows * columns, device=device)
    features = torch.cat([*content, noise]).T
    made: tuple[list[Any], ...] = ([], [], [])
    for _ in range(heads):
        shared, *own = torch.randn(4, features.shape[1], HEAD_DIM, device=device) / features.shape[1] ** 0.5
        for out, part in zip(made[:2], own, strict=False):
            x = features @ (shared + 0.3 * part)
            x = x / x.square().mean(1, keepdim=True).sqrt() * gain**0.5
            out.append(rotated(x, slots, rows, columns))
        made[2].append(features @ own[2])
    q, k, v = map(torch.stack, made)
    return q * HEAD_DIM**-0.5, k, v


def smooth(shape: tuple[int, int, int], length: float, device: str) -> Any:
    """32 channels of noise [32, tokens], alike over `length` tokens, and a third as many slots."""
    x = torch.randn(32, 1, *shape, device=device)
    for axis, reach in ((2, length / 3), (3, length), (4, length)):
        half = int(3 * reach) + 1
        weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=device) / reach) ** 2)
        kernel, padding = [1] * 5, [0] * 3
        kernel[axis], padding[axis - 2] = len(weights), half
        x = F.conv3d(x, weights.view(kernel), padding=padding)
    return (x / x.std()).reshape(32, -1)


def rotated(x: Any, slots: int, rows: int, columns: int) -> Any:
    """Rotary positions as in runtime/networks/transformer.py."""
    spatial = 2 * (HEAD_DIM // 6)
    grid = torch.meshgrid(*(torch.arange(n, device=x.device) for n in (slots, rows, columns)), indexing="ij")
    angles = [
        position.reshape(-1, 1) * 10000.0 ** (-torch.arange(0, axis, 2, device=x.device) / axis)
        for position, axis in zip(grid, (HEAD_DIM - 2 * spatial, spatial, spatial), strict=True)
    ]
    cos, sin = torch.cat(angles, 1).cos(), torch.cat(angles, 1).sin()
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def means(x: Any, size: int = BLOCK) -> Any:
    """float32 [heads, blocks, head_dim]."""
    _, tokens, head_dim = x.shape
    sums = F.pad(x.float(), (0, 0, 0, -tokens % size)).unflatten(1, (-1, size)).sum(2)
    counts = torch.full((sums.shape[1],), float(size), device=x.device)
    counts[-1] -= -tokens % size
    return sums / counts[:, None]


def kept(q: Any, k: Any, share: float, first: int, size: int) -> Any:
    """bool [heads, query blocks, key blocks]: those that select.cu keeps for blocks of `size` queries."""
    scores = means(q, size) @ means(k).transpose(1, 2)
    rows, blocks = scores.shape[1:]
    numbers = torch.arange(blocks, device=q.device)
    start = size * torch.arange(rows, device=q.device)[:, None]
    own = (BLOCK * numbers < start + size) & (start < BLOCK * (numbers + 1))
    always = (numbers < -(-first // BLOCK)) | (numbers == blocks - 1) | own
    ranked = scores.masked_fill(always, torch.inf).sort(stable=True, dim=-1, descending=True).indices
    wanted = always.sum(1).clamp_min(round(share * blocks))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(
        2, ranked, (numbers < wanted[:, None]).expand_as(ranked)
    )


def errors(
    q: Any, k: Any, v: Any, chosen: Any, starts: list[int], count: int, size: int
) -> tuple[float, float, float]:
    """Of one head, [tokens, head_dim] each, `count` queries from each of `starts` on: the relative error,
    that without the means of skipped blocks, and the share of dense attention's weights that is kept.
    """
    tokens = len(k)
    key_means, value_means = means(k[None])[0], means(v[None])[0]
    lost, dropped, square, weight = 0.0, 0.0, 0.0, 0.0
    for start in starts:
        queries = q[start : start + count]
        row = chosen[torch.arange(start, start + len(queries), device=q.device) // size]
        scores = queries @ k.T
        weights = torch.exp(scores - scores.max(1, keepdim=True).values)
        dense = weights @ v / weights.sum(1, keepdim=True)
        some = weights * row.repeat_interleave(BLOCK, 1)[:, :tokens]
        others = BLOCK * torch.exp(queries @ key_means.T - scores.max(1, keepdim=True).values) * ~row
        made = some @ v + others @ value_means
        made /= some.sum(1, keepdim=True) + others.sum(1, keepdim=True)
        lost += float((made - dense).square().sum())
        dropped += float((some @ v / some.sum(1, keepdim=True) - dense).square().sum())
        square += float(dense.square().sum())
        weight += float((some.sum(1) / weights.sum(1)).mean()) / len(starts)
    return (lost / square) ** 0.5, (dropped / square) ** 0.5, weight


def report(name: str, heads: Any, first: int, sample: int, sizes: list[int]) -> None:
    q, k, v = heads
    count = math.lcm(*sizes)
    starts = (torch.linspace(0, (q.shape[1] - 1) // count, sample).long() * count).tolist()
    for share in SHARES:
        for size in sizes:
            chosen = kept(q, k, share, first, size)
            each = zip(q, k, v, chosen, strict=True)
            found = torch.tensor([errors(*head, starts, count, size) for head in each])
            error, dropped, weight = found.mean(0).tolist()
            worst = float(found[:, 0].max())
            print(
                f"{name:16} kept {share:.0%} by {size} queries: error {error:.4f}, of the worst head "
                f"{worst:.4f}; dropped {dropped:.3f}; weight kept {weight:.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--slots", type=int, default=21)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sample", type=int, default=8, help="places in a head where queries are taken")
    parser.add_argument("--queries", default=str(QUERIES), help="tokens of a block of queries, as 128,192")
    parser.add_argument("--gains", default="0.5,1,2")
    options = parser.parse_args()
    sizes = [int(size) for size in options.queries.split(",")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, height = map(int, options.size.split("x"))
    shape = options.slots, height // 16, width // 16
    frames = 4 * (options.slots - 2) + 1
    order = torch.from_numpy(block_order(Plan(width, height, frames))).long().to(device)
    first, tokens = shape[1] * shape[2], shape[0] * shape[1] * shape[2]
    q, k, v = torch.randn(3, options.heads, tokens, HEAD_DIM, device=device)
    report("gaussian", (q * HEAD_DIM**-0.5, k, v), first, options.sample, sizes)
    for gain in map(float, options.gains.split(",")):
        made = local_heads(*shape, options.heads, gain, device)
        report(f"rows, gain {gain:g}", made, first, options.sample, sizes)
        report(f"local, gain {gain:g}", [x[:, order] for x in made], first, options.sample, sizes)


if __name__ == "__main__":
    main()
