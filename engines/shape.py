"""The shape of one window, for which a set of graphs is exported.

Pixel frames F per window, latent frames T = (F-1)/4 + 1, slots T1 = T + 1 (slot 0 is the reference),
tokens per slot P = (H/16)(W/16), tokens L = T1·P. Slots of other pictures count as 4 frames each
(Job.model_window).
"""

from dataclasses import dataclass

from trt_wan.engines.precision import Precision
from trt_wan.errors import UsageError, shown

MOST_SIDE, MOST_PIXELS = 8192, 4096 * 2304  # a larger video fits into no machine's memory
MOST_FRAMES = 4089  # in a window: the official model's rotary table has 1024 positions, one a slot
MOST_TOKENS = 1_000_000  # 6.6 times those of 161 frames at 1280x720
# Latents that the two tiles of the VAE share: the middle of the seam is 64 pixels from the edges of both.
TILE_OVERLAP = 16


def require_possible_size(width: int, height: int) -> None:
    """Raises UsageError for a video that is too large, before memory is allocated for it."""
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise UsageError(
            f"A video of {shown(width)}x{shown(height)} is too large: a side has at most {MOST_SIDE} pixels, "
            f"a picture at most {MOST_PIXELS}.",
            "Give a size such as 832x480 or 1280x720.",
        )


def require_possible_frames(frames: int, window: str = "window") -> None:
    """Raises UsageError. `window` is its name, as the message and the option have it."""
    option = "--context-frames" if window == "context window" else "--window"
    if frames > MOST_FRAMES:
        raise UsageError(
            f"A {window} of {shown(frames)} frames is not possible: {MOST_FRAMES} is the most.",
            f"Use {option} 77, the official one.",
        )
    if frames < 5 or frames % 4 != 1:
        near = max(5, (frames - 1) // 4 * 4 + 1)
        raise UsageError(
            f"A {window} of {shown(frames)} frame{'s' * (frames != 1)} is not possible: it must be 4k+1 and "
            "at least 5.",
            f"Use {option} {near} or {option} {near + 4}.",
        )


@dataclass(frozen=True)
class Plan:
    width: int = 832
    height: int = 480
    frames: int = 77
    precision: Precision = "fp32"
    # Latent frames per VAE call after the first; any divisor of T-1 gives the same pictures.
    vae_chunk: int = 1
    face_batch: int = 8  # face crops per call of the motion encoder; the last call is filled up

    def __post_init__(self) -> None:
        require_possible_size(self.width, self.height)
        for name, value in (("width", self.width), ("height", self.height)):
            if value < 16 or value % 16:
                low = max(16, value // 16 * 16)
                raise UsageError(
                    f"The {name} is {value}, which is not a multiple of 16.", f"Use {low} or {low + 16}."
                )
        require_possible_frames(self.frames)
        if self.tokens > MOST_TOKENS:
            raise UsageError(
                f"{self.frames} frames at {self.width}x{self.height} are {self.tokens} tokens; "
                f"{MOST_TOKENS} is the limit.",
                "Use a smaller size or --window, such as 832x480 and 77.",
            )
        if self.vae_chunk < 1 or (self.latent_frames - 1) % self.vae_chunk:
            raise UsageError(
                f"A VAE chunk of {self.vae_chunk} does not divide the {self.latent_frames - 1} latent frames "
                "after the first.",
                "Use 1, which always fits.",
            )

    def build_command(self, model: str) -> tuple[str, ...]:
        """The arguments of trt-wan that build this shape of a model."""
        size, window = f"{self.width}x{self.height}", str(self.frames)
        shape = ("--size", size, "--window", window, "--precision", self.precision)
        return ("build", "--model", model, *shape)

    @property
    def latent_width(self) -> int:
        return self.width // 8

    @property
    def latent_height(self) -> int:
        return self.height // 8

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def slots(self) -> int:
        return self.latent_frames + 1

    @property
    def tokens_per_slot(self) -> int:
        return (self.height // 16) * (self.width // 16)

    @property
    def tokens(self) -> int:
        return self.slots * self.tokens_per_slot

    @property
    def undivided(self) -> "Plan":
        """The shape of the window, of which a `ShardPlan` is a part."""
        return self

    def attended_heads(self, heads: int) -> int:
        """How many of the transformer's heads one call of self-attention computes."""
        return heads

    @property
    def vae_tile(self) -> "VaeTile | None":
        """The shape of both tiles into which the VAE cuts the longer side where GPU memory is short. They
        share TILE_OVERLAP latents, or two more. None for a side that is too short to be cut.
        """
        longer = max(self.width, self.height)
        side = 16 * -(-(longer // 8 + TILE_OVERLAP) // 4)
        if side >= longer:
            return None
        width, height = (side, self.height) if self.width == longer else (self.width, side)
        rest = self.frames, self.precision, self.vae_chunk, self.face_batch
        return VaeTile(width, height, *rest, whole=(self.width, self.height))


@dataclass(frozen=True)
class CameraPlan(Plan):
    """Uni3C at the shape of a plan. Its networks are its only ones."""

    ffn_dim: int = 0  # channels, read from Uni3C's file

    @staticmethod
    def beside(plan: Plan, ffn_dim: int) -> "CameraPlan":
        shape = plan.width, plan.height, plan.frames, plan.precision
        return CameraPlan(*shape, plan.vae_chunk, plan.face_batch, ffn_dim)

    def build_command(self, model: str) -> tuple[str, ...]:
        return (*super().build_command(model), "--camera-control", str(self.ffn_dim))


@dataclass(frozen=True)
class ShardPlan(Plan):
    """The share of one of `ranks` GPUs in a plan (runtime/parallel/shards.py): its tokens of every slot, and
    in self-attention its heads over all tokens. The networks of a block are its only ones.
    """

    ranks: int = 1

    @staticmethod
    def of(plan: Plan, ranks: int) -> "ShardPlan":
        shape = plan.width, plan.height, plan.frames, plan.precision
        return ShardPlan(*shape, plan.vae_chunk, plan.face_batch, ranks)

    def build_command(self, model: str) -> tuple[str, ...]:
        return (*super().build_command(model), "--gpus", str(self.ranks))

    @property
    def undivided(self) -> Plan:
        shape = self.width, self.height, self.frames, self.precision
        return Plan(*shape, self.vae_chunk, self.face_batch)

    @property
    def tokens_per_slot(self) -> int:
        return -(-self.undivided.tokens_per_slot // self.ranks)

    def attended_heads(self, heads: int) -> int:
        return -(-heads // self.ranks)


@dataclass(frozen=True)
class VaeTile(Plan):
    """A tile of the VAE. The VAE's networks are its only ones."""

    whole: tuple[int, int] = (0, 0)  # width and height of the picture that is cut

    def build_command(self, model: str) -> tuple[str, ...]:
        return (*Plan(*self.whole, self.frames, self.precision).build_command(model), "--vae-tiles")
