"""Between ComfyUI's tensors and frames in shared memory.

An IMAGE is [T, H, W, C] and a MASK [T, H, W], float of 0 to 1. torch is not imported: tensors are made by the
tensors that come in.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from trt_wan.comfyui.shared_frames import Block, Frames, Pixels
from trt_wan.errors import UsageError


@contextmanager
def shared(media: Mapping[str, Any]) -> Iterator[dict[str, Frames]]:
    """Those of the IMAGEs and MASKs that are given, in shared memory."""
    with ExitStack() as blocks:
        yield {
            name: blocks.enter_context(_block(name, images)).frames
            for name, images in media.items()
            if images is not None
        }


def _block(name: str, images: Any) -> Block:
    if len(images.shape) == 2:  # a MASK of one frame
        images = images[None]
    return Block(tuple(images.shape), (_pixels(name, image) for image in images))


def _pixels(name: str, image: Any) -> Pixels:
    values = np.asarray(image.detach().cpu().float())
    if not np.isfinite(values).all():
        raise UsageError(f"{name} has values that are no numbers.", "Look at the node that makes it.")
    levels: Pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return levels


def tensor(pixels: Pixels, like: Any) -> Any:
    """A tensor of the values 0 to 1, made by the tensor `like`."""
    made = like.new_empty(pixels.shape, device="cpu").float()
    np.divide(pixels, np.float32(255), out=made.numpy())
    return made
