"""Attention providers. Without a GPU: what is missing is said, nothing is loaded early, our kernels compile.

With one, every provider that can be used on it is compared with numpy in float32, for counts of tokens that
fill no block. The inputs of a provider are bf16, so the reference has the same rounded inputs.
"""

import ast
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from block_choice import order_of, sparse_attention
from packaging.requirements import Requirement

from trt_wan.engines.choice.candidates import CANDIDATES
from trt_wan.errors import EnvironmentBroken, UsageError
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.device.kernels import compile_source
from trt_wan.runtime.segments import attention
from trt_wan.runtime.segments.attention import (
    PROVIDERS,
    fp8_kernels,
    hopper,
    missing,
    open_attention,
    select,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runtime" / "segments" / "attention"


# Which can be used


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "distribution", lambda package: None)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> Any:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(attention, "distribution", absent)


@pytest.mark.parametrize(
    ("name", "able", "unable"),
    [
        ("native", [(9, 0)], [(8, 0), (8, 9), (10, 0), (12, 0)]),
        ("cudnn", [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        ("cudnn fp8", [(9, 0), (10, 0), (12, 0)], [(8, 0), (8, 9)]),
        ("flash4", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("native sparse", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
    ],
)
def test_a_gpu_that_does_not_fit_is_named(
    everything_installed: None, name: str, able: list[Any], unable: list[Any]
) -> None:
    assert [missing(name, capability) for capability in able] == [None] * len(able)
    for capability in unable:
        sentence = missing(name, capability) or ""
        assert sentence.startswith(f"{name} needs a GPU of compute capability ")
        assert "this one has {}.{}".format(*capability) in sentence and sentence.endswith("attention.")


@pytest.mark.parametrize("name", [name for name, row in PROVIDERS.items() if row.packages])
def test_packages_that_are_missing_are_named_with_their_extra(nothing_installed: None, name: str) -> None:
    sentence = missing(name, (9, 0)) or ""
    if not PROVIDERS[name].packages:
        assert not sentence
        return
    assert all(package in sentence for package in PROVIDERS[name].packages)
    assert sentence.endswith("not installed here (the extra hopper).")


def test_the_command_installs_what_the_providers_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {Requirement(line).name for line in extras["hopper"]}
    assert {package for row in PROVIDERS.values() for package in row.packages} <= installed


def test_every_row_names_a_class_and_is_a_candidate() -> None:
    for row in PROVIDERS.values():
        tree = ast.parse((FOLDER / f"{row.module}.py").read_text())
        assert row.segment in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {row.name for row in CANDIDATES if row.maker == "attention"} == set(PROVIDERS)


class FakeGpu:
    capability = (9, 0)


def test_what_cannot_be_opened_says_why(everything_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = cast(Gpu, FakeGpu())
    with pytest.raises(UsageError, match="no attention 'flash5'") as caught:
        open_attention("flash5", gpu, 2, 5, 128)
    assert "flash4" in caught.value.hint
    for name, head_dim in (("cudnn", 100), ("cudnn fp8", 72), ("flash4", 256)):
        with pytest.raises(UsageError, match=f"{name} cannot do heads of {head_dim} channels"):
            open_attention(name, gpu, 2, 5, head_dim)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # its import raises ImportError
    monkeypatch.delitem(sys.modules, f"{attention.__name__}.flash", raising=False)
    with pytest.raises(EnvironmentBroken, match="flash4 does not load .*flash_attn"):
        open_attention("flash4", gpu, 2, 5, 128)


def test_a_missing_package_stops_the_opening(nothing_installed: None) -> None:
    with pytest.raises(EnvironmentBroken, match="flash4 needs flash-attn-4 and torch, not installed here"):
        open_attention("flash4", cast(Gpu, FakeGpu()), 2, 5, 128)


def test_asking_loads_nothing() -> None:
    code = (
        "import sys; from trt_wan.runtime.segments.attention import PROVIDERS, missing; "
        "[missing(name, (9, 0)) for name in PROVIDERS]; "
        "print({'torch', 'cudnn', 'cutlass', 'flash_attn', 'tensorrt'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_torch_is_imported_by_flash_alone() -> None:
    for module in FOLDER.glob("*.py"):
        tree = ast.walk(ast.parse(module.read_text()))
        names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
        assert ("torch" in names) == (module.name == "flash.py"), module


# Our kernels


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize(
    ("module", "macros"),
    [(fp8_kernels, fp8_kernels.MACROS), (select, select.macros(128))],
    ids=["fp8", "select"],
)
def test_kernels_compile(
    nvrtc: None, capability: tuple[int, int], module: Any, macros: dict[str, object]
) -> None:
    code = bytes(compile_source(module.SOURCE, capability, macros).code)
    assert code.startswith(b"\x7fELF")
    for name in module.NAMES:
        assert f".text.{name}".encode() + b"\0" in code


@pytest.mark.parametrize(
    ("scores", "values", "lists"),
    [
        ("int8", "e4m3", False),
        ("bf16", "bf16", False),
        pytest.param("int8", "e4m3", True, marks=pytest.mark.long),
        pytest.param("int8", "bf16", False, marks=pytest.mark.long),
    ],
)
def test_the_hopper_kernel_compiles(nvrtc: None, scores: Any, values: Any, lists: bool) -> None:
    macros = hopper.macros(scores, values, lists)
    code = bytes(compile_source(hopper.source(values, lists), (9, 0), macros, accelerated=True).code)
    for name in hopper.NAMES:
        assert f".text.{name}".encode() + b"\0" in code
    products = list(products_of(code, "attend"))
    assert len(products) >= 18
    assert not any(high >> 23 & 7 for _, high in products), "warps may differ in a predicate"


def products_of(code: bytes, kernel: str) -> Iterator[tuple[int, int]]:
    """The wgmma instructions of a kernel, two words each. Bits 23 to 25 of the second are 7 less the number
    of the predicate that says whether a product is added to the sums before it, and 0 for a constant.
    """
    (start,) = struct.unpack_from("<Q", code, 40)
    size, count, names = struct.unpack_from("<HHH", code, 58)
    sections = [struct.unpack_from("<IIQQQQ", code, start + i * size) for i in range(count)]
    for name, *_, at, length in sections:
        begin = sections[names][4] + name
        if code[begin : code.index(b"\0", begin)] == f".text.{kernel}".encode():
            for low, high in struct.iter_unpack("<QQ", code[at : at + length]):
                if low & 0xBFC == 0x9F0:
                    yield low, high


def test_the_ring_of_the_hopper_kernel_fits_into_shared_memory() -> None:
    kinds: tuple[tuple[hopper.Scores, hopper.Values, bool], ...] = (
        ("int8", "e4m3", False),
        ("int8", "e4m3", True),
        ("int8", "bf16", False),
        ("bf16", "bf16", False),
    )
    for scores, values, lists in kinds:
        macros = hopper.macros(scores, values, lists)
        stages, consumers = macros["STAGES"], hopper.consumers(values)
        row = hopper.HEAD_DIM * ((scores == "bf16") + (values == "bf16") + 2)
        kept = consumers * 64 * 128 * 4 if values == "e4m3" else 0
        queries = consumers * 64 * 128 * (2 if scores == "bf16" else 1)
        used = queries + stages * macros["KEYS"] * row + kept
        assert stages >= 2 and used <= 227 * 1024 - 1024 - 9 * 8 * stages


def test_the_planner_knows_the_queries_of_a_tile() -> None:
    kinds: dict[str, tuple[hopper.Scores, hopper.Values]] = {
        "native": ("bf16", "bf16"),
        "native int8": ("int8", "bf16"),
        "native fp8": ("int8", "e4m3"),
    }
    assert kinds.keys() == {name for name, row in PROVIDERS.items() if row.to_rows}
    for name, kind in kinds.items():
        assert PROVIDERS[name].queries == hopper.consumers(kind[1]) * hopper.QUERIES


def test_parts_of_the_scratch_are_aligned_and_apart() -> None:
    sizes = {"a": 1, "b": 256, "c": 1000, "d": 0, "e": 3}
    offsets, total = laid_out(sizes)
    end = 0
    for name, size in sizes.items():
        assert offsets[name] % 256 == 0 and offsets[name] >= end
        end = offsets[name] + size
    assert end <= total < end + 256


# On a GPU


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    try:
        gpu = Gpu()
    except EnvironmentBroken as error:
        pytest.skip(error.message)
    gpu.reserve(1 << 28)
    yield gpu


HEADS, HEAD_DIM = 3, 128
DENSE = [name for name in PROVIDERS if name != "native sparse"]  # which has tests of its own
GUARD = 1024  # elements behind the output that must stay as they are


def inputs(kind: str, tokens: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(tokens)
    q, k, v = rng.standard_normal((3, HEADS, tokens, HEAD_DIM), np.float32)
    if kind == "outliers":  # four channels far from zero in q and in every key, one in v
        q[..., 5:9] *= 6
        k[..., 5:9] += 20
        v[..., 40] *= 8
    elif kind == "rising":  # each query's scores grow along the keys, by 11 altogether
        direction = np.sign(rng.standard_normal(HEAD_DIM)).astype(np.float32)
        q += direction
        k += direction * np.linspace(-0.5, 0.5, tokens, dtype=np.float32)[:, None]
    elif kind == "one way":  # every query sees the first half alone, whose values all point one way
        q, k, v = q * 0.1, k * 0.1, v * 0.1
        side = np.where(np.arange(tokens) < tokens // 2, 1, -1).astype(np.float32)[:, None]
        q[..., 0] += 16
        k[..., :1] += 8 * side
        v += 3 * side
    return [x.astype(BF16) for x in (q * np.float32(HEAD_DIM**-0.5), k, v)]


def reference(q: Any, k: Any, v: Any) -> np.ndarray[Any, Any]:
    """[tokens, heads * head_dim], float32."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = weights @ v / weights.sum(-1, keepdims=True)
    return cast(np.ndarray[Any, Any], attended.swapaxes(0, 1).reshape(q.shape[1], -1))


def attend(
    gpu: Gpu, name: str, q: Any, k: Any, v: Any, times: int = 1, blocks: Any = (), **others: Any
) -> list[np.ndarray[Any, Any]]:
    """The output of every run. NaN lies in the output and behind it, and in the scratch, before each."""
    segment = open_attention(name, gpu, *q.shape, *blocks)
    size = -(-max(segment.scratch_bytes, 1) // 2)
    buffer = gpu.allocate(2 * size)
    scratch = gpu.view(int(buffer.handle), (size,), BF16)
    segment.start(scratch.address)
    given = {name: gpu.upload(x) for name, x in {"q": q, "k": k, "v": v, **others}.items()}
    out = gpu.empty((q.size + GUARD,), BF16)
    results = []
    for _ in range(times):
        gpu.write(scratch, np.full(size, np.nan, BF16))
        gpu.write(out, np.full(out.shape, np.nan, BF16))
        segment.enqueue({name: x.address for name, x in given.items()} | {"attended": out.address})
        everything = gpu.download(out)
        assert np.isnan(everything[q.size :].astype(np.float32)).all(), "wrote behind its output"
        results.append(everything[: q.size].reshape(q.shape[1], -1))
    for name, x in zip("qkv", (q, k, v), strict=True):
        assert gpu.download(given[name]).tobytes() == x.tobytes(), f"{name} was written"
    gpu.sync()
    buffer.close()
    return results


def require(gpu: Gpu, name: str) -> None:
    problem = missing(name, gpu.capability)
    if problem:
        pytest.skip(problem)


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "rising"])
@pytest.mark.parametrize("tokens", [1, 77, 257, 1000])
@pytest.mark.parametrize("name", DENSE)
def test_provider_against_numpy(gpu: Gpu, name: str, tokens: int, kind: str) -> None:
    require(gpu, name)
    q, k, v = inputs(kind, tokens)
    expected = reference(q, k, v)
    try:
        (got,) = attend(gpu, name, q, k, v)
    except EnvironmentBroken as error:  # cuDNN 9.19 has no FP8 attention of one query for Hopper
        if tokens > 1:
            raise
        pytest.skip(error.message)
    assert got.shape == expected.shape == (tokens, HEADS * HEAD_DIM)
    error = np.linalg.norm(got.astype(np.float32) - expected) / np.linalg.norm(expected)
    largest = {"native int8": 5e-2, "native fp8": 8e-2}.get(name, 1.5e-1 if name.endswith("fp8") else 1e-2)
    assert error <= largest  # NaN, what was not written, is refused too


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", ["native", "native int8", "native fp8"])
def test_what_is_not_finite_shows(gpu: Gpu, name: str, which: int) -> None:
    """int8 has no NaN: rounding would hide one."""
    require(gpu, name)
    given = inputs("gaussian", 300)
    given[which][1, 77, 5] = np.nan
    (got,) = attend(gpu, name, *given)
    head = got.reshape(300, HEADS, HEAD_DIM)[:, 1].astype(np.float32)
    assert np.isnan(head[77] if which == 0 else head[:, 5 if which == 2 else 0]).all()


@pytest.mark.parametrize("name", ["native", "native int8", "native fp8"])
def test_long_sums_lose_no_bits(gpu: Gpu, name: str) -> None:
    """Hopper's tensor cores add E4M3 products in few bits: a sum over all keys was 35 % too small."""
    require(gpu, name)
    q, k, v = inputs("one way", 12000)
    (got,) = attend(gpu, name, q[:1], k[:1], v[:1])
    expected = reference(q[:1], k[:1], v[:1])
    error = np.linalg.norm(got.astype(np.float32) - expected) / np.linalg.norm(expected)
    assert error <= (3e-2 if name == "native fp8" else 5e-3)


@pytest.mark.parametrize("name", DENSE)
def test_provider_repeats_itself_to_the_bit(gpu: Gpu, name: str) -> None:
    require(gpu, name)
    first, *others = attend(gpu, name, *inputs("gaussian", 1000), times=3)
    assert all(other.tobytes() == first.tobytes() for other in others)


@pytest.mark.parametrize("keep", [0.01, 0.4, 1.0])
@pytest.mark.parametrize("grid", [(1, 3, 4), (3, 10, 12), (6, 16, 20)])
def test_block_sparse_attention_against_numpy(gpu: Gpu, grid: tuple[int, int, int], keep: float) -> None:
    """Slots, rows and columns, of which the blocks are."""
    require(gpu, "native sparse")
    slots, rows, columns = grid
    q, k, v = inputs("gaussian", slots * rows * columns)
    order, share = np.array(order_of(*grid), np.int32), np.array([keep], np.float32)
    first, second = attend(gpu, "native sparse", q, k, v, times=2, blocks=(order, rows * columns), keep=share)
    expected = sparse_attention(q, k, v, keep, *grid)
    assert np.linalg.norm(first.astype(np.float32) - expected) <= 8e-2 * np.linalg.norm(expected)
    assert first.tobytes() == second.tobytes()
