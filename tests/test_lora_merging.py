"""LoRAs merged on the way to the GPU, on a GPU that runs late; and the kernels of merge.cu, run on the CPU.

tests/test_loras_on_gpu.py is the same on a real one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from late_gpu import LateGpu, at
from lora_files import BF16, FAMILIES, OF_BASE, Array, Made, of_base
from quantised_weights import QuantisedTensors, quantised_file
from weight_oracle import E4M3, contents

from trt_wan.engines import int8
from trt_wan.engines.checkpoint import DIRECTION, ORTHONORMAL
from trt_wan.engines.config import TINY
from trt_wan.engines.contract import scale_name
from trt_wan.engines.contracts import networks
from trt_wan.engines.fp8 import quantise_rows
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import Plan
from trt_wan.runtime.events import silent
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.changes import LowRank
from trt_wan.runtime.loras.loras import Loras
from trt_wan.runtime.loras.merge import NAMES, SOURCE, TYPES
from trt_wan.runtime.loras.merged import Merge
from trt_wan.runtime.loras.merging import MergingSource
from trt_wan.runtime.opening.residency import BLOCK
from trt_wan.runtime.weights.checkpoint import orthonormal
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.stored import Stored, Tensors

PLAN = Plan(64, 48, 5)


# ---- kernels ----


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    return CpuKernels(SOURCE, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 70, 17), (130, 63, 5)], ids=str)
def test_a_product_is_added(kernels: CpuKernels, kind: str, sizes: tuple[int, int, int]) -> None:
    """Rows, inner and rank that are no multiples of a tile, and more tiles than blocks."""
    rows, inner, rank = sizes
    rng, dtype = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, kind, kind))
    up, down = (rng.standard_normal(s).astype(dtype) for s in ((rows, rank), (rank, inner)))
    base = rng.standard_normal((rows, inner)).astype(np.float32)
    values = base.copy()
    kernels.launch(f"add_product_{kind}", 2, 256, True, up, down, values, rows, inner, rank, number=0.3)
    wanted = base + 0.3 * (up.astype(np.float64) @ down.astype(np.float64))
    np.testing.assert_allclose(values, wanted, rtol=0, atol=2e-6 * math.sqrt(rank))


@pytest.mark.parametrize("kind", TYPES)
def test_a_whole_change_is_added(kernels: CpuKernels, kind: str) -> None:
    rng, dtype = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, kind, kind))
    change, base = rng.standard_normal(1000).astype(dtype), rng.standard_normal(1000).astype(np.float32)
    values = base.copy()
    kernels.launch(f"add_{kind}", 3, 64, False, change, values, 1000, number=-2.0)
    np.testing.assert_allclose(values, base - 2.0 * change.astype(np.float64), rtol=1e-6, atol=1e-6)


def test_rows_are_quantised_from_float32(kernels: CpuKernels) -> None:
    values = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32) * np.float32(3)
    values[3] = 0
    out, scales = np.zeros((5, 300), E4M3), np.zeros(5, np.float32)
    kernels.launch("quantise_rows", 2, 64, True, values, out, scales, 5, 300)
    wanted, wanted_scales = quantise_rows(values)
    assert np.array_equal(scales, wanted_scales) and out.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_the_kernels_compile(nvrtc: None, capability: tuple[int, int]) -> None:
    from trt_wan.runtime.device.kernels import compile_source

    code = bytes(compile_source(SOURCE, capability).code)
    for name in NAMES:
        assert f".text.{name}".encode() + b"\0" in code


# ---- packs ----


class InMemory(dict[str, Array]):
    """`Tensors` of arrays in any type; FP8 ones have one scale each."""

    def __init__(self, tensors: Mapping[str, Array], scales: Mapping[str, float] | None = None) -> None:
        super().__init__(tensors)
        self.scales = scales or {}

    def stored(self, name: str) -> Stored:
        if name == ORTHONORMAL:
            return Stored(orthonormal(self[DIRECTION]))
        values, scale = dict.__getitem__(self, name), self.scales.get(name)
        rows = len(values) if values.ndim else 1
        return Stored(values, None if scale is None else np.full(rows, scale, np.float32))

    def __getitem__(self, name: str) -> Array:
        return self.stored(name).float32()

    def rows(self, name: str, indices: Any) -> Array:
        return self.stored(name).rows(indices)


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return random_weights(TINY, "transformer", 1)


def is_linear(name: str, values: Array) -> bool:
    return name.startswith("blocks.") and values.ndim == 2 and name.endswith(".weight")


@pytest.fixture(scope="module")
def bases(weights: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The weights in a base's types: block linears quantised, all else bf16."""
    folder = tmp_path_factory.mktemp("bases")
    bf16 = InMemory({name: values.astype(BF16) for name, values in weights.items()})
    made: dict[str, Any] = {"fp32": InMemory(weights), "bf16": bf16}

    def base(kind: str) -> Any:
        if kind not in made:
            linears = {name: values for name, values in weights.items() if is_linear(name, values)}
            if kind == "fp8":
                scales = {name: float(np.abs(values).max() / 448) for name, values in linears.items()}
                fp8 = {name: (values / scales[name]).astype(E4M3) for name, values in linears.items()}
                made[kind] = InMemory(dict.copy(bf16) | fp8, scales)
            else:
                stored, _ = quantised_file(folder / kind, kind, linears)
                made[kind] = QuantisedTensors(bf16, stored)
        return made[kind]

    return base


