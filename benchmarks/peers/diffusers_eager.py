"""Peer: diffusers in bf16 as it comes, nothing compiled, attention by cuDNN."""

import argparse

from trt_wan.benchmarks.peers.child import Peer, main
from trt_wan.benchmarks.peers.shape import Shape


def make(shape: Shape, device: str, options: argparse.Namespace) -> Peer:
    from trt_wan.benchmarks.peers.diffusers_model import (
        BF16,
        DiffusersPeer,
        attention_setting,
        make_model,
    )

    settings = {
        "precision": BF16,
        "attention": attention_setting(shape, device),
        "compilation": "none",
    }
    return DiffusersPeer(make_model(shape, device), shape, device, settings)


if __name__ == "__main__":
    main("diffusers_eager", make)
