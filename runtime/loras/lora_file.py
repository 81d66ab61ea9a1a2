"""A LoRA file opened for a model: what it changes, by tensor, and the keys that match nothing.

Reads the header, the alphas and small factors; other numbers stay in the map of the file. A file that cannot
be merged right is refused with a WeightsError, and so is one of another model.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.runtime.loras.changes import Change, Rows
from trt_wan.runtime.loras.families import Group, Opened, shortened, unusable
from trt_wan.runtime.loras.names import Layer, find_layer, pattern_of, split
from trt_wan.runtime.loras.peft_config import find_config
from trt_wan.runtime.loras.refusals import (
    refuse_control,
    refuse_other_width,
    refuse_unsupported,
    some_patterns,
    unknown,
)
from trt_wan.runtime.weights.open_file import open_file
from trt_wan.runtime.weights.tensor_file import is_finite

PATCHES = Layer("patch_embedding")
Whole = Callable[[str], Rows]


def _no_base(name: str) -> Rows:
    raise AssertionError(f"{name} is not read for a description")


@dataclass(frozen=True)
class LoraFile:
    file: Opened
    groups: tuple[Group, ...]  # by layer
    unmatched: Counter[str]  # keys that match nothing, by pattern
    skipped: tuple[str, ...]  # keys for inputs that the model has not

    @property
    def path(self) -> Path:
        return self.file.path

    def changes(self) -> dict[str, list[Change]]:
        """By tensor. Raises WeightsError for shapes that do not fit."""
        found: dict[str, list[Change]] = defaultdict(list)
        for group in self.groups:
            for name, change in group.changes():
                found[name].append(change)
        return dict(found)

    @property
    def left_aside(self) -> str:
        """The keys that change nothing, in a sentence; empty if there are none."""
        said = []
        if self.skipped:
            said.append(f"{len(self.skipped)} of a patch embedding for text to video")
        if self.unmatched:
            total = sum(self.unmatched.values())
            said.append(f"{total} that match nothing in this model: {some_patterns(self.unmatched)}")
        return f"Keys that are left out: {'; '.join(said)}." if said else ""

    def require_finite(self) -> None:
        """Raises WeightsError that names a tensor with a NaN or an infinity. Reads the whole file."""
        used = [key for group in self.groups for key in group.keys.values()]
        with ThreadPoolExecutor() as threads:
            finite = threads.map(lambda key: is_finite(self.file.read(key)), used)
            for key, good in zip(used, finite, strict=True):
                if not good:
                    raise unusable(self.file, f"{shortened(key)} holds a NaN or an infinity")


def open_lora(path: Path, config: ModelConfig, whole: Whole = _no_base) -> LoraFile:
    """The LoRA, checked for the model by its header. `whole` returns an unchanged weight as [rows, inner].

    Raises WeightsError.
    """
    file = open_file(path)
    refuse_unsupported(path, file)
    refuse_control(path, file, config)
    keys, unmatched = _by_layer(file, config)
    if not keys:
        raise unknown(path, file)
    refuse_other_width(path, file, config)
    skipped = _patches_of_other_inputs(file, keys.get(PATCHES, {}), config)
    if skipped:
        del keys[PATCHES]
    shapes = required_tensors(config, "transformer")
    settings = find_config(path, file.metadata)
    groups = tuple(Group(file, layer, named, shapes, whole, settings) for layer, named in keys.items())
    lora = LoraFile(file, groups, unmatched, skipped)
    if not lora.changes():
        raise unusable(file, "none of its keys changes a weight")
    return lora


def _by_layer(file: Opened, config: ModelConfig) -> tuple[dict[Layer, dict[str, str]], Counter[str]]:
    """Keys by layer and role. Raises WeightsError for two keys of one meaning."""
    keys: dict[Layer, dict[str, str]] = defaultdict(dict)
    unmatched: Counter[str] = Counter()
    for key in file:
        found = split(key)
        layer = find_layer(config, *found) if found is not None else None
        if found is None or layer is None:
            unmatched[pattern_of(key)] += 1
        elif (other := keys[layer].setdefault(found[1], key)) != key:
            raise unusable(file, f"{shortened(other)} and {shortened(key)} are both for {layer.name}")
    return dict(keys), unmatched


def _patches_of_other_inputs(file: Opened, keys: Mapping[str, str], config: ModelConfig) -> tuple[str, ...]:
    """The keys of a text-to-video patch embedding, which takes the latent's channels and no condition: its
    weight fits nothing here, and its bias belongs to it.
    """
    weights = [file[keys[role]].shape for role in ("diff", "down", "set_weight") if role in keys]
    other = any(shape[1:2] == (config.transformer.latent_channels,) for shape in weights)
    return tuple(keys.values()) if other else ()
