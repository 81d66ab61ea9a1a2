"""Files with the same values: copies, links, snapshots, and the model of another name and the same layout."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from trt_wan.runtime.weights.checkpoint import Checkpoint

SAMPLE_BYTES = 1 << 12  # read from each tensor

# Qwen-Image's VAE has the layout of Wan's VAE and other values. Comfy's file, as model lists publish it:
QWEN_BYTES = 253_806_246
QWEN_SHA256 = "a70580f0213e67967ee9c95f05bb400e8fb08307e017a924bf3441223e023d1f"
QWEN_CLASS = "AutoencoderKLQwenImage"  # in diffusers' config.json
QWEN_NAMED = "by its name the VAE of Qwen-Image, which has the same tensors as Wan's and other values"


def same_values(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether the tensors of two files are the same, by their types and their beginnings."""
    if one.places.keys() != other.places.keys():
        return False
    for name in one.places:
        a, b = one.stored(name), other.stored(name)
        if (a.encoding, a.shape, a.rotation) != (b.encoding, b.shape, b.rotation):
            return False
        flat = [x.values.reshape(-1).view("u1")[:SAMPLE_BYTES].tobytes() for x in (a, b)]
        scales = [b"" if x.scales is None else x.scales.tobytes() for x in (a, b)]
        if flat[0] != flat[1] or scales[0] != scales[1]:
            return False
    return True


def is_qwen_vae(checkpoint: Checkpoint) -> bool:
    """Whether a VAE is surely that of Qwen-Image: by the hash of the file, or by the config beside it."""
    path = checkpoint.path
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads((path.parent / "config.json").read_bytes())
        if isinstance(config, dict) and "_class_name" in config:
            return bool(config["_class_name"] == QWEN_CLASS)
    with suppress(OSError):
        if path.stat().st_size == QWEN_BYTES:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == QWEN_SHA256
    return False


def is_named_qwen(path: Path) -> bool:
    return any("qwen" in word.lower() for word in (path.name, path.parent.name))
