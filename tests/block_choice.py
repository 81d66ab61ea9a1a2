"""Block-sparse attention in numpy, as slow as it is simple: the oracle of select.cu and of the graph."""

from typing import Any

import numpy as np

BLOCK = 128


def chosen(q: Any, k: Any, keep: float, first: int) -> Any:
    """bool [heads, blocks, blocks]: whether a block of queries keeps a block of keys. q and k are [heads,
    tokens, head_dim]. The blocks of the first `first` tokens, a row's own and the last are always kept.
    """
    heads, tokens, _ = q.shape
    starts = range(0, tokens, BLOCK)
    blocks, always = len(starts), -(-first // BLOCK)
    made = np.zeros((heads, blocks, blocks), bool)
    for head in range(heads):
        means = [
            [x[head, start : start + BLOCK].astype(np.float32).mean(axis=0) for start in starts]
            for x in (q, k)
        ]
        for i, query in enumerate(means[0]):
            kept = {*range(always), i, blocks - 1}
            wanted = max(round(float(np.float32(keep) * np.float32(blocks))), len(kept))
            best = sorted((-float(query @ key), j) for j, key in enumerate(means[1]) if j not in kept)
            kept |= {j for _, j in best[: wanted - len(kept)]}
            made[head, i, list(kept)] = True
    return made


def sparse_attention(q: Any, k: Any, v: Any, keep: float, first: int) -> Any:
    """float32 [tokens, heads * head_dim]. A skipped block counts as BLOCK keys that equal its mean."""
    tokens = q.shape[1]
    block_of = np.arange(tokens) // BLOCK
    made = []
    for head, kept in enumerate(chosen(q, k, keep, first)):
        queries, keys, values = (x[head].astype(np.float32) for x in (q, k, v))
        scores = queries @ keys.T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        for j in range(kept.shape[1]):
            here = slice(j * BLOCK, (j + 1) * BLOCK)
            skips = ~kept[block_of, j]
            mean = queries[skips] @ keys[here].mean(axis=0) - scores[skips].max(axis=1)
            weights[skips, here] = np.exp(mean)[:, None]
            # equal weights of all keys weigh the mean value
        made.append(weights @ values / weights.sum(axis=1, keepdims=True))
    return np.concatenate(made, axis=1)
