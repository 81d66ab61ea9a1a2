"""Block-sparse attention in numpy, as slow as it is simple: the oracle of select.cu and of the graph."""

from typing import Any

import numpy as np

BLOCK, QUERIES = 128, 192


def chosen(q: Any, k: Any, keep: float, first: int) -> Any:
    """bool [heads, query blocks, key blocks]: whether a block of queries keeps a block of keys. q and k are
    [heads, tokens, head_dim]. The blocks of the first `first` tokens, those that have tokens of the queries
    and the last are always kept.
    """
    heads, tokens, _ = q.shape
    rows, blocks, always = -(-tokens // QUERIES), -(-tokens // BLOCK), -(-first // BLOCK)
    made = np.zeros((heads, rows, blocks), bool)
    for head in range(heads):
        means = [
            [x[head, at : at + size].astype(np.float32).mean(axis=0) for at in range(0, tokens, size)]
            for x, size in ((q, QUERIES), (k, BLOCK))
        ]
        for i, query in enumerate(means[0]):
            own = {token // BLOCK for token in range(i * QUERIES, min((i + 1) * QUERIES, tokens))}
            kept = {*range(always), *own, blocks - 1}
            wanted = max(round(float(np.float32(keep) * np.float32(blocks))), len(kept))
            best = sorted((-float(query @ key), j) for j, key in enumerate(means[1]) if j not in kept)
            kept |= {j for _, j in best[: wanted - len(kept)]}
            made[head, i, list(kept)] = True
    return made


def order_of(slots: int, rows: int, columns: int) -> list[int]:
    """The numbers of the tokens as the blocks take them."""

    def place(token: int) -> tuple[int, ...]:
        slot, row, column = token // (rows * columns), token // columns % rows, token % columns
        return -(-slot // 2), row // 8, column, row, slot

    return sorted(range(slots * rows * columns), key=place)


def sparse_attention(q: Any, k: Any, v: Any, keep: float, slots: int, rows: int, columns: int) -> Any:
    """float32 [tokens, heads * head_dim]. A skipped block counts as BLOCK keys that equal its mean."""
    order = order_of(slots, rows, columns)
    q, k, v = (x[:, order] for x in (q, k, v))
    row_of = np.arange(len(order)) // QUERIES
    made = []
    for head, kept in enumerate(chosen(q, k, keep, rows * columns)):
        queries, keys, values = (x[head].astype(np.float32) for x in (q, k, v))
        scores = queries @ keys.T
        most = scores.max(axis=1)
        weights = np.exp(scores - most[:, None])
        for j in range(kept.shape[1]):
            here = slice(j * BLOCK, (j + 1) * BLOCK)
            skips = ~kept[row_of, j]
            # Equal weights of all keys weigh the mean value.
            mean = np.exp(queries[skips] @ keys[here].mean(axis=0) - most[skips])
            weights[skips, here] = mean[:, None]
        made.append(weights @ values / weights.sum(axis=1, keepdims=True))
    attended = np.concatenate(made, axis=1)
    result = np.empty_like(attended)
    result[order] = attended
    return result
