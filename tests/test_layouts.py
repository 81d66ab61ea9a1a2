"""Every layout of files_and_loras.md section 1 gives the numbers it was made from, and the velocity of the
float32 original, or is refused by name. `pytest -s` prints the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_velocity import Velocity
from made_layouts import (
    BF16,
    E4M3,
    E5M2,
    F16,
    F32,
    F64,
    SMALL,
    V2,
    Maker,
    Tensors,
    beside,
    cast,
    changed,
    described,
    diffusers_file,
    diffusers_folder,
    fp8,
    gguf_file,
    hub_cache,
    in_metadata,
    int8,
    llama_file,
    moved_fusers,
    official_umt5,
    open_clip,
    pickled,
    prefixed,
    renamed,
    shards,
)
from numpy.typing import NDArray
from tiny_job import PLAN

from trt_wan.engines.checkpoint import PARTS, required_tensors
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import Part
from trt_wan.engines.store.graphs import require_graphs
from trt_wan.errors import WeightsError
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.find_files import find_files
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.stored import Stored

T, V, U, C = "transformer", "vae", "text_encoder", "image_encoder"


@dataclass(frozen=True)
class Row:
    """A layout. It loads with `error` (the largest |difference| / the largest |W| of a tensor), or a message
    that has `says` refuses it.
    """

    part: Part
    name: str
    make: Maker
    error: float = 0.0
    says: str = ""
    factor: float = 1.0  # by which an option multiplies the blocks' matrices


# The largest relative error (rms) of the velocity: so many times the largest error of the format's weights,
# and for float32 the last bits.
VELOCITY_PER_ERROR, VELOCITY_FLOAT32 = 3.0, 1e-6
MARKER = {"scaled_fp8": torch.zeros(2).to(E4M3)}
V1 = fp8(more=lambda _: MARKER)
E8, E8_2, E16, EH = 3.6e-2, 7.2e-2, 4e-3, 5e-4  # scaled e4m3 and e5m2, bf16, fp16
CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
FORM = {"format": "float8_e4m3fn"}
COMFY = fp8(scale="weight_scale", more=described(FORM | {"full_precision_matrix_mult": True}))


def siblings(**extra: Callable[[torch.Tensor], torch.Tensor]) -> Maker:
    return fp8(scale="weight_scale", more=described(FORM, extra))


def twos(weight: torch.Tensor) -> torch.Tensor:
    return torch.full(weight.shape[1:], 2.0)


def with_alias(tensors: Tensors) -> Tensors:
    return {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1} | tensors


def with_ids(tensors: Tensors) -> Tensors:
    return tensors | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}


def without(end: str, maker: Maker) -> Maker:
    return changed(maker, lambda tensors: {n: v for n, v in tensors.items() if not n.endswith(end)})


def other_scale(end: str) -> Maker:
    return changed(
        V1, lambda t: {n.replace(".scale_weight", end): v for n, v in t.items() if n != "scaled_fp8"}
    )


def nvfp4(tensors: Tensors) -> Tensors:
    made = dict(tensors)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        rows, columns = tensors[f"{layer}.weight"].shape
        made[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        made[name] = torch.zeros(rows, columns // 16).to(E4M3)
        made[f"{layer}.weight_scale_2"] = torch.ones(())
    return made


def block_scales(shape: Callable[[int, int], tuple[int, ...]], dtype: torch.dtype = F32) -> Maker:
    def change(tensors: Tensors) -> Tensors:
        scales = {
            name: torch.ones(shape(*tensors[name.replace("weight_scale", "weight")].shape)).to(dtype)
            for name in tensors
            if name.endswith(".weight_scale")
        }
        return tensors | scales

    return changed(fp8(scale="weight_scale"), change)


def four_bits(*ends: str) -> Maker:
    def change(tensors: Tensors) -> Tensors:
        layers = [
            n.removesuffix("weight") for n, v in tensors.items() if n.startswith("blocks") and v.ndim == 2
        ]
        made = {f"{layer}{end}": torch.zeros(4, 4, dtype=torch.int8) for layer in layers for end in ends}
        return {n: v for n, v in tensors.items() if n.removesuffix("weight") not in layers} | made

    return changed(prefixed(""), change)


ROWS = (
    Row(T, "official bf16", prefixed(""), E16),
    Row(T, "official fp16", prefixed("", F16), EH),
    Row(T, "official fp32", prefixed("", F32)),
    Row(T, "official fp64", prefixed("", F64)),
    Row(T, "model.diffusion_model.", prefixed("model.diffusion_model."), E16),
    Row(T, "diffusion_model.", prefixed("diffusion_model."), E16),
    Row(T, "_orig_mod.", prefixed("_orig_mod."), E16),
    Row(T, "_orig_mod. inside", renamed(lambda n: n.replace("blocks.0.", "blocks.0._orig_mod.")), E16),
    Row(T, "all in one", beside("vae.", prefixed("model.diffusion_model.")), E16),
    Row(T, "fusers renamed", renamed(moved_fusers), E16),
    Row(T, "4 shards + index", shards(4, True), E16),
    Row(T, "shards in a Hub cache", hub_cache, E16),
    Row(T, "shards, one missing", shards(4, True, lose=3), says="lists shards that are not beside it"),
    Row(T, "shards without index", shards(4, False), E16),
    Row(
        T,
        "the same, one missing",
        shards(4, False, lose=3),
        says="one of 4 shards, and some are not",
    ),
    Row(T, ".sft", renamed(str, name="x.sft"), E16),
    Row(T, "suffix in capitals", renamed(str, name="X.SAFETENSORS"), E16),
    Row(T, "KJ v1", V1, E8),
    Row(T, "KJ v1, fp16 rest", fp8(rest=F16, more=lambda _: MARKER), E8),
    Row(T, "KJ v2", fp8(among=V2, more=lambda _: {"scaled_fp8": torch.zeros(0).to(E4M3)}), E8),
    Row(T, "scale [1], F32 marker", fp8(shape=(1,), more=lambda _: {"scaled_fp8": torch.zeros(2)}), E8),
    Row(T, "scale_input", changed(V1, lambda t: t | {"blocks.0.ffn.0.scale_input": torch.ones(())}), E8),
    Row(T, "scale bf16", fp8(scale_type=BF16), E8),
    Row(T, "scale fp16", fp8(scale_type=F16), E8),
    Row(T, "scaled e5m2", fp8(E5M2), E8_2),
    Row(T, "scaled e5m2 v2", fp8(E5M2, V2), E8_2),
    Row(T, "plain e4m3", cast(E4M3), 6e-2),
    Row(T, "plain e4m3, all tensors", cast(E4M3, True), 6e-2),
    Row(T, "plain e5m2", cast(E5M2), 1.2e-1),
    Row(T, "comfy_quant e4m3", COMFY, E8),
    Row(
        T,
        "comfy_quant e5m2",
        fp8(E5M2, scale="weight_scale", more=described({"format": "float8_e5m2"})),
        E8_2,
    ),
    Row(T, "comfy_quant in the metadata", fp8(scale="weight_scale", metadata=in_metadata(FORM)), E8),
    Row(T, "input_scale", siblings(input_scale=lambda w: torch.ones(())), E8),
    Row(T, "LightX2V", fp8(scale="weight_scale", per_row=True), E8),
    Row(T, "pre_quant_scale", siblings(pre_quant_scale=twos), E8, factor=2.0),
    Row(T, "int8_tensorwise", int8({"format": "int8_tensorwise"}, per_row=False), 6e-3),
    Row(T, "int8 per channel", int8({"format": "int8_tensorwise", "per_channel": True}), 6e-3),
    Row(T, "int8 scale [out]", int8({"format": "int8_tensorwise"}, scale_shape=(-1,)), 6e-3),
    Row(T, "int8 ConvRot", int8(CONVROT, 256), 2e-2),
    Row(T, "int8 ConvRot, group 64", int8(CONVROT | {"convrot_groupsize": 64}, 64), 2e-2),
    Row(T, "int8 ConvRot, default group", int8({"format": "int8_tensorwise", "convrot": True}, 256), 2e-2),
    Row(T, "int8 ConvRot in params", int8({"format": "int8_tensorwise", "params": CONVROT}, 256), 2e-2),
    Row(T, "int8 ConvRot in the metadata", int8(CONVROT, 256, where="metadata"), 2e-2),
    Row(T, "diffusers file", diffusers_file(), E16),
    Row(T, "diffusers file fp32", diffusers_file(F32)),
    Row(T, "diffusers folder", diffusers_folder, E16),
    *(Row(T, f"GGUF {kind}", gguf_file(kind), error) for kind, error in (("F16", EH), ("BF16", E16))),
    *(Row(T, f"GGUF {kind}", gguf_file(kind), EH) for kind in ("Q2_K", "Q4_K", "Q6_K")),
    *(
        Row(T, f"GGUF {kind}", gguf_file(kind), error)
        for kind, error in (("Q8_0", 4.5e-3), ("Q5_1", 3.3e-2), ("Q5_0", 5e-2), ("Q4_1", 7e-2), ("Q4_0", 0.1))
    ),
    Row(T, ".pth", pickled(), E16),
    Row(T, ".pth under state_dict", pickled("state_dict"), E16),
    Row(T, "nvfp4", changed(fp8(scale="weight_scale"), nvfp4), says="have the type U8 (nvfp4), which is not"),
    Row(
        T,
        "mxfp8",
        block_scales(lambda rows, columns: (rows, columns // 32), torch.uint8),
        says="have scales per block (mxfp8), which are not supported",
    ),
    Row(
        T,
        "musubi block scales",
        block_scales(lambda rows, columns: (rows, columns // 64, 1)),
        says="have scales per block (musubi tuner's), which are not",
    ),
    Row(T, "nunchaku", four_bits("qweight", "wscales"), says="is quantised for Nunchaku (4 bits)"),
    Row(T, "awq", four_bits("qweight", "qzeros", "scales"), says="is quantised for AWQ or GPTQ (4 bits)"),
    Row(
        T,
        "some scales missing",
        without("cross_attn.q.scale_weight", V1),
        says="2 of 163 tensors are FP8 without a scale, such as blocks.*.cross_attn.q.weight",
    ),
    Row(
        T,
        "<layer>.scale",
        other_scale(".scale"),
        says="are FP8 with a tensor scale beside them",
    ),
    Row(
        T,
        "weight_scale_inv",
        other_scale(".weight_scale_inv"),
        says="a tensor weight_scale_inv beside",
    ),
    Row(
        T,
        "an unknown option",
        fp8(scale="weight_scale", more=described(FORM | {"hadamard": 16})),
        says="have the option hadamard in comfy_quant, which is not known",
    ),
    Row(
        T,
        "FP8 with convrot",
        fp8(scale="weight_scale", more=described(FORM | {"convrot": True})),
        says="are FP8 with convrot, which is known for int8 only",
    ),
    Row(
        T,
        "another format",
        fp8(scale="weight_scale", more=described({"format": "float8_e4m3fn_blockwise", "group_size": 128})),
        says="have the type F8_E4M3 and the format float8_e4m3fn_blockwise, which is not supported",
    ),
    Row(
        T,
        "a group that does not fit",
        int8(CONVROT | {"convrot_groupsize": 48}, 0),
        says="have rotated groups of 48 columns, which do not divide them",
    ),
    Row(T, "int8 without a scale", without("weight_scale", int8(None)), says="are int8 without a scale"),
    Row(V, "official bf16", prefixed(""), E16),
    Row(V, "official fp16", prefixed("", F16), EH),
    Row(V, "official fp32", prefixed("", F32)),
    Row(V, "official .pth", pickled(dtype=F32, name="Wan2.1_VAE.pth")),
    Row(V, "first_stage_model.", prefixed("first_stage_model."), E16),
    Row(V, "vae.", beside("model.diffusion_model.", prefixed("vae.")), E16),
    Row(V, "model.", prefixed("model."), E16),
    Row(V, "diffusers", diffusers_file(F32)),
    Row(U, "Kijai bf16", renamed(official_umt5), E16),
    Row(U, "official .pth", pickled(change=official_umt5, name="models_t5_umt5-xxl-enc-bf16.pth"), E16),
    Row(U, "Comfy fp16", prefixed("", F16), EH),
    Row(U, "Comfy scaled FP8", fp8(among=("encoder.block.0.", "encoder.block.1."), rest=F16), E8),
    Row(
        U,
        "only encoder.embed_tokens",
        renamed(lambda n: "encoder.embed_tokens.weight" if n == "shared.weight" else n),
        E16,
    ),
    Row(
        U,
        "both names",
        changed(prefixed(""), with_alias),
        E16,
    ),
    Row(U, "text_encoders.umt5xxl.", beside("vae.", prefixed("text_encoders.umt5xxl.transformer.")), E16),
    Row(U, "GGUF of llama.cpp", llama_file, EH),
    Row(C, "Hugging Face fp16", prefixed("", F16), EH),
    Row(C, "Hugging Face fp32", prefixed("", F32)),
    Row(
        C,
        "with position_ids",
        changed(prefixed("", F16), with_ids),
        EH,
    ),
    Row(C, "open-clip .pth", open_clip("visual.", pickle=True), EH),
    Row(C, "open-clip safetensors", open_clip("visual."), EH),
    Row(C, "open-clip without visual.", open_clip(""), EH),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of torch wait for each other on a busy machine, 5 s for a small file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def velocity(tiny_home: Path) -> Velocity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        graphs = require_graphs(TINY, PLAN)
    return Velocity(graphs, {part: drawn(part) for part in PARTS})


@pytest.fixture(scope="module")
def original(velocity: Velocity) -> Callable[[Part], NDArray[np.float32]]:
    return cache(lambda part: velocity(part, drawn(part)))


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The rms of the difference, as a share of the rms of `other`."""
    return float(np.sqrt(np.square(one - other).mean() / np.square(other).mean()))


