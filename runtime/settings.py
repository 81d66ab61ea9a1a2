"""The settings of an open model: files, executor, precision and memory. A `Job` (job.py) says the rest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trt_wan.engines.choice.candidates import Tier, require_known
from trt_wan.engines.config import MODELS
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.errors import UsageError, shell_command, shown, with_commands
from trt_wan.runtime.fields import check_fields

KEEP = 0.5
MOST_GPUS = 64

ExecutorName = Literal["auto", "onnxruntime", "tensorrt"]


@dataclass(frozen=True)
class WeightFiles:
    """The checkpoints: found in or below `folders`, or named by part in `files`.

    `random` is a model's name instead: no file is read, every weight is seeded noise. Raises UsageError if
    there is neither.
    """

    folders: tuple[Path, ...] = ()
    files: Mapping[Part, Path] = field(default_factory=dict)
    tokenizer: Path | None = None  # tokenizer.json or spiece.model; None: found beside the text encoder
    random: str | None = None
    lynx: tuple[Path, ...] = ()  # files and folders of Lynx, which jobs with an identity need; else `folders`

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.folders and not self.files and self.random is None:
            raise UsageError(
                "There are no weights.",
                with_commands(
                    "Name their folder with --weights DIR, or fetch them:", shell_command(("pull",))
                ),
            )
        if self.random is not None and (self.folders or self.files or self.tokenizer or self.lynx):
            raise UsageError(
                f"The random weights of {self.random} and the files exclude each other.",
                "Leave out --random-weights, or everything that names files of weights.",
            )
        if self.random not in (None, *MODELS):
            raise UsageError(f"There is no model {self.random!r}.", f"Use one of: {', '.join(MODELS)}.")


def require_gpus(count: int) -> None:
    """Raises UsageError for a number of GPUs that no machine has."""
    if not 1 <= count <= MOST_GPUS:
        raise UsageError(
            f"{shown(count)} GPUs are not possible.", f"Use --gpus 1 to {MOST_GPUS}, mostly 2, 4 or 8."
        )


@dataclass(frozen=True)
class Settings:
    """How a model is run. None and "auto" are decided from the machine; each decision is reported."""

    executor: ExecutorName = "auto"
    precision: Precision | None = None
    tier: Tier = "exact"  # exact: attention in bf16; fast: in 8 bits; turbo: block-sparse too
    attention_keep: float | None = None  # share of the key blocks that turbo attends to; None: KEEP
    flavour: str | None = None  # TensorRT flavour
    vram: float | None = None  # GB to use at most
    segments: Mapping[str, str] = field(default_factory=dict)  # candidates asked for, by network
    text_cache: bool = True  # whether the features of prompts are kept on disk
    gpus: int = 1  # that compute a job together, a process each
    keep_encoders: bool = True  # whether networks that run once a job keep their weights for the next job

    def __post_init__(self) -> None:
        check_fields(self)
        if self.vram is not None and not 0 < self.vram < math.inf:
            raise UsageError(f"{self.vram} GB of GPU memory is not possible.", "Use --vram 12, for example.")
        require_gpus(self.gpus)
        if self.attention_keep is not None:
            if self.tier != "turbo":
                raise UsageError(
                    f"The tier {self.tier} attends to everything, so --attention-keep would do nothing.",
                    "Add --tier turbo, or leave --attention-keep out.",
                )
            if not 0 < self.attention_keep < 1:
                raise UsageError(
                    f"A share of {shown(self.attention_keep)} of the key blocks is not possible.",
                    f"Use --attention-keep above 0 and below 1, mostly {KEEP}; --tier fast keeps all.",
                )
        for network, candidate in self.segments.items():
            require_known(network, candidate)

    @property
    def keep(self) -> float | None:
        """The share of the key blocks that self-attention keeps; None for all."""
        return (self.attention_keep or KEEP) if self.tier == "turbo" else None
