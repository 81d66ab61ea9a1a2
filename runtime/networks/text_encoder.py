"""A prompt to text features with umT5: rows of the embedding, the layers, the final norm (model_spec.md 8.1).

Features are always [512, dim]: padding is masked out as a key, and its own rows leave as zeros, which the
transformer attends to like any other (model_spec.md 9.6).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import FINAL_TEXT_NORM, TOKEN_EMBEDDING
from trt_wan.engines.config import TextConfig
from trt_wan.errors import WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.tokenizer import Tokenizer

MASKED = -30000.0  # e^-30000 is 0 beside any logit, and the number fits in fp16 too


@runtime_checkable
class RowReader(Protocol):
    """Weights that can read single rows: of the token embedding (2.1 GB in bf16) a prompt needs a few."""

    def rows(self, name: str, indices: Sequence[int]) -> Array: ...


def encode_text(model: Model, tokenizer: Tokenizer, prompt: str) -> NDArray[np.float32]:
    """Features [512, dim] of a prompt. Raises WeightsError if the tokenizer is another text encoder's."""
    t = model.config.text
    assert tokenizer.length == t.length, f"tokenizer cuts at {tokenizer.length}, the encoder takes {t.length}"
    ids = tokenizer.encode(prompt)
    if max(ids) >= t.vocabulary:
        raise WeightsError(
            f"The tokenizer gives the id {max(ids)}, but the text encoder knows {t.vocabulary} pieces.",
            "Use the tokenizer that belongs to this text encoder.",
        )
    hidden: Array = np.zeros((t.length, t.dim), np.float32)
    hidden[: len(ids)] = _embedding_rows(model, ids)
    attention_bias = np.where(np.arange(t.length) < len(ids), 0, MASKED).astype(np.float32)
    buckets = position_buckets(t)
    for n in range(t.layers):
        (hidden,) = model.run("text_encoder_layer", hidden, attention_bias, buckets, n=n)

    features = np.zeros((t.length, t.dim), np.float32)
    norm = np.asarray(model.weights["text_encoder"][FINAL_TEXT_NORM], np.float32)
    features[: len(ids)] = _rms_norm(np.asarray(hidden, np.float32)[: len(ids)], norm, t.eps)
    return features


def position_buckets(t: TextConfig) -> NDArray[np.int64]:
    """T5's bucket for every query (row) and key (column), [length, length].

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance per
    bucket, the rest grow logarithmically up to `max_distance` (arXiv:1910.10683, section 2.1).
    """
    offset = np.arange(t.length)[None, :] - np.arange(t.length)[:, None]
    distance = np.abs(offset)
    half = t.buckets // 2
    exact = half // 2
    # log2, because it is exact where buckets begin at a power of two
    growth = np.log2(np.maximum(distance, exact) / exact) / np.log2(t.max_distance / exact)
    far = exact + (growth * (half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    buckets: NDArray[np.int64] = np.where(offset > 0, half + bucket, bucket)
    return buckets


def _embedding_rows(model: Model, ids: list[int]) -> NDArray[np.float32]:
    weights = model.weights["text_encoder"]
    rows = (
        weights.rows(TOKEN_EMBEDDING, ids)
        if isinstance(weights, RowReader)
        else weights[TOKEN_EMBEDDING][ids]
    )
    return np.asarray(rows, np.float32)


def _rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float32]:
    normed: NDArray[np.float32] = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps)) * weight
    return normed