@cache
def drawn(part: Part) -> dict[str, NDArray[np.float32]]:
    return random_weights(SMALL, part, 1)


def read(stored: Stored) -> bool:
    """Whether the bytes at the tensor's place in the file, which a GPU gets, are its values."""
    into = np.empty(stored.values.nbytes, np.uint8)
    stored.read(0, into)
    return into.tobytes() == stored.values.tobytes()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.part}: {row.name}")
def test_a_layout_gives_its_numbers_or_is_refused_by_name(
    row: Row, tmp_path: Path, velocity: Velocity, original: Callable[[Part], NDArray[np.float32]]
) -> None:
    weights = dict(drawn(row.part))
    path = row.make(tmp_path, weights)
    wanted = required_tensors(SMALL, row.part)
    if row.says:
        with pytest.raises(WeightsError) as caught:
            Checkpoint(path, row.part).require(wanted, row.part)
        message = caught.value.message
        assert row.says in message and str(path) in message and len(message) < 400, message
        assert message.endswith(".") and ". " not in message
        print(f"\n| {row.part} | {row.name} | refused: {message.replace(str(path), 'FILE')} |")
        return
    (found,) = find_files([tmp_path], [row.part])[row.part]
    for opened in {found, path} if path.is_file() else {found}:
        checkpoint = Checkpoint(opened, row.part)
        checkpoint.require(wanted, row.part)
        worst = 0.0
        read_back, right = {}, {}
        for name, shape in wanted.items():
            values, want = checkpoint[name], weights[name]
            assert read(checkpoint.stored(name)), name
            if name.startswith("blocks.") and want.ndim == 2:
                want = want * np.float32(row.factor)
            assert values.shape == shape and values.dtype == np.float32, name
            read_back[name], right[name] = values, want
            worst = max(worst, float(np.abs(values - want).max() / np.abs(want).max()))
        assert worst <= row.error, f"{worst:.2e}"
        assert row.error == 0 or worst > row.error / 30, f"{worst:.2e}"
    same = all(want is drawn(row.part)[name] for name, want in right.items())
    wanted_velocity = original(row.part) if same else velocity(row.part, right)
    error = distance(velocity(row.part, read_back), wanted_velocity)
    most = VELOCITY_PER_ERROR * row.error or VELOCITY_FLOAT32
    print(f"\n| {row.part} | {row.name} | {error:.1e} | {most:.1e} |")
    assert error <= most
