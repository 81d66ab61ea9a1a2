"""The sizes of the models: one frozen row per model, nothing measured, nothing read from disk.

Sizes are in channels, counts are counts. `ANIMATE_14B` is Wan2.2-Animate-14B (model_spec.md 1.1, 7, 8);
`TINY` has the same structure, the same geometry of its inputs (512x512 faces, 224x224 CLIP pictures, 512 text
tokens) and few channels, so that every graph and every file format can be run on a laptop.
"""

from dataclasses import dataclass, field

FACE_TOKENS = 5  # per latent slot: four heads of the face encoder and one learned padding token


@dataclass(frozen=True)
class TransformerConfig:
    dim: int
    heads: int
    ffn_dim: int
    layers: int
    fuser_interval: int  # a face fuser follows blocks 0, interval, 2·interval, …
    latent_channels: int = 16
    condition_channels: int = 20  # 4 of mask, 16 of latent
    frequency_dim: int = 256
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def fusers(self) -> int:
        return -(-self.layers // self.fuser_interval)


@dataclass(frozen=True)
class MotionConfig:
    """The motion encoder: `channels[0]` at full size, one entry more for each halving down to 4x4 pixels."""

    channels: tuple[int, ...]
    size: int = 512
    style_dim: int = 512
    motion_dim: int = 20


@dataclass(frozen=True)
class FaceConfig:
    hidden_dim: int = 1024
    heads: int = FACE_TOKENS - 1


@dataclass(frozen=True)
class VaeConfig:
    base_dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    latent_channels: int = 16
    residual_blocks: int = 2


@dataclass(frozen=True)
class TextConfig:
    """umT5 encoder: gated GELU, a relative position bias in every layer."""

    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    layers: int = 24
    vocabulary: int = 256384
    length: int = 512
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class ImageConfig:
    """CLIP vision tower; the features used are the hidden states after all layers but the last."""

    dim: int = 1280
    heads: int = 16
    ffn_dim: int = 5120
    layers: int = 32
    size: int = 224
    patch: int = 14
    eps: float = 1e-5

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 + 1

    @property
    def layers_used(self) -> int:
        return self.layers - 1


@dataclass(frozen=True)
class CameraConfig:
    """Uni3C, beside the transformer (addons_spec.md 1). Its heads have 64 channels."""

    dim: int = 1024
    heads: int = 16
    ffn_dim: int = 3072  # a file's own is read from it; the paper's 0.95 B parameters fit this one
    layers: int = 20
    norm_eps: float = 1e-5  # in its layer norms; those of q and k have the transformer's

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class ModelConfig:
    name: str
    transformer: TransformerConfig
    motion: MotionConfig
    face: FaceConfig
    vae: VaeConfig
    text: TextConfig
    image: ImageConfig
    # Not in the repr, from which folders of exported graphs have their names: no other graph depends on it.
    camera: CameraConfig = field(default=CameraConfig(), repr=False)


ANIMATE_14B = ModelConfig(
    name="14b",
    transformer=TransformerConfig(dim=5120, heads=40, ffn_dim=13824, layers=40, fuser_interval=5),
    motion=MotionConfig(channels=(32, 64, 128, 256, 512, 512, 512, 512)),
    face=FaceConfig(),
    vae=VaeConfig(),
    text=TextConfig(),
    image=ImageConfig(),
)

TINY = ModelConfig(
    name="tiny",
    transformer=TransformerConfig(dim=256, heads=2, ffn_dim=512, layers=4, fuser_interval=2),
    motion=MotionConfig(channels=(4, 4, 8, 8, 16, 16, 16, 16), style_dim=32),
    face=FaceConfig(hidden_dim=32),
    vae=VaeConfig(base_dim=8),
    text=TextConfig(dim=64, heads=4, head_dim=16, ffn_dim=128, layers=3, vocabulary=512),
    image=ImageConfig(dim=80, heads=2, ffn_dim=160, layers=3),
    camera=CameraConfig(dim=128, heads=2, ffn_dim=192, layers=3),
)

MODELS = {model.name: model for model in (ANIMATE_14B, TINY)}
