"""Peer: diffusers in bf16, blocks and face adapters compiled by torch.compile, attention by cuDNN."""

import argparse

from trt_wan.benchmarks.peers.child import Peer, main
from trt_wan.benchmarks.peers.shape import Shape


def make(shape: Shape, device: str, options: argparse.Namespace) -> Peer:
    from trt_wan.benchmarks.peers.diffusers_model import (
        BF16,
        COMPILATION,
        DiffusersPeer,
        attention_setting,
        compile_blocks,
        make_model,
    )

    model = make_model(shape, device)
    compile_blocks(model)
    settings = {
        "precision": BF16,
        "attention": attention_setting(shape, device),
        "compilation": COMPILATION,
    }
    return DiffusersPeer(model, shape, device, settings)


if __name__ == "__main__":
    main("diffusers_compiled", make)
