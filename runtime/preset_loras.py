"""Finds the LoRAs of a preset in the folders of weights, by the layers that a file changes.

The distill LoRA of lightx2v (image to video) and the relight LoRA change exactly these layers (model_spec.md
6.1). Another LoRA may change the same ones. Among several files the published one is taken, which its size
tells, then the only one with the kind in its name. Otherwise none is guessed. Only headers are read.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from trt_wan.engines.config import ANIMATE_14B
from trt_wan.errors import UsageError, WeightsError, shell_command, with_commands
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.names import find_layer, split
from trt_wan.runtime.presets import LoraKind, Preset, PresetLora
from trt_wan.runtime.published.files import FILES
from trt_wan.runtime.weights.find_files import TORCH_SUFFIXES, files_below
from trt_wan.runtime.weights.open_file import names_text, open_file
from trt_wan.runtime.weights.tensor_file import SUFFIXES

LINEARS = {
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in (*"qkvo", "k_img", "v_img")),
    *("ffn.0", "ffn.2"),
}
DISTILLED = {"text_embedding.0", "time_embedding.0", "time_projection.1", "img_emb.proj.1", "head.head"}
PRODUCTS = {"up", "down"}
NAMES: dict[LoraKind, tuple[str, ...]] = {"distill": ("lightx2v", "distill"), "relight": ("relight",)}
OTHER_EXPERT = re.compile("(low|high)[-_]?noise", re.IGNORECASE)  # Wan2.2's: the same layers, another model


def find_loras(
    preset: Preset, mode: str, folders: Sequence[Path], given: Sequence[Lora] = ()
) -> tuple[Lora, ...]:
    """The preset's LoRAs for a mode, then `given`; one of them that is of the same kind takes its place.

    Raises WeightsError with the command that fetches a missing one, UsageError where several could be meant.
    """
    wanted = preset.loras_of(mode)
    kinds = {kind_of(lora.file) for lora in given}
    missing = [lora for lora in wanted if lora.kind not in kinds]
    found = loras_by_kind(files_below(folders)) if missing else {}
    return (*(_chosen(lora, found.get(lora.kind, []), preset) for lora in missing), *given)


def is_lora(path: Path) -> bool:
    """Whether the file has keys of a LoRA. Raises WeightsError for one that cannot be opened."""
    return path.is_file() and any(map(split, open_file(path).entries))


def loras_below(folder: Path) -> Iterator[Path]:
    """The files with keys of a LoRA in and below a folder."""
    for path in files_below([folder]):
        if path.name.lower().endswith((*SUFFIXES, *TORCH_SUFFIXES)):
            with suppress(WeightsError):
                if is_lora(path):
                    yield path


def kind_of(path: Path) -> LoraKind | None:
    """The kind of a LoRA by its layers; None for every other file."""
    with suppress(WeightsError):
        text = names_text(path)
        if any(sign in text for sign in (b"cross_attn", b"attn2")) and b"lora" in text:
            return _kind(open_file(path).entries)
    return None


def _kind(names: Iterable[str]) -> LoraKind | None:
    layers: set[str] = set()
    roles: set[str] = set()
    for name in names:
        found = split(name)
        layer = None if found is None else find_layer(ANIMATE_14B, *found)
        if found is None or layer is None:
            return None
        layers.add(re.sub(r"^blocks\.\d+\.", "", layer.name))
        roles.add(found[1])
    if layers == LINEARS and roles - {"alpha"} == PRODUCTS:
        return "relight"
    return "distill" if layers >= LINEARS | DISTILLED and "diff_b" in roles else None


def loras_by_kind(paths: Iterable[Path]) -> dict[LoraKind, list[Path]]:
    found: dict[LoraKind, list[Path]] = {}
    seen = set()
    for path in paths:
        if not path.name.lower().endswith((*SUFFIXES, *TORCH_SUFFIXES)) or (real := path.resolve()) in seen:
            continue
        seen.add(real)
        if (kind := kind_of(path)) is not None:
            found.setdefault(kind, []).append(path)
    return found


def _chosen(lora: PresetLora, paths: Sequence[Path], preset: Preset) -> Lora:
    (published,) = [file for file in FILES if file.part == f"{lora.kind} LoRA"]
    choices = [path for path in paths if path.stat().st_size == published.size][:1]
    if not choices:
        choices = [path for path in paths if _is_named(path, lora.kind)]
    if len(choices) == 1:
        return Lora(choices[0], lora.strength)
    if choices:
        names = ", ".join(path.name for path in choices[:3])
        raise UsageError(
            f"Several files may be the {lora.kind} LoRA of the preset {preset.name}: {names}.",
            "Choose with --lora FILE.",
        )
    raise WeightsError(
        f"The preset {preset.name} needs the {lora.kind} LoRA, which is in no folder of weights.",
        with_commands("Fetch it, or name it with --lora FILE:", shell_command(("pull", preset.name))),
    )


def _is_named(path: Path, kind: LoraKind) -> bool:
    """By its name, or that of the file that a link leads to."""
    names = f"{path.name}/{path.resolve().name}".lower()
    return any(part in names for part in NAMES[kind]) and not OTHER_EXPERT.search(names)
