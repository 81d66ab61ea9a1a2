"""The eight SAM2 models (2.0 and 2.1; tiny, small, base_plus, large) and the sizes that graphs are made for.

Pixels of the model's square input: `image_size` S. Features lie on three grids of S/4, S/8 and S/16; the
coarsest has `tokens` cells, and masks are predicted on the finest (preprocess_spec.md B1.1).
"""

from dataclasses import dataclass, replace
from typing import Literal

from trt_wan.engines.contract import DType

Version = Literal["2.0", "2.1"]
Sam2Precision = Literal["fp32", "fp16"]

HALVES: dict[Sam2Precision, DType] = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Sam2Config:
    """`dim` and `heads` are those of the trunk's first stage; each later stage has twice as many."""

    name: str
    version: Version
    dim: int
    heads: int
    blocks: tuple[int, ...]  # per stage
    global_blocks: tuple[int, ...]  # these attend to the whole picture, the others within windows
    windows: tuple[int, ...]  # per stage
    background: int  # side of the stored position embedding
    image_size: int = 1024
    patch: int = 7
    channels: int = 256  # features, tokens and pointers
    memory_channels: int = 64
    memory_layers: int = 4
    memory_ffn: int = 2048
    memory_frames: int = 7  # rows of the temporal encoding: six distances, then the prompted frames' row
    max_pointers: int = 16
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_ffn: int = 2048
    mask_tokens: int = 4
    fuser_layers: int = 2
    fuser_kernel: int = 7

    @property
    def grid(self) -> int:
        """Side of the coarsest features."""
        return self.image_size // 16

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def pointer_tokens(self) -> int:
        """Into how many tokens a pointer is split, for the memories' channels."""
        return self.channels // self.memory_channels

    @property
    def mask_size(self) -> int:
        return self.image_size // 4

    @property
    def new(self) -> bool:
        """2.1: pointers carry their age, and memories of frames without the object an embedding."""
        return self.version == "2.1"

    def stage_dim(self, stage: int) -> int:
        return self.dim << stage

    def stage_heads(self, stage: int) -> int:
        return self.heads << stage


@dataclass(frozen=True)
class Block:
    """One block of the trunk. With `pool`, it halves the grid and its queries are pooled."""

    n: int
    dim_in: int
    dim: int
    heads: int
    window: int  # 0: the whole grid
    pool: bool
    ends_stage: bool


def trunk_blocks(config: Sam2Config) -> tuple[Block, ...]:
    """The first block of a stage still has the window of the stage before."""
    found: list[Block] = []
    for stage, count in enumerate(config.blocks):
        for i in range(count):
            first = stage > 0 and i == 0
            window = config.windows[stage - 1 if first else stage]
            found.append(
                Block(
                    n=len(found),
                    dim_in=config.stage_dim(stage - 1 if first else stage),
                    dim=config.stage_dim(stage),
                    heads=config.stage_heads(stage),
                    window=0 if len(found) in config.global_blocks else window,
                    pool=first,
                    ends_stage=i == count - 1,
                )
            )
    return tuple(found)


@dataclass(frozen=True)
class Sam2Plan:
    """The sizes and types that graphs are exported for.

    A track graph has room for so many memories, and for nine pointers more than that; unused places are
    masked, which is exact (preprocess_spec.md S9). With c prompted frames at most c + 6 memories and c + 15
    pointers are looked at. One prompted frame fills 7 places from the seventh frame on, so the mask costs
    nothing in the long run; graphs of exact lengths would be dozens. A kernel skips unused places, so one
    graph with room for all is enough there.
    """

    precision: Sam2Precision = "fp32"
    batch: int = 1  # frames per call of the encoder
    prompt_tokens: int = 17  # at most 16 points, or 14 and a box, and the token that ends them
    memories: tuple[int, ...] = (7, 11)  # track graphs, smallest first

    @property
    def half(self) -> DType:
        """The type of the heavy parts: trunk, memory attention, memory encoder."""
        return HALVES[self.precision]

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel attends to memories (preprocess/sam2/memory_attention.py), else the graphs."""
        return self.precision == "fp16"


def pointers_of(memories: int) -> int:
    return memories + 9


def _models() -> dict[str, Sam2Config]:
    old: Version = "2.0"
    trunks = {
        "tiny": Sam2Config("", old, 96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), 7),
        "small": Sam2Config("", old, 96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7), 7),
        "base_plus": Sam2Config("", old, 112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), 14),
        "large": Sam2Config("", old, 144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), 7),
    }
    versions: tuple[Version, ...] = ("2.0", "2.1")
    rows = (
        replace(trunk, name=f"sam{version.removesuffix('.0')}_{name}", version=version)
        for version in versions
        for name, trunk in trunks.items()
    )
    return {row.name: row for row in rows}


SAM2_MODELS = _models()
