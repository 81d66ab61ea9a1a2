"""Peer: diffusers with the blocks' linear layers in FP8, blocks compiled, the fastest attention installed.

FP8 is row-wise: one scale per token, computed at run time, and one per output channel of the weight, through
torch._scaled_mm. Attention candidates are timed at the job's shape and the fastest takes the self-attention;
cross-attention stays with PyTorch.
"""

import argparse

from trt_wan.benchmarks.peers.child import NotRun, Peer, main
from trt_wan.benchmarks.peers.shape import Shape


def make(shape: Shape, device: str, options: argparse.Namespace) -> Peer:
    import torch

    from trt_wan.benchmarks.peers.diffusers_model import (
        COMPILATION,
        DiffusersPeer,
        compile_blocks,
        make_model,
    )
    from trt_wan.benchmarks.peers.torch_attention import fastest_attention, use_for_self_attention
    from trt_wan.benchmarks.peers.torch_fp8 import quantize_blocks

    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise NotRun("this GPU has no FP8")
    model = make_model(shape, device)
    quantize_blocks(model)
    attention, report = fastest_attention(shape, device)
    use_for_self_attention(attention, shape.plan.tokens)
    compile_blocks(model)
    settings = {
        "precision": "linear layers of blocks and face adapters FP8 E4M3 (row-wise: a scale per token at run "
        "time, one per output channel), torch._scaled_mm with fast accumulation; the rest bf16",
        "attention": report,
        "compilation": COMPILATION,
    }
    return DiffusersPeer(model, shape, device, settings)


if __name__ == "__main__":
    main("diffusers_fp8", make)
