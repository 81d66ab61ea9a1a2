"""Chooses the file of every part and opens it.

If several files fit, one is taken in this order:
1. the one that is named;
2. the one whose numbers change least on the way into the engines of this precision. FP8 engines take scaled
   FP8 bit for bit, so it comes before bf16, which is twice as long and rounded to the same 8 bits. bf16
   engines take bf16 as it is, and everything shorter after it. The linear weights count here, which are
   nearly all;
3. if two lose the same, the shorter one: it is read faster;
4. the newest layout: comfy_quant, `weight_scale`, `scale_weight`;
5. the one whose other tensors lose less: KJ's v1, whose face layers are bf16, comes before v2.
Copies, links and snapshots of one model are one file. Two models that are equal in all that compete: the user
must choose.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import MODELS, ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.errors import LONGEST_MESSAGE, WeightsError, some_of
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.weights.checkpoint import SPOKEN, Checkpoint
from trt_wan.runtime.weights.find_files import find_files, option, short_path, spoken
from trt_wan.runtime.weights.needed import needed
from trt_wan.runtime.weights.recognition.encodings import Cost, cost, encoding_of, engine_types
from trt_wan.runtime.weights.recognition.twins import QWEN_NAMED, is_named_qwen, is_qwen_vae, same_values

PATCH_EMBEDDING = "patch_embedding.weight"
CAMERA_FFN = "controlnet_blocks.0.ffn.0.bias"
LONGEST_REASON = 110  # characters of a file's reason in a list
Model = Callable[[Checkpoint], ModelConfig]
Faults = Mapping[Path, WeightsError]


@dataclass(frozen=True)
class Taken:
    checkpoint: Checkpoint
    why: str
    faults: Faults  # why files do not fit


def load_weights(
    folders: Sequence[Path],
    chosen: Mapping[Part, Path],
    progress: Progress = silent,
    precision: Precision = "bf16",
) -> tuple[ModelConfig, dict[Part, Checkpoint]]:
    """The model and the checked checkpoint of every part: `chosen`, or found in or below `folders`.

    A chosen folder is searched for its part. Reports the file of each part and why it was taken, and files
    that cannot be used. Reads headers and scales only. Raises WeightsError.
    """
    files = {part: [path] for part, path in chosen.items() if not path.is_dir()}
    for part, path in chosen.items():
        if path.is_dir():
            files |= find_files([path], [part], progress)
    files |= find_files(folders, [part for part in PARTS if part not in chosen], progress)
    transformer = _choose("transformer", files["transformer"], identify, precision, "transformer" in chosen)
    model = identify(transformer.checkpoint)
    weights: dict[Part, Checkpoint] = {}
    for part in PARTS:
        taken = transformer
        if part != "transformer":
            taken = _choose(part, files[part], lambda _: model, precision, part in chosen)
        weights[part] = taken.checkpoint
        progress(_note(part, taken.checkpoint, taken.why, list(required_tensors(model, part))))
        if taken.faults:
            text = f"Not usable as the {spoken(part)}: {some_of(_reasons(part, taken.faults))}."
            progress(Note(text, "unusable_files", {"files": [str(path) for path in taken.faults]}))
    return model, weights


def load_camera(
    folders: Sequence[Path],
    chosen: Path | None,
    model: ModelConfig,
    precision: Precision,
    progress: Progress = silent,
) -> tuple[ModelConfig, Checkpoint]:
    """The checked checkpoint of Uni3C, as `load_weights` finds those of the model's parts, and the model with
    the channels that it has. Raises WeightsError.
    """
    part: Part = "camera_control"
    if chosen is not None and not chosen.is_dir():
        paths = [chosen]
    else:
        paths = find_files(folders if chosen is None else [chosen], [part], progress)[part]
    taken = _choose(part, paths, lambda file: with_camera_of(model, file), precision, chosen is not None)
    model = with_camera_of(model, taken.checkpoint)
    progress(_note(part, taken.checkpoint, taken.why, list(required_tensors(model, part))))
    return model, taken.checkpoint


def with_camera_of(model: ModelConfig, camera: Checkpoint) -> ModelConfig:
    """The model, with as many channels in the FFN of Uni3C as that file has."""
    if CAMERA_FFN not in camera or not (shape := camera.shape(CAMERA_FFN)):
        return model
    return replace(model, camera=replace(model.camera, ffn_dim=shape[0]))


def identify(transformer: Checkpoint) -> ModelConfig:
    """The model whose width the transformer has."""
    dims = {model.transformer.dim: model for model in MODELS.values()}
    known = transformer.layout is not None and transformer.layout.part == "transformer"
    shape = transformer.shape(PATCH_EMBEDDING) if PATCH_EMBEDDING in transformer else ()
    if known and shape and shape[0] in dims:
        return dims[shape[0]]
    called, hint = SPOKEN["transformer"]
    if not known and (what := transformer.what()):
        raise WeightsError(f"{transformer.path} is {what}, not {called}.", hint)
    if foreign := transformer.quantised.foreign():
        raise WeightsError(f"{transformer.path} is quantised for {foreign}, which is not supported.", hint)
    found = f"is {list(shape)}" if shape else "is missing"
    raise WeightsError(
        f"{transformer.path} is not {called}: its {PATCH_EMBEDDING} {found}.",
        f"The first dimension must be one of {sorted(dims)}. {hint}" if shape else hint,
    )


def closest_model(checkpoint: Checkpoint, part: Part) -> ModelConfig:
    """The model with most tensors in the shapes of the file."""

    def fitting(model: ModelConfig) -> int:
        shapes = needed(checkpoint, model, part)
        return sum(checkpoint.fault(name, shape) is None for name, shape in shapes.items())

    return max((with_camera_of(model, checkpoint) for model in MODELS.values()), key=fitting)


def _choose(part: Part, paths: Sequence[Path], model: Model, precision: Precision, named: bool) -> Taken:
    """Raises WeightsError."""
    fitting: list[Checkpoint] = []
    faults: dict[Path, WeightsError] = {}
    for path in paths:
        try:
            fitting.append(_opened(part, path, model, named and len(paths) == 1))
        except WeightsError as error:
            faults[path] = error
    if not fitting and len(paths) == 1:
        raise faults[paths[0]]
    if not fitting:
        raise _none_fits(part, faults)
    if len(fitting) == 1:
        left = f", {len(faults)} other{'s do' if len(faults) > 1 else ' does'} not fit" if faults else ""
        return Taken(fitting[0], f"{'named' if named else 'the only one'}{left}", faults)
    costs = {id(one): _cost(part, one, model(one), precision) for one in fitting}
    ordered = sorted(fitting, key=lambda one: costs[id(one)])
    best = costs[id(ordered[0])]
    equal = [one for one in ordered if costs[id(one)] == best]
    different = [equal[0], *(one for one in equal[1:] if not same_values(equal[0], one))]
    if len(different) > 1:
        raise _several(part, different, model)
    if len(equal) == len(ordered):
        return Taken(equal[0], f"one of {len(equal)} copies", faults)
    why = _reason(best, costs[id(ordered[len(equal)])], len(ordered), precision)
    return Taken(ordered[0], why, faults)


def _opened(part: Part, path: Path, model: Model, named: bool) -> Checkpoint:
    checkpoint = Checkpoint(path, part)
    checkpoint.require(required_tensors(model(checkpoint), part), part)
    if part == "vae":
        called, hint = SPOKEN[part]
        if is_qwen_vae(checkpoint):
            raise WeightsError(f"{path} is the VAE of Qwen-Image, not {called}.", hint)
        if is_named_qwen(path) and not named:
            raise WeightsError(
                f"{path} is {QWEN_NAMED}.", f"Name another file with {option(part)} FILE, or this."
            )
    return checkpoint


def _cost(part: Part, checkpoint: Checkpoint, model: ModelConfig, precision: Precision) -> Cost:
    return cost(checkpoint, required_tensors(model, part), engine_types(model, part, precision))


def _reason(best: Cost, next_one: Cost, count: int, precision: Precision) -> str:
    if best.error < next_one.error:
        why = f"it loses least in {precision}"
    elif best.bits < next_one.bits:
        why = f"the shortest of those that lose least in {precision}"
    elif best.age < next_one.age:
        why = "its layout is the newest"
    else:
        why = f"its smaller tensors lose least in {precision}"
    return f"{why}, of {count}"


def _note(part: Part, checkpoint: Checkpoint, why: str, names: Sequence[str]) -> Note:
    layout = checkpoint.layout.name if checkpoint.layout else "unknown names"
    stored, size = encoding_of(checkpoint, names), bytes_of(checkpoint)
    text = f"{spoken(part)} = {checkpoint.path} ({layout}, {stored}, {size / 1e9:.2f} GB; {why})"
    data = {
        "part": part,
        "file": str(checkpoint.path),
        "layout": layout,
        "type": stored,
        "bytes": size,
        "why": why,
    }
    return Note(text, "weights_file", data)


def bytes_of(checkpoint: Checkpoint) -> int:
    """Of all files: an index's shards too."""
    return sum(file.stat().st_size for file in {entry.file for entry in checkpoint.file.entries.values()})


