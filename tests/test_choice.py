"""Which file of several is taken, what is said about it, and what files that do not fit are called."""

import hashlib
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from made_layouts import (
    BF16,
    F16,
    F32,
    V2,
    Maker,
    described,
    diffusers_file,
    fp8,
    gguf_file,
    int8,
    official_umt5,
    open_clip,
    pickled,
    prefixed,
    shards,
)
from test_checkpoints import PROMPT, failure, rewrite, write_sparse

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Part
from trt_wan.engines.precision import Precision
from trt_wan.errors import UsageError
from trt_wan.runtime.events import Note
from trt_wan.runtime.settings import WeightFiles
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.describe import describe
from trt_wan.runtime.weights.find_tokenizer import WRAPPER, find_tokenizer
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.recognition import twins
from trt_wan.runtime.weights.tiny import write_tiny_weights

SEED = 1


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of torch wait for each other on a busy machine, 5 s for a small file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written tiny weights, not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_weights(folder, SEED)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "weights"))


def taken(folder: Path, precision: Precision = "bf16", **chosen: Path) -> dict[str, Note]:
    """The note about each part."""
    notes: list[Any] = []
    load_weights([folder], chosen, notes.append, precision)  # type: ignore[arg-type]
    assert all(note.code in ("weights_file", "unusable_files") and len(note.text) < 400 for note in notes)
    found = {note.data["part"]: note for note in notes if note.code == "weights_file"}
    assert list(found) == list(PARTS)
    return found


def unusable(folder: Path) -> list[str]:
    """The notes about files that cannot be used."""
    notes: list[Any] = []
    load_weights([folder], {}, notes.append)
    return [note.text for note in notes if note.code == "unusable_files"]


def test_broken_files_beside_good_ones_are_told(folder: Path) -> None:
    right = Path(str(taken(folder)["transformer"].data["file"]))
    assert unusable(folder) == []
    (folder / "cut.safetensors").write_bytes(right.read_bytes()[:-1000])
    (folder / "wan_empty.safetensors").touch()
    (folder / "page.gguf").write_bytes(b"<html>no access</html>")
    (folder / "old_upscaler.pth").write_bytes(bytes(1 << 17))
    (folder / "upscale_models").mkdir()
    (folder / "upscale_models" / "x.safetensors").touch()
    unread, unfit = unusable(folder)
    assert unread == "Files that cannot be used: wan_empty.safetensors is empty; page.gguf is a web page."
    assert unfit.startswith("Not usable as the transformer: cut.safetensors is truncated: its tensors end")
    for k in range(9):
        (folder / f"{'long' * 40}{k}.safetensors").touch()
    assert len(unusable(folder)[0]) < 400 and unusable(folder)[0].endswith("9 more.")


def made(part: Part, folder: Path, **makers: Maker) -> Path:
    """Files of one model in several forms, each in a folder of its name, and the other parts."""
    weights = random_weights(TINY, part, SEED)
    for name, maker in makers.items():
        (folder / name).mkdir()
        maker(folder / name, weights)
    for path in folder.glob("*.safetensors"):
        if Checkpoint(path).layout.part == part:  # type: ignore[union-attr]
            path.unlink()
    return folder


# ---- one note per part ----


def test_a_note_says_file_layout_type_size_and_why(tiny: Path) -> None:
    notes = taken(tiny)
    path = next(tiny.glob("*animate*"))
    note = notes["transformer"]
    size = path.stat().st_size
    assert note.text == (
        f"transformer = {path} (official names, scaled F8_E4M3, {size / 1e9:.2f} GB; the only one)"
    )
    assert note.data == {
        "part": "transformer",
        "file": str(path),
        "layout": "official names",
        "type": "scaled F8_E4M3",
        "bytes": size,
        "why": "the only one",
    }
    kinds = {part: (note.data["layout"], note.data["type"]) for part, note in notes.items()}
    assert kinds["vae"] == ("official names", "BF16")
    assert kinds["text_encoder"] == ("Hugging Face", "scaled F8_E4M3")
    assert kinds["image_encoder"] == ("Hugging Face", "F16")


