"""LoRAs on a real GPU: the kernels of merge.cu against numpy, packs against the CPU's merge, and an open
model that switches. Skipped where there is no GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from lora_files import FAMILIES
from on_gpu import require_gpu
from test_lora_merging import InMemory, changed_keys, merging_of, packs_of, require_close, wanted
from test_open_model_on_gpu import folders, frames, gpu, job, least_vram, opened  # noqa: F401  (fixtures)
from test_weights_on_gpu import OnDevice, fetched, same_bits

from trt_wan.engines.config import TINY
from trt_wan.engines.fp8 import E4M3, quantise_rows
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import silent
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.loras import Loras
from trt_wan.runtime.loras.merge import TYPES, Merger
from trt_wan.runtime.loras.merging import MergingSource
from trt_wan.runtime.opening.residency import BLOCK
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.tiny import BF16

SIZES = [(1, 1, 1), (65, 70, 17), (1638, 5120, 64), (606, 13824, 128), (130, 5120, 512)]  # rows, inner, rank


@pytest.fixture(scope="module")
def device() -> Iterator[Gpu]:
    made: Gpu = require_gpu()
    yield made
    made.close()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_product_is_added(device: Gpu, kind: str, sizes: tuple[int, int, int]) -> None:
    rows, inner, rank = sizes
    rng, dtype = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, kind, kind))
    up, down = (rng.standard_normal(s, np.float32).astype(dtype) for s in ((rows, rank), (rank, inner)))
    base = rng.standard_normal((rows, inner), np.float32)
    with OnDevice(device) as there:
        addresses = there.put(up), there.put(down), there.put(base)
        Merger(device).add_product(device.stream, dtype, addresses, 0.3, sizes)
        got = there.get(addresses[2], base.shape, np.float32)
    expected = base + 0.3 * (up.astype(np.float64) @ down.astype(np.float64))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * rank + 1e-6)


def test_rows_are_quantised_from_float32(device: Gpu) -> None:
    if device.capability < (8, 9):
        pytest.skip("no FP8 on this GPU")
    values = np.random.default_rng(0).standard_normal((700, 5120), np.float32)
    values[3] = 0
    expected, scales = quantise_rows(values)
    with OnDevice(device) as there:
        given, out = there.put(values), there.put(np.zeros(values.shape, np.uint8))
        out_scales = there.put(np.zeros(len(values), np.float32))
        Merger(device).quantise_rows(device.stream, given, out, out_scales, *values.shape)
        same_bits(there.get(out_scales, scales.shape, np.float32), scales, "scales")
        same_bits(there.get(out, values.shape, E4M3), expected, "values")


@pytest.mark.parametrize("family", ["lightx2v_own", "relight", "diffusers", "loha", "lokr"])
@pytest.mark.parametrize("streamed", [False, True])
def test_packs_equal_the_merge_of_the_cpu(device: Gpu, tmp_path: Path, family: str, streamed: bool) -> None:
    """Also after a switch, and back to the stored bits."""
    weights = {n: v.astype(BF16) for n, v in random_weights(TINY, "transformer", 1).items()}
    base, packs = InMemory(weights), packs_of("fp8" if device.capability >= (8, 9) else "bf16")
    path = FAMILIES[family]().save(tmp_path / "lora.safetensors")
    loras = Loras(TINY, base)
    on_device = DeviceWeights(device, MergingSource({"transformer": base}, small=1 << 12))
    order = [p for n in range(TINY.transformer.layers) for p in packs if p.n == n and p.network.name in BLOCK]
    on_device.plan(order[3:] if streamed else [])
    before = {pack.key: fetched(on_device, pack) for pack in packs}
    for strength in (0.8, -0.3, 0.0):
        merged = loras.merging([Lora(path, strength)], silent)
        source = MergingSource({"transformer": merged.tensors}, small=1 << 12)
        on_device.change(source, changed_keys(merged, packs))
        loras.done(merged)
        for pack in packs:
            got = fetched(on_device, pack)
            if strength:
                require_close(pack, got, wanted(pack, base, merging_of(base, Lora(path, strength))))
            else:
                assert got == before[pack.key], pack.key
    on_device.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_an_open_model_switches(folders: Any, tmp_path: Path, streamed: bool) -> None:  # noqa: F811
    """Jobs in a row equal single runs, bit for bit, resident and with every block streamed."""
    first = FAMILIES["high_noise"]().save(tmp_path / "a.safetensors")
    second = FAMILIES["diffusers"]().save(tmp_path / "b.safetensors")
    task = job(folders["first"])
    settings = {"vram": least_vram(folders, task), "keep_encoders": False} if streamed else {}
    sets = [(), (Lora(first),), (Lora(first, 0.5), Lora(second)), ()]
    alone = []
    for loras in sets[:3]:
        with opened(folders) as model:
            alone.append(frames(model, replace(task, loras=loras)))
    with opened(folders, **settings) as model:
        for k, loras in enumerate(sets):
            assert np.array_equal(frames(model, replace(task, loras=loras)), [*alone, alone[0]][k]), k