def packs_of(precision: Precision) -> list[Pack]:
    table = networks(TINY, Plan(64, 48, 5, precision)).values()
    chosen = [network for network in table if network.part == "transformer" and network.weights]
    return [Pack.of(network, n) for network in chosen for n in range(network.repeats)]


def loaded(source: Any, packs: list[Pack]) -> dict[tuple[str, int], dict[str, bytes]]:
    """Every tensor of the packs as a kernel would see it."""
    gpu = LateGpu(0, 0.1)
    weights = DeviceWeights(cast(Any, gpu), source)
    seen = fetched(gpu, weights, packs)
    weights.close()
    assert not gpu.live
    return seen


def fetched(
    gpu: LateGpu, weights: DeviceWeights, packs: list[Pack]
) -> dict[tuple[str, int], dict[str, bytes]]:
    seen: dict[tuple[str, int], dict[str, bytes]] = {}

    def look(pack: Pack, arrays: Any) -> None:
        found = {name: at(a.address, a.nbytes).tobytes() for name, a in arrays.items()}
        assert seen.setdefault(pack.key, found) == found, f"{pack.key} differs from step to step"

    for pack in packs:
        arrays = weights.bind(pack.network, pack.n)
        gpu.stream.enqueue(lambda pack=pack, arrays=arrays: look(pack, arrays))
        weights.used(pack.network, pack.n)
    gpu.stream.sync()
    return seen


def values_of(pack: Pack, data: Mapping[str, bytes]) -> dict[str, Array]:
    """float32 by tensor; codes times their scales."""
    read = {
        t.name: np.frombuffer(data[t.name], np.dtype(t.dtype)).reshape(t.shape) for t in pack.network.weights
    }
    for scale, tensor in pack.scaled.items():
        read[tensor.name] = read[tensor.name].astype(np.float32) * read.pop(scale)[:, None]
    return {name: values.astype(np.float32) for name, values in read.items()}