def test_a_named_file_and_a_named_folder_are_taken(folder: Path, tmp_path: Path) -> None:
    made("transformer", folder, a=prefixed("", BF16), b=fp8(scale="weight_scale"))
    assert taken(folder, transformer=folder / "b" / "fp8.safetensors")["transformer"].data["why"] == "named"
    note = taken(folder, transformer=folder / "b")["transformer"]
    assert (note.data["file"], note.data["why"]) == (str(folder / "b" / "fp8.safetensors"), "named")


# ---- the order ----

V1 = fp8()
COMFY = fp8(scale="weight_scale", more=described({"format": "float8_e4m3fn"}))
CONVROT = int8({"format": "int8_tensorwise", "convrot": True}, 256)
ORDER: tuple[tuple[Precision, dict[str, Maker], str, str], ...] = (
    ("fp8", {"bf16": prefixed(""), "v1": V1, "f32": prefixed("", F32)}, "v1", "the shortest of those"),
    ("fp8", {"v2": fp8(among=V2), "v1": V1}, "v1", "its smaller tensors lose least in fp8, of 2"),
    ("fp8", {"plain": fp8(scale=""), "bf16": prefixed("")}, "bf16", "it loses least"),
    ("fp8", {"q4": gguf_file("Q4_0"), "int8": int8({"format": "int8_tensorwise"})}, "int8", "it loses least"),
    ("fp8", {"v1": V1, "comfy": COMFY}, "comfy", "its layout is the newest, of 2"),
    ("int8", {"bf16": prefixed(""), "v1": V1, "convrot": CONVROT}, "convrot", "it loses least in int8"),
    ("bf16", {"bf16": prefixed(""), "v1": V1, "f32": prefixed("", F32)}, "bf16", "the shortest of those"),
    ("bf16", {"f16": prefixed("", F16), "bf16": prefixed("")}, "bf16", "it loses least in bf16"),
    ("fp32", {"bf16": prefixed(""), "f32": prefixed("", F32)}, "f32", "it loses least in fp32"),
    ("fp32", {"q8": gguf_file("Q8_0"), "bf16": prefixed("")}, "bf16", "it loses least in fp32"),
)


@pytest.mark.parametrize("row", ORDER, ids=lambda row: f"{row[0]}: {', '.join(row[1])}")
def test_the_precision_decides_and_then_the_layout(
    row: tuple[Precision, dict[str, Maker], str, str], folder: Path
) -> None:
    precision, makers, best, why = row
    note = taken(made("transformer", folder, **makers), precision)["transformer"]
    assert f"/{best}/" in str(note.data["file"]) and str(note.data["why"]).startswith(why), note


def hard_link(path: Path) -> None:
    os.link(path, path.with_name(f"b {path.name}"))


def copy(path: Path) -> None:
    (path.parent / "copies").mkdir()
    shutil.copy(path, path.parent / "copies" / path.name)


def other_metadata(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path.with_name(f"b {path.name}"), {"format": "pt"})


def two_snapshots(path: Path) -> None:
    """As the Hub's cache has them: links to one blob, in a folder per revision."""
    blob = path.rename(path.parent / "blob")
    for revision in ("abc", "def"):
        (path.parent / revision).mkdir()
        (path.parent / revision / path.name).symlink_to(blob)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("double", [hard_link, copy, other_metadata, two_snapshots])
def test_copies_links_and_snapshots_are_one_file(
    double: Callable[[Path], None], part: Part, folder: Path
) -> None:
    double(Path(str(taken(folder)[part].data["file"])))
    why = taken(folder)[part].data["why"]
    assert why == ("the only one" if double in (hard_link, two_snapshots) else "one of 2 copies")


def test_shards_and_a_single_file_of_one_model_are_one(folder: Path) -> None:
    note = taken(made("transformer", folder, one=prefixed(""), four=shards(4, True), set=shards(4, False)))
    assert note["transformer"].data["why"] == "one of 3 copies"


