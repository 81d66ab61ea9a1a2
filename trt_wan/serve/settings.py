"""All that the operator of a server decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 10**6
# Options of `run` and `preprocess` that the operator gives for all jobs.
WEIGHTS = (
    "weights",
    "transformer",
    "vae",
    "text_encoder",
    "image_encoder",
    "camera_control",
    "tokenizer",
    "random_weights",
)
MODEL = (
    *WEIGHTS,
    *("executor", "precision", "tier", "attention_keep", "flavour", "vram", "gpus", "segments", "text_cache"),
    *("lynx", "face_embedder"),
)
OF_IDENTITY = ("--lynx", "--face-embedder")  # a run without --identity refuses them
NETWORKS = ("detector", "pose", "sam2")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Limits:
    upload: int = 500 * MB  # bytes of one request
    disk: int = 100_000 * MB  # bytes of all uploads and results
    free_disk: int = 1_000 * MB  # bytes that stay free on the disk
    queue: int = 500  # jobs that wait
    frames: int = 5_000  # a clip has, also after --rate
    pixels: int = 1280 * 720  # a frame of the video has
    clip_pixels: int = 4096 * 2304  # a frame of an upload has
    steps: int = 100
    window: int = 241  # frames
    text: int = 20_000  # characters of a prompt
    idle: float = 30.0  # seconds without a byte from a client
    check_seconds: float = 60.0  # to decode an upload
    check_memory: int = 3_000 * MB  # bytes, to decode an upload


@dataclass(frozen=True)
class ServeSettings:
    data: Path  # the folder of the database, uploads and results
    model: tuple[str, ...] = ()  # options of `run` that every job gets: weights, tier, vram, ...
    preparing: tuple[str, ...] = ()  # options of `preprocess` that every job gets: detector, pose, sam2
    defaults: Mapping[str, Any] = field(default_factory=dict)  # options for jobs that do not name them
    token: str | None = None
    hosts: tuple[str, ...] = ()  # names under which browsers may reach the server, besides the loopback's
    origins: tuple[str, ...] = ()  # other pages that may call it (CORS)
    demo: bool = False
    warm_up: bool = True
    ray: str | None = None  # the address of a cluster
    name: str = "wan2.2-animate-14b"
    limits: Limits = Limits()

    @property
    def plain_model(self) -> tuple[str, ...]:
        """`model` for a job without an identity."""
        return tuple(option for option in self.model if option.partition("=")[0] not in OF_IDENTITY)