def require_close(pack: Pack, got: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> None:
    """The same bits, but for sums in another order: a number may fall to the neighbour, one in a thousand."""
    first, second = values_of(pack, got), values_of(pack, wanted)
    for tensor in pack.network.weights:
        if tensor.name not in first:
            continue
        a, b = first[tensor.name], second[tensor.name]
        step = {"float8_e4m3fn": 1 / 8, "bfloat16": 1 / 128}.get(tensor.dtype, 2e-6)
        coarse = np.abs(b).max(axis=-1, keepdims=True) / 126 if tensor.dtype == "int8" else 0.0
        limit = coarse + step * np.maximum(np.abs(a), np.abs(b)) + 3e-6 * np.abs(b).max() + 1e-12
        assert np.all(np.abs(a - b) <= limit), f"{pack.key} {tensor.name}"
        if tensor.dtype != "float32":
            apart = np.abs(a - b) > 1e-5 * np.abs(b)
            assert apart.mean() < 2e-3 + 2 / apart.size, f"{pack.key} {tensor.name}: {apart.mean()}"


def merging_of(base: Tensors, *loras: Lora) -> Any:
    return Loras(TINY, base).merging(loras, silent)


def wanted(pack: Pack, base: Tensors, merged: Any) -> dict[str, bytes]:
    """The pack by numpy: what changes from the float32 merge, all else from the base."""
    made = contents(pack, base)
    for tensor in pack.network.weights:
        name = pack.network.weight_key(tensor.name, pack.n)
        if name not in merged.changed or tensor.name in pack.scaled:
            continue
        values = merged.tensors[name]
        if tensor.name in (coded.name for coded in pack.scaled.values()):
            as_codes = quantise_rows if tensor.dtype == "float8_e4m3fn" else int8.quantise_rows
            values, scales = as_codes(values)
            made[scale_name(tensor.name)] = scales.tobytes()
        made[tensor.name] = values.astype(np.dtype(tensor.dtype)).tobytes()
    return made


def require_packs(base: Tensors, lora: Path, precision: Precision, piece_bytes: int) -> None:
    """All packs from the GPU's path against numpy's, from the float32 merge of the CPU's path."""
    merged = merging_of(base, Lora(lora, 0.8))
    packs = packs_of(precision)
    if piece_bytes < 1 << 20:  # many pieces of every kind, of one network each
        packs = [pack for pack in packs if pack.n < 1]
    packs = [pack for pack in packs if not pack.network.keys(pack.n).isdisjoint(merged.changed)]
    assert packs
    seen = loaded(MergingSource({"transformer": merged.tensors}, piece_bytes, small=1 << 12), packs)
    for pack in packs:
        require_close(pack, seen[pack.key], wanted(pack, base, merged))


MECHANISMS = (  # families whose changes take ways of their own; test_loras.py has all names and scales
    *("lightx2v_own", "high_noise", "relight_resized", "lightning", "diffusers"),
    *("loha", "lokr", "convolutions", "odd_deltas"),
)


@pytest.mark.parametrize("family", MECHANISMS)
def test_every_mechanism_on_scaled_fp8(bases: Any, tmp_path: Path, family: str) -> None:
    path = FAMILIES[family]().save(tmp_path / "lora.safetensors")
    require_packs(bases("fp8"), path, "fp8", 8192)


@pytest.mark.parametrize("kind", OF_BASE)
def test_families_that_depend_on_the_base(bases: Any, tmp_path: Path, kind: str) -> None:
    base = bases("fp8")
    path = of_base(kind, {name: base[name] for name in base}).save(tmp_path / "lora.safetensors")
    require_packs(base, path, "fp8", 8192)


BASES = ("fp32", "bf16", "int8", "int8 rows", "int8 convrot", "Q8_0", "Q4_0", "Q5_1")


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, "fp8") for kind in BASES),
        *((kind, "bf16") for kind in ("bf16", "int8 convrot", "Q8_0")),
        *(("int8 convrot", "int8"), pytest.param("bf16", "int8", marks=pytest.mark.long)),
    ],
)
def test_every_base(bases: Any, tmp_path: Path, kind: str, precision: Precision) -> None:
    path = FAMILIES["lightx2v_own"]().save(tmp_path / "lora.safetensors")
    require_packs(bases(kind), path, precision, 1 << 24)


def test_a_change_of_half_the_rows_of_a_piece(bases: Any, tmp_path: Path) -> None:
    """diffusers' `to_k` and `to_v` of a fuser, in one piece with the rows of the other half."""
    path = FAMILIES["diffusers"]().save(tmp_path / "lora.safetensors")
    require_packs(bases("fp8"), path, "fp8", 1 << 24)