def test_none_of_the_files_fits(folder: Path) -> None:
    """Each reason is told, in less than 400 characters; files with the same one together."""
    made("transformer", folder, a=prefixed(""), b=prefixed(""), c=prefixed(""), d=prefixed(""))
    for name in "abcd":
        lost = {"a": "blocks", "d": "face_adapter"}.get(name, "head")
        rewrite(
            folder / name / "x.safetensors",
            folder / name / f"{name}.safetensors",
            lambda tensors, lost=lost: {n: v for n, v in tensors.items() if not n.startswith(lost)},  # type: ignore[misc]
        )
        (folder / name / "x.safetensors").unlink()
    cut = (folder / "b" / "b.safetensors").read_bytes()
    (folder / "b" / "b.safetensors").write_bytes(cut[:-1000])
    error = failure(lambda: load_weights([folder], {}))
    assert "None of 4 files fits as the transformer of Wan2.2-Animate: a.safetensors " in error.message
    assert "b.safetensors is truncated" in error.message and error.message.endswith("; 1 more.")
    assert "c.safetensors 3 of 227 tensors are missing, such as head." in error.message
    assert "--transformer FILE" in error.hint and len(error.message) < 400
    shutil.copy(folder / "c" / "c.safetensors", folder / "b" / "b.safetensors")
    assert "; b.safetensors and 1 more 3 of 227" in failure(lambda: load_weights([folder], {})).message
    for name in "abcd":
        (folder / name / f"{name}.safetensors").rename(folder / name / f"{name * 200}.safetensors")
    error = failure(lambda: load_weights([folder], {}))
    assert len(error.message) < 400 and error.message.endswith(" more.")


def test_all_four_named_need_no_folder(tiny: Path) -> None:
    files: dict[Part, Path] = {part: Path(str(note.data["file"])) for part, note in taken(tiny).items()}  # type: ignore[misc]
    assert load_weights((), WeightFiles(files=files).files)[0] is TINY
    del files["vae"]
    error = failure(lambda: load_weights((), WeightFiles(files=files).files))
    assert error.message == "No file is named for the vae." and "--vae FILE" in error.hint
    with pytest.raises(UsageError, match="There are no weights"):
        WeightFiles()


@pytest.mark.parametrize(
    ("part", "hint"), [("vae", "wan_2.1_vae"), ("text_encoder", "umt5"), ("image_encoder", "clip_vision_h")]
)
def test_the_hint_fits_the_part(part: Part, hint: str, folder: Path) -> None:
    path = Path(str(taken(folder)[part].data["file"]))
    lost = list(required_tensors(TINY, part))[-1]
    rewrite(path, path, lambda tensors: {n: v for n, v in tensors.items() if n != lost})
    error = failure(lambda: load_weights([folder], {}))
    assert f"is missing, such as {lost}" in error.message and hint in error.hint


# ---- whole repositories ----


def official_repository(folder: Path) -> None:
    shards(4, True)(folder, random_weights(TINY, "transformer", SEED))
    pickled(name="Wan2.1_VAE.pth")(folder, random_weights(TINY, "vae", SEED))
    umt5 = pickled(name="models_t5_umt5-xxl-enc-bf16.pth", change=official_umt5)
    umt5(folder, random_weights(TINY, "text_encoder", SEED))
    open_clip("visual.", pickle=True)(folder, random_weights(TINY, "image_encoder", SEED))
    torch.save(
        {"state_dict": {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(99, 999)}}, folder / "l.ckpt"
    )


def diffusers_repository(folder: Path) -> None:
    for part, name in (("transformer", "transformer"), ("vae", "vae")):
        (folder / name).mkdir()
        diffusers_file()(folder / name, random_weights(TINY, part, SEED))  # type: ignore[arg-type]
        kind = "WanAnimateTransformer3DModel" if name == "transformer" else "AutoencoderKLWan"
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind}))
    shards(5, True)(folder / "text_encoder", random_weights(TINY, "text_encoder", SEED))
    (folder / "image_encoder").mkdir()
    prefixed("", F16)(folder / "image_encoder", random_weights(TINY, "image_encoder", SEED))


@pytest.mark.parametrize(
    ("repository", "tokenizer"),
    [(official_repository, "google/umt5-xxl"), (diffusers_repository, "tokenizer")],
)
def test_a_whole_repository_is_used_in_place(
    repository: Callable[[Path], None], tokenizer: str, tiny: Path, tmp_path: Path
) -> None:
    repository(tmp_path)
    (tmp_path / tokenizer).mkdir(parents=True)
    shutil.copy(tiny / "tokenizer.json", tmp_path / tokenizer)
    model, weights = load_weights([tmp_path], {})
    assert model is TINY
    for part, checkpoint in weights.items():
        for name, want in random_weights(TINY, part, SEED).items():
            error = np.abs(checkpoint[name] - want).max() / np.abs(want).max()
            assert error < 4e-3, f"{part} {name}: {error}"
    find_tokenizer(None, [tmp_path], weights["text_encoder"], 512).encode(PROMPT)


