"""Sage-style FP8 attention for Hopper: the block-sparse kernel of nvidia-cudnn-frontend, with every block.

The frontend's own function takes torch tensors, makes copies and wants whole blocks of 128 tokens. Here its
kernel class is compiled for our addresses, without torch, and our kernels quantise: the frontend must be of
the version that pyproject.toml pins, for the class is none of its promises.

Tokens that are missing in the last block read as zero. As queries they are not written; as keys they have
score 0 and value 0, so they only make the sum of weights too large, by a share that its logarithm tells.
"""

from collections.abc import Mapping
from typing import Any

import cutlass
import numpy as np
from cuda.bindings import driver
from cudnn.block_sparse_attention.csrc.fwd.sm90_blk128.bsa_fwd_sm90_fp8 import (
    BlockSparseAttnForwardFp8Sm90Blk128,
)
from cutlass import cute
from cutlass.cute.runtime import make_fake_stream, make_ptr

from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.attention.fp8_kernels import KEY_GROUP, Fp8Kernels

BLOCK = 128  # tokens, of queries and of keys

# What the kernel is given, in its order, and the type of each.
TYPES = {
    "q": cutlass.Float8E4M3FN,
    "k": cutlass.Float8E4M3FN,
    "v": cutlass.Float8E4M3FN,
    "attended": cutlass.BFloat16,
    "lse": cutlass.Float32,
    "blocks": cutlass.Int32,
    "q_scales": cutlass.Float32,
    "k_scales": cutlass.Float32,
    "v_scales": cutlass.Float32,
}


class SageFp8:
    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        self._kernels = Fp8Kernels(gpu, heads, tokens, head_dim)
        blocks = -(-tokens // BLOCK)
        self._padded = blocks * BLOCK
        self._extra = self._padded - tokens
        self._compiled = cute.compile(
            cute.jit(_attend),
            *_pointers(dict.fromkeys(TYPES, 256)),
            heads,
            tokens,
            blocks,
            make_fake_stream(use_tvm_ffi_env_stream=False),
        )
        self._stream = driver.CUstream(gpu.handle)
        self._blocks_buffer = gpu.allocate(4 * blocks)  # every block of keys, for every block of queries
        self._blocks = int(self._blocks_buffer.handle)
        gpu.write(gpu.view(self._blocks, (blocks,), np.int32), np.arange(blocks, dtype=np.int32))
        self._offsets, self._scratch_bytes = laid_out(
            {
                "partial": self._kernels.partial_bytes,
                "means": heads * head_dim * 4,
                "q": heads * tokens * head_dim,
                "k": heads * tokens * head_dim,
                "v": heads * self._padded * head_dim,
                "lse": heads * tokens * 4,
                "q_scales": heads * self._padded * 4,
                "k_scales": heads * self._padded // KEY_GROUP * 4,
                "v_scales": heads * head_dim * 4,
            }
        )
        self._parts: dict[str, int] = {}

    @property
    def scratch_bytes(self) -> int:
        return self._scratch_bytes

    def start(self, scratch: int) -> None:
        self._parts = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        kernels, parts, padded = self._kernels, self._parts, self._padded
        kernels.key_means(addresses["k"], parts["partial"], parts["means"])
        kernels.value_scales(addresses["v"], parts["partial"], parts["v_scales"])
        kernels.sage_queries(addresses["q"], parts["q"], parts["q_scales"], padded)
        kernels.sage_keys(addresses["k"], parts["means"], parts["k"], parts["k_scales"], padded)
        kernels.sage_values(addresses["v"], parts["v_scales"], parts["v"], padded)
        given = parts | {"blocks": self._blocks, "attended": addresses["attended"]}
        self._compiled(*_pointers(given), self._stream)
        if self._extra:
            kernels.without_extra(addresses["attended"], parts["lse"], self._extra)

    def settle(self) -> None:
        pass


def _pointers(addresses: Mapping[str, int]) -> list[Any]:
    space = cute.AddressSpace.gmem
    return [make_ptr(kind, addresses[name], space, assumed_align=16) for name, kind in TYPES.items()]


def _attend(
    q: cute.Pointer,
    k: cute.Pointer,
    v: cute.Pointer,
    attended: cute.Pointer,
    lse: cute.Pointer,
    blocks: cute.Pointer,
    q_scales: cute.Pointer,
    k_scales: cute.Pointer,
    v_scales: cute.Pointer,
    heads: cutlass.Constexpr,
    tokens: cutlass.Constexpr,
    count: cutlass.Constexpr,
    stream: driver.CUstream,
) -> None:
    """The tensors as the kernel indexes them; the last axis of all but `v_scales` is the batch.

    q, k [tokens, 128, heads, 1], v [128, padded tokens, heads, 1], attended [tokens, 128, heads, 1],
    lse [tokens, heads, 1], blocks [number in the list, block of queries, heads, 1].
    """
    padded = count * BLOCK
    groups = padded // KEY_GROUP
    rows = cute.make_layout((tokens, 128, heads, 1), stride=(128, 1, 128 * tokens, 128 * tokens * heads))
    columns = cute.make_layout(
        (128, padded, heads, 1), stride=(padded, 1, 128 * padded, 128 * padded * heads)
    )
    merged = cute.make_layout((tokens, 128, heads, 1), stride=(128 * heads, 1, 128, 128 * heads * tokens))
    BlockSparseAttnForwardFp8Sm90Blk128()(
        cute.make_tensor(q, rows),
        cute.make_tensor(k, rows),
        cute.make_tensor(v, columns),
        cute.make_tensor(attended, merged),
        cute.make_tensor(lse, cute.make_layout((tokens, heads, 1), stride=(1, tokens, tokens * heads))),
        cute.make_tensor(blocks, cute.make_layout((count, count, heads, 1), stride=(1, 0, 0, 0))),
        cutlass.Int32(count),
        cute.make_tensor(q_scales, cute.make_layout((padded, heads, 1), stride=(1, padded, padded * heads))),
        cute.make_tensor(k_scales, cute.make_layout((groups, heads, 1), stride=(1, groups, groups * heads))),
        cute.make_tensor(v_scales, cute.make_layout((128, heads), stride=(1, 128))),
        cutlass.Float32(1.0),
        stream,
    )
