"""Prompts to text features with umT5: rows of the embedding, the layers, the final norm (model_spec.md 8.1).

Features are always [512, dim]. Padding is masked as a key, and its own rows become zeros, to which the
transformer attends as to any other row (model_spec.md 9.6).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trt_wan.engines.checkpoint import FINAL_TEXT_NORM, TOKEN_EMBEDDING
from trt_wan.engines.config import TextConfig
from trt_wan.errors import NotFinite, WeightsError
from trt_wan.runtime.executors import Array
from trt_wan.runtime.finite import DAMAGED
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.tokenizer import Tokenizer

MASKED = -30000.0  # e^-30000 is 0 beside any logit, and -30000 fits in fp16


@runtime_checkable
class RowReader(Protocol):
    """Weights that can read single rows: a prompt needs a few of the token embedding's (2.1 GB in bf16)."""

    def rows(self, name: str, indices: Sequence[int]) -> Array: ...


def encode_texts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[NDArray[np.float32]]:
    """Returns the features [512, dim] of every prompt, in one pass over the layers: weights of a layer are
    loaded once for all prompts. Raises WeightsError if the tokenizer belongs to another text encoder.
    """
    text = model.config.text
    assert tokenizer.length == text.length, (
        f"tokenizer cuts at {tokenizer.length}, the encoder at {text.length}"
    )
    tokens = [_tokens(model, tokenizer, prompt) for prompt in prompts]
    counts = [len(ids) for ids in tokens]
    hidden = [_embedded(model, ids) for ids in tokens]
    biases = [_attention_bias(count, text.length) for count in counts]
    buckets = position_buckets(text)
    for n in range(text.layers):
        for k, bias in enumerate(biases):
            (hidden[k],) = model.run("text_encoder_layer", hidden[k], bias, buckets, n=n)
    norm = _finite(model.weights["text_encoder"][FINAL_TEXT_NORM], FINAL_TEXT_NORM)
    return [_features(h, count, norm, text) for h, count in zip(hidden, counts, strict=True)]


def position_buckets(t: TextConfig) -> NDArray[np.int64]:
    """Returns T5's bucket for every query (row) and key (column), [length, length].

    Half of the buckets are for keys after the query. The first half of each half holds one distance per
    bucket, the others grow logarithmically up to `max_distance` (arXiv:1910.10683, section 2.1).
    """
    offset = np.arange(t.length)[None, :] - np.arange(t.length)[:, None]
    distance = np.abs(offset)
    half = t.buckets // 2
    exact = half // 2
    # log2 is exact where buckets begin at a power of two
    growth = np.log2(np.maximum(distance, exact) / exact) / np.log2(t.max_distance / exact)
    far = exact + (growth * (half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    buckets: NDArray[np.int64] = np.where(offset > 0, half + bucket, bucket)
    return buckets


def _tokens(model: Model, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if max(ids) >= model.config.text.vocabulary:
        raise WeightsError(
            f"The tokenizer gives the id {max(ids)}, but the text encoder knows "
            f"{model.config.text.vocabulary} pieces.",
            "Use the tokenizer that belongs to this text encoder.",
        )
    return ids


def _embedded(model: Model, ids: list[int]) -> Array:
    """Rows of the token embedding, padded with zeros to [length, dim]."""
    weights = model.weights["text_encoder"]
    rows = (
        weights.rows(TOKEN_EMBEDDING, ids)
        if isinstance(weights, RowReader)
        else weights[TOKEN_EMBEDDING][ids]
    )
    hidden = np.zeros((model.config.text.length, model.config.text.dim), np.float32)
    hidden[: len(ids)] = _finite(rows, TOKEN_EMBEDDING)
    return hidden


def _finite(weight: Array, name: str) -> NDArray[np.float32]:
    """A weight that the host itself uses. Raises NotFinite."""
    values = np.asarray(weight, np.float32)
    if not np.isfinite(values).all():
        raise NotFinite(f"The text_encoder's tensor {name} holds a NaN or an infinity.", DAMAGED)
    return values


def _attention_bias(count: int, length: int) -> NDArray[np.float32]:
    """Added to the logits of every key: 0 for the `count` tokens, MASKED for padding."""
    return np.where(np.arange(length) < count, 0, MASKED).astype(np.float32)


def _features(hidden: Array, count: int, norm: NDArray[np.float32], text: TextConfig) -> NDArray[np.float32]:
    features = np.zeros((text.length, text.dim), np.float32)
    features[:count] = _rms_norm(np.asarray(hidden, np.float32)[:count], norm, text.eps)
    return features


def _rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float32]:
    normed: NDArray[np.float32] = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps)) * weight
    return normed