# ---- quality ----


def rms(values: Array) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


@pytest.mark.parametrize("kind", ["fp8", "bf16", "int8", "int8 convrot", "Q8_0", "Q4_0"])
def test_a_merge_is_as_far_from_the_fp32_merge_as_the_base_is(
    bases: Any, weights: dict[str, Array], tmp_path: Path, kind: str
) -> None:
    """In float32; and in an FP8 engine, whose own rounding comes on top, by the root of the squares."""
    made = FAMILIES["relight"]()
    merged = merging_of(bases(kind), Lora(made.save(tmp_path / "lora.safetensors")))
    packs = [pack for pack in packs_of("fp8") if pack.network.name == "ffn"]
    seen = loaded(MergingSource({"transformer": merged.tensors}, small=1 << 12), packs)
    for pack in packs:
        values = values_of(pack, seen[pack.key])
        for tensor in pack.scaled.values():
            name = pack.network.weight_key(tensor.name, pack.n)
            wanted = weights[name] + made.deltas[name]
            of_base = rms(bases(kind)[name] - weights[name])
            assert rms(merged.tensors[name] - wanted) <= 1.001 * of_base + 1e-7
            quantised, scale = quantise_rows(wanted.astype(np.float32))
            of_fp8 = rms(quantised.astype(np.float32) * scale[:, None] - wanted)
            assert rms(values[tensor.name] - wanted) <= 1.03 * math.hypot(of_base, of_fp8)


