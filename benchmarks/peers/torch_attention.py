"""Self-attention kernels that PyTorch users can install, timed at the job's shape: the fastest is taken.

All take and give [batch, tokens, heads, head_dim] in bf16. torch.compile sees one custom operator for all
packages, so that none breaks the block's graph.
"""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import packages_distributions, version
from typing import Any, cast

import torch
from diffusers.models.transformers import transformer_wan_animate
from torch.nn.attention import SDPBackend, sdpa_kernel

from trt_wan.benchmarks.peers.diffusers_model import time_calls
from trt_wan.benchmarks.peers.shape import Shape

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NATIVE = "PyTorch"


def _native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _native(q, k, v)


def _flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _first(importlib.import_module("flash_attn_interface").flash_attn_func(q, k, v))


def _flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _first(importlib.import_module("flash_attn.cute").flash_attn_func(q, k, v))


def _sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    module = importlib.import_module("sageattention")
    attended: torch.Tensor = module.sageattn(q, k, v, tensor_layout="NHD")
    return attended


def _first(result: Any) -> torch.Tensor:
    """Some versions return the log-sum-exp as well."""
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


CANDIDATES: dict[str, tuple[Attention, str | None]] = {  # with the package it needs
    "cuDNN bf16": (_cudnn, None),
    "FlashAttention-3 bf16": (_flash3, "flash_attn_interface"),
    "FlashAttention-4 bf16": (_flash4, "flash_attn"),
    "SageAttention 8 bits": (_sage, "sageattention"),
}
WRONG = 0.1  # relative error against cuDNN's on noise; SageAttention 2.2 on an H100 was once plain noise
_chosen: Attention = _native


@torch.library.custom_op("trt_wan_bench::self_attention", mutates_args=())
def self_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _chosen(q, k, v).contiguous()


@self_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def fastest_attention(shape: Shape, device: str) -> tuple[Attention, str]:
    """Returns the fastest correct candidate, and a sentence with the figures of all."""
    if device != "cuda":
        return _native, "PyTorch's for the CPU"
    c = shape.config.transformer
    heads = (1, shape.plan.tokens, c.heads, c.head_dim)
    q, k, v = (torch.randn(heads, device=device, dtype=torch.bfloat16) for _ in range(3))
    best: Attention = _native
    least, told = float("inf"), []
    with torch.inference_mode():
        expected = _native(q, k, v)
        for name, (attend, package) in CANDIDATES.items():
            try:
                result = attend(q, k, v)
                error = float((result - expected).float().norm() / expected.float().norm())
                seconds = sorted(time_calls(partial(attend, q, k, v), 5, device))[2]
            except Exception as reason:  # any error means that the package cannot be used
                told.append(f"{name}: not usable ({str(reason).splitlines()[0][:80]})")
                continue
            about = f" {_version(package)}" if package else ""
            told.append(f"{name}{about}: {seconds * 1e3:.1f} ms, error {error:.1e}")
            if error < WRONG and seconds < least:
                best, least = attend, seconds
                used = name
    return best, (f"{used}; " if least < float("inf") else f"{NATIVE}'s choice; ") + "; ".join(told)


def use_for_self_attention(attend: Attention, tokens: int) -> None:
    """Sends diffusers' calls over `tokens` keys to `attend` from now on, and no other calls."""
    global _chosen
    _chosen = attend
    diffusers_module: Any = transformer_wan_animate
    dispatch = diffusers_module.dispatch_attention_fn

    def dispatched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if k.shape[1] == tokens:
            return cast(torch.Tensor, self_attention(q, k, v))
        return cast(torch.Tensor, dispatch(q, k, v, **options))

    diffusers_module.dispatch_attention_fn = dispatched


def _version(package: str) -> str:
    names = packages_distributions().get(package.split(".")[0], [])
    return version(names[0]) if names else ""
