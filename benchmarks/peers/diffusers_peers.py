"""Three peers: diffusers in bf16 as it comes (eager), with compiled blocks, and with FP8 linear layers.

    python -m trt_wan.benchmarks.peers.diffusers_peers fp8 --size 832x480 --window 77 --steps 6

eager: nothing is compiled, attention by cuDNN. compiled: blocks and face adapters by torch.compile. fp8: also
compiled, with the blocks' linear layers in row-wise FP8 (a scale per token, computed at run time, and one per
output channel) by torch._scaled_mm. Its attention candidates are timed at the job's shape, and the fastest
takes the self-attention. Cross-attention stays with PyTorch.
"""

import argparse

from trt_wan.benchmarks.peers.child import NotRun, Peer, main
from trt_wan.benchmarks.peers.shape import Shape

KINDS = ("eager", "compiled", "fp8")
FP8 = (
    "linear layers of blocks and face adapters FP8 E4M3 (row-wise: a scale per token at run time, one per "
    "output channel), torch._scaled_mm with fast accumulation; the rest bf16"
)


def make(shape: Shape, device: str, options: argparse.Namespace) -> Peer:
    import torch

    from trt_wan.benchmarks.peers import diffusers_model as peers

    fp8, compiled = options.kind == "fp8", options.kind != "eager"
    if fp8 and device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise NotRun("this GPU has no FP8")
    model = peers.make_model(shape, device)
    precision, attention = peers.BF16, ""
    if fp8:
        from trt_wan.benchmarks.peers.torch_attention import fastest_attention, use_for_self_attention
        from trt_wan.benchmarks.peers.torch_fp8 import quantize_blocks

        quantize_blocks(model)
        fastest, attention = fastest_attention(shape, device)
        use_for_self_attention(fastest, shape.plan.tokens)
        precision = FP8
    if compiled:
        peers.compile_blocks(model)
    settings = {
        "precision": precision,
        "attention": attention or peers.attention_setting(shape, device),
        "compilation": peers.COMPILATION if compiled else "none",
    }
    return peers.DiffusersPeer(model, shape, device, settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS)


if __name__ == "__main__":
    main("diffusers_peers", make, add_arguments)