@pytest.mark.parametrize("percent", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_a_small_delta_survives_rows_with_scales_of_their_own(kind: str, percent: float) -> None:
    """The share of the delta by which the quantised weights move (files_and_loras.md 6.3): 1, with the noise
    of rounding. An FP8 base lies on the grid of its one scale: there the new scale of a row brings whole
    codes near to ties, which any delta decides, and the share is 1.0 to 1.4; with the old scale 0.1 to 0.4.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 512)).astype(np.float32)
    scale = np.float32(np.abs(weight).max() / 448)
    fp8 = Stored((weight / scale).astype(E4M3), np.full(512, scale))
    base = fp8 if kind == "fp8" else Stored(weight.astype(BF16))
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((512, 16), (16, 512)))
    down *= np.float32(percent / 100 * rms(weight) / rms(up @ down))
    delta, before = (up @ down).astype(np.float64), base.float32().astype(np.float64)

    def made(stored: Stored) -> Array:
        values, scales = quantise_rows(stored.float32())
        return values.astype(np.float64) * scales[:, None]

    def share(gained: Array) -> float:
        return float((gained * delta).sum() / np.square(delta).sum())

    merged = made(replace(base, delta=Merge(((1.0, LowRank(up, down, 1.0)),))))
    low, high = (0.95, 1.7) if kind == "fp8" else (0.95, 1.05)
    assert low <= share(merged - made(base)) <= high
    assert rms(merged - before - delta) <= 1.01 * rms(made(base) - before)
    old = ((before + delta) / scale).astype(E4M3).astype(np.float64) * scale
    assert kind == "bf16" or share(old - before) < 0.5


def test_a_row_that_outgrows_the_old_scale_is_not_clipped(tmp_path: Path) -> None:
    """448 times the old scale is the largest number that it can write."""
    values = np.full((4, 64), 448, np.float32).astype(E4M3)
    base, up = Stored(values, np.full(4, 1e-3, np.float32)), np.ones((4, 1), np.float32)
    merge = Merge(((1.0, LowRank(up, np.full((1, 64), 0.448, np.float32), 1.0)),))
    made, scales = quantise_rows(replace(base, delta=merge).float32())
    np.testing.assert_allclose(made.astype(np.float32) * scales[:, None], 0.896, rtol=0.005)


def test_strength_0_leaves_the_stored_bits(bases: Any, tmp_path: Path) -> None:
    base = bases("fp8")
    path = FAMILIES["lightx2v_own"]().save(tmp_path / "lora.safetensors")
    merged = merging_of(base, Lora(path, 0.0))
    assert not merged.changed
    packs = packs_of("fp8")
    seen = loaded(MergingSource({"transformer": merged.tensors}), packs)
    assert seen == {pack.key: contents(pack, base) for pack in packs}


def test_two_loras_commute(bases: Any, tmp_path: Path) -> None:
    first = FAMILIES["lightx2v_own"]().save(tmp_path / "a.safetensors")
    second = FAMILIES["loha"]().save(tmp_path / "b.safetensors")
    loras = Lora(first, 0.7), Lora(second, -1.3)
    base = bases("fp8")
    one, other = merging_of(base, *loras), merging_of(base, *reversed(loras))
    assert one.changed == other.changed
    deltas = [FAMILIES[name]().deltas for name in ("lightx2v_own", "loha")]
    for name in one.changed:
        assert np.array_equal(one.tensors[name], other.tensors[name]), "they are sorted"
        wanted = base[name] + 0.7 * deltas[0].get(name, 0) - 1.3 * deltas[1].get(name, 0)
        assert np.abs(one.tensors[name] - wanted).max() <= 4e-6 * np.abs(wanted).max()


# ---- switching ----


def changed_keys(merged: Any, packs: list[Pack]) -> set[tuple[str, int]]:
    return {p.key for p in packs if not p.network.keys(p.n).isdisjoint(merged.changed)}


@pytest.mark.parametrize(("streams", "passing"), [(0, False), (0, True), (1, False), (2, True)])
def test_only_packs_that_change_are_loaded_again(
    bases: Any, tmp_path: Path, streams: int, passing: bool
) -> None:
    """Resident, streamed after block 0, all streamed; also right after a step was cut off in the middle."""
    chosen = ("blocks.0.", "blocks.1.", "head")  # a streamed step begins with block 0 or with block 1
    tensors = FAMILIES["high_noise"]().tensors
    made = Made({key: values for key, values in tensors.items() if any(part in key for part in chosen)})
    lora = made.save(tmp_path / "lora.safetensors")
    base, gpu = bases("fp8"), LateGpu(streams, 0.2)
    loras = Loras(TINY, base)
    weights = DeviceWeights(cast(Any, gpu), MergingSource({"transformer": base}))
    packs = packs_of("fp8")
    order = [
        pack
        for n in range(TINY.transformer.layers)
        for pack in packs
        if pack.n == n and pack.network.name in BLOCK
    ]
    weights.plan([[], order[3:], order][streams], ["context_kv", "time_embed"] if passing else [])
    rest = [pack for pack in packs if pack.network.name not in BLOCK]
    before = fetched(gpu, weights, [*rest, *order, *order[:5]])
    assert before == {pack.key: contents(pack, base) for pack in packs}
    for strength in (1.0, 0.5, 0.0):
        merged = loras.merging([Lora(lora, strength)], silent)
        keys, read = changed_keys(merged, packs), weights.loaded_bytes
        assert {key for key in keys if key[0] in BLOCK} == {(name, n) for name in BLOCK for n in (0, 1)}
        assert ("head", 0) in keys and ("context_kv", 1) in keys and ("context_kv", 2) not in keys
        weights.change(MergingSource({"transformer": merged.tensors}, small=1 << 12), keys)
        loras.done(merged)
        weights.prefetch(order)
        after = fetched(gpu, weights, [*rest, *order, *order])
        assert {key for key in before if after[key] != before[key]} <= keys
        alone = loaded(MergingSource({"transformer": merged.tensors}, small=1 << 12), packs)
        assert after == alone
        again = sum(
            pack.size for pack in packs if pack.key in keys or (passing and pack.network.name in PASSING)
        )
        assert weights.loaded_bytes - read < 2.2 * again
    assert after == before, "the stored bits"
    assert not loras.merging([], silent).changed
    weights.close()
    assert not gpu.live


PASSING = ("context_kv", "time_embed")