def _none_fits(part: Part, faults: Faults) -> WeightsError:
    text = f"None of {len(faults)} files fits as {SPOKEN[part][0]}: "
    return WeightsError(
        f"{text}{some_of(_reasons(part, faults), LONGEST_MESSAGE - 20 - len(text))}.",
        f"{SPOKEN[part][1]} Put it there, or name it with {option(part)} FILE.",
    )


def _reasons(part: Part, faults: Faults) -> list[str]:
    """A clause for each file, or for several with the same fault."""
    alike: dict[str, list[Path]] = {}
    for path, error in faults.items():
        alike.setdefault(_short(part, error, path), []).append(path)
    return [
        f"{short_path(paths[0].name)}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} {reason}"
        for reason, paths in alike.items()
    ]


def _short(part: Part, error: WeightsError, path: Path) -> str:
    text = error.message.removeprefix(f"{path} ").rstrip(".").replace(str(path), short_path(path.name))
    text = text.removeprefix(f"does not fit as {SPOKEN[part][0]}: ")
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"


def _several(part: Part, files: Sequence[Checkpoint], model: Model) -> WeightsError:
    """Names the files from the folder that holds them all."""
    folder = os.path.commonpath([one.path.absolute().parent for one in files])
    told = []
    for one in files:
        names = required_tensors(model(one), part)
        name = short_path(one.path.absolute().relative_to(folder))
        told.append(f"{name} ({encoding_of(one, names)}, {bytes_of(one) / 1e9:.2f} GB)")
    text = f"Several files in {short_path(folder)} hold the {spoken(part)}: "
    return WeightsError(
        f"{text}{some_of(told, LONGEST_MESSAGE - 20 - len(text))}.", f"Choose with {option(part)} FILE."
    )