# ---- the VAE of Qwen-Image ----


def qwen_by_name(path: Path) -> Path:
    return path.rename(path.with_name("qwen_image_vae.safetensors"))


def qwen_by_config(path: Path) -> Path:
    (path.parent / "vae").mkdir()
    (path.parent / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLQwenImage"}))
    return path.rename(path.parent / "vae" / path.name)


def test_the_vae_of_qwen_is_never_taken_unasked(folder: Path) -> None:
    right = Path(str(taken(folder)["vae"].data["file"]))
    other = rewrite(right, folder / "qwen_image_vae.safetensors", lambda t: {n: v + 1 for n, v in t.items()})
    assert taken(folder)["vae"].data == taken(folder)["vae"].data | {
        "file": str(right),
        "why": "the only one, 1 other does not fit",
    }
    assert taken(folder, vae=other)["vae"].data["why"] == "named"  # a name proves nothing
    right.unlink()
    error = failure(lambda: load_weights([folder], {}))
    assert "by its name the VAE of Qwen-Image" in error.message and "--vae FILE" in error.hint


@pytest.mark.parametrize("known", ["config", "hash"])
def test_the_vae_of_qwen_is_refused_where_it_is_surely_that(
    known: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(str(taken(folder)["vae"].data["file"]))
    if known == "config":
        path = qwen_by_config(path)
    else:
        content = path.read_bytes()
        monkeypatch.setattr(twins, "QWEN_BYTES", len(content))
        monkeypatch.setattr(twins, "QWEN_SHA256", hashlib.sha256(content).hexdigest())
    for chosen in ({}, {"vae": path}):
        error = failure(lambda chosen=chosen: load_weights([folder], chosen))  # type: ignore[misc]
        assert error.message == f"{path} is the VAE of Qwen-Image, not the VAE of Wan2.1."
    assert describe(path).problem == error.message


def test_the_published_size_of_qwens_vae_is_that_of_the_layout_without_metadata(tmp_path: Path) -> None:
    from full_size import layouts

    from trt_wan.engines.config import ANIMATE_14B

    wan = layouts(ANIMATE_14B, "fp8")["Wan2_1_VAE_bf16.safetensors"]
    assert wan.size - twins.QWEN_BYTES == len('"__metadata__":{"format":"pt"},') + 1  # and padding to 8


# ---- other models ----

WAN = {"head.modulation": (1, 2, 8), "blocks.0.self_attn.q.weight": (8, 8)}
I2V = {"img_emb.proj.0.weight": (8,)}


def patch(dim: int, channels: int) -> dict[str, tuple[int, ...]]:
    return {"patch_embedding.weight": (dim, channels, 1, 2, 2)}


OTHERS: dict[str, dict[str, tuple[int, ...]]] = {
    "Wan T2V 14B": WAN | patch(5120, 16),
    "Wan T2V 1.3B": WAN | patch(1536, 16),
    "Wan2.2 I2V 14B": WAN | patch(5120, 36),
    "Wan2.1 I2V 14B, or Wan-Animate-2 with the same tensors": WAN | I2V | patch(5120, 36),
    "Wan2.2 TI2V 5B": WAN | patch(3072, 48),
    "Wan VACE 14B": WAN | patch(5120, 16) | {"vace_patch_embedding.weight": (5120, 96, 1, 2, 2)},
    "Wan2.2 S2V 14B": WAN | patch(5120, 16) | {"casual_audio_encoder.weights": (1, 25, 1, 1)},
    "SCAIL-2 14B": WAN | patch(5120, 20) | {f"patch_embedding_{x}.weight": (1,) for x in ("pose", "mask")},
    "SCAIL 14B": WAN | patch(5120, 20) | {"patch_embedding_pose.weight": (1,)},
    "Wan-Animate-2 14B": WAN | patch(5120, 36) | {"blocks.0.block.self_attn.q.weight": (8, 8)},
    "a Wan transformer 14B of 52 input channels": WAN | patch(5120, 52),
    "FLUX": {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 8)},
    "SDXL": {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "conditioner.embedders.1.model.ln_final.weight": (8,),
    },
    "a LoRA": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 8), "patch_embedding.diff": (8,)},
    "an upscaler": {"model.1.sub.0.RDB1.conv1.0.weight": (8, 8, 3, 3)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": (8, 3, 3, 3)},
    "the camera control Uni3C": {"controlnet_patch_embedding.weight": (8, 20, 1, 2, 2)},
    "the ref adapter of Lynx": {"blocks.0.self_attn.ref_adapter.to_k_ref.weight": (8, 8)},
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
    "the VAE of Wan2.1": {"decoder.upsamples.0.residual.2.weight": (8, 8, 3, 3, 3)},
    "the VAE of Wan2.2 5B": {"decoder.upsamples.0.upsamples.0.residual.2.weight": (8, 8, 3, 3, 3)},
    "the text encoder umT5-xxl": {"blocks.1.pos_embedding.embedding.weight": (32, 4)},
    "the image encoder CLIP ViT-H/14": {"visual.cls_embedding": (1, 1, 8)},
    "SAM2": {"sam_mask_decoder.iou_token.weight": (1, 8)},
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("what", OTHERS)
def test_another_model_given_as_the_transformer_is_named(
    what: str, prefix: str, tiny: Path, tmp_path: Path
) -> None:
    if prefix and not what.startswith(("Wan", "SCAIL", "FLUX")):
        pytest.skip("has a prefix of its own")
    shapes = {prefix + name: shape for name, shape in OTHERS[what].items()}
    path = write_sparse(tmp_path / "x.safetensors", shapes)
    error = failure(lambda: load_weights([tiny], {"transformer": path}))
    assert error.message == f"{path} is {what}, not the transformer of Wan2.2-Animate."
    assert "wan2.2_animate_14B" in error.hint
    described = describe(path)
    assert described.what == what
    assert described.problem.startswith(f"{path} ") or what == "SAM2"  # a run takes it with --sam2


def test_what_is_there_is_told_where_the_transformer_is_missing(folder: Path) -> None:
    next(folder.glob("*animate*")).unlink()
    write_sparse(folder / "wan_t2v.safetensors", OTHERS["Wan T2V 14B"])
    error = failure(lambda: load_weights([folder], {}))
    assert f"No file in {folder} holds the transformer; wan_t2v.safetensors is Wan T2V 14B." == error.message


# ---- a tokenizer, and a description ----


def test_the_wrappers_tokenizer_is_found_above_the_models(folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "ComfyUI" / "models" / "text_encoders" / "wan"
    models.mkdir(parents=True)
    path = Path(shutil.move(next(folder.glob("umt5*")), models))
    with pytest.raises(Exception, match="holds no tokenizer"):
        find_tokenizer(None, [tmp_path / "ComfyUI" / "models"], Checkpoint(path), 512)
    place = tmp_path / "ComfyUI" / WRAPPER
    place.mkdir(parents=True)
    shutil.move(folder / "tokenizer.json", place)
    find_tokenizer(None, [tmp_path / "elsewhere"], Checkpoint(path), 512).encode(PROMPT)


def test_a_description_of_a_file_with_faults(folder: Path) -> None:
    path = next(folder.glob("*animate*"))
    whole = describe(path)
    assert whole.what == "the transformer of Wan2.2-Animate"
    assert (whole.part, whole.model) == ("transformer", "tiny")
    assert (whole.layout, whole.encoding) == ("safetensors, official names", "scaled F8_E4M3")
    assert whole.types == {"BF16": 193, "F8_E4M3": 49, "F32": 48} and whole.quantised == 48
    assert whole.tensors == 290 and whole.bytes == path.stat().st_size
    shapes = required_tensors(TINY, "transformer").values()
    assert whole.parameters == sum(math.prod(shape) for shape in shapes)
    assert not (whole.missing or whole.unexpected or whole.problem or whole.others)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        left = {n: v for n, v in tensors.items() if ".self_attn.k." not in n}
        return left | {f"blocks.{k}.odd.weight": torch.zeros(2) for k in range(3)} | {"more": torch.zeros(1)}

    broken = describe(rewrite(path, path, change))
    assert broken.missing.startswith("8 of 227 tensors are missing, such as blocks.*.self_attn.k.")
    assert broken.unexpected == "3 like blocks.*.odd.weight, more"
    assert broken.missing in broken.problem and len(broken.problem) < 400


def test_a_description_of_a_file_of_several_parts(tiny: Path, tmp_path: Path) -> None:
    tensors = {}
    for part, prefix in (("vae", "vae."), ("image_encoder", "clip_vision.")):
        weights = random_weights(TINY, part, SEED)  # type: ignore[arg-type]
        tensors |= {prefix + name: torch.from_numpy(values) for name, values in weights.items()}
    safetensors.torch.save_file(tensors, tmp_path / "all.safetensors")
    found = describe(tmp_path / "all.safetensors")
    assert (found.part, found.others, found.problem) == ("vae", ("image_encoder",), "")
    assert found.layout == "safetensors, official names, prefix vae." and found.types == {"F32": 194}


# ---- pickles ----


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def vae_pth(path: Path, more: object = None, **options: Any) -> Path:
    weights = random_weights(TINY, "vae", SEED)
    tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in weights.items()}
    torch.save(tensors | ({"more": more} if more is not None else {}), path, **options)
    return path


def test_a_pickle_runs_nothing_and_a_damaged_one_is_refused(folder: Path, tmp_path: Path) -> None:
    next(folder.glob("*vae*")).unlink()
    good = vae_pth(folder / "Wan2.1_VAE.pth")
    assert taken(folder)["vae"].data["file"] == str(good)
    vae_pth(folder / "Wan2.1_VAE.pth", Evil(tmp_path / "was_here"))
    error = failure(lambda: load_weights([folder], {}))
    assert "it asks for posix.mkdir" in error.message and not (tmp_path / "was_here").exists()
    vae_pth(good, _use_new_zipfile_serialization=False)
    error = failure(lambda: load_weights([folder], {"vae": good}))
    assert "torch's format of before version 1.6" in error.message
    content = vae_pth(good).read_bytes()
    good.write_bytes(content[:-3000])
    assert str(good) in failure(lambda: load_weights([folder], {"vae": good})).message
    with zipfile.ZipFile(vae_pth(tmp_path / "whole.pth")) as whole, zipfile.ZipFile(good, "w") as packed:
        for entry in whole.namelist():
            packed.writestr(entry, whole.read(entry), zipfile.ZIP_DEFLATED if "data/7" in entry else None)
    assert "is compressed, which torch does not do" in failure(lambda: load_weights([folder], {})).message


# ---- speed ----


def test_a_comfyui_tree_of_1200_files(folder: Path) -> None:
    """LoRAs, other models, broken files and pickles around the right ones."""
    lora = {
        f"diffusion_model.blocks.{n}.{layer}.lora_{side}.weight": (4, 4)
        for n in range(40)
        for layer in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
        for side in ("A", "B")
    }
    blocks = {f"blocks.{n}.self_attn.{x}.weight": (4, 4) for n in range(40) for x in "qkvo"}
    kinds = [write_sparse(folder / "lora.safetensors", lora).read_bytes()]
    kinds.append(write_sparse(folder / "t2v.safetensors", WAN | patch(4, 16) | blocks).read_bytes())
    kinds += [b"", b"<html>", b"\x40" + bytes(7)]
    torch.save({"x": torch.zeros(20_000)}, folder / "sd.ckpt")
    kinds.append((folder / "sd.ckpt").read_bytes())
    for k in range(1200):
        place = folder / ("loras", "checkpoints", "upscale_models")[k % 3] / str(k % 20)
        place.mkdir(parents=True, exist_ok=True)
        kind = kinds[0] if k % 3 == 0 else kinds[k % len(kinds)]
        suffix = "ckpt" if kind is kinds[-1] else "safetensors"
        (place / f"{k}.{suffix}").write_bytes(kind)
    start = time.perf_counter()
    notes = taken(folder)
    seconds = time.perf_counter() - start
    assert len(notes) == 4 and all(note.data["why"] == "the only one" for note in notes.values())
    assert seconds < 2, f"{seconds:.2f} s"  # measured 0.3 s
