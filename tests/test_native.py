"""Our own block kernels. Without a GPU: they compile for every GPU with FP8, and threads cover all channels.

With one, the parts of a block are compared with the fp32 graphs, on the same awkward inputs that build
measures candidates with, every weight random.
"""

import ctypes
import gc
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from on_gpu import require_gpu, run_segment

from trt_wan.build.realistic import realistic
from trt_wan.build.reference import reference, relative_error, sample_of
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import ANIMATE_14B, MODELS, TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.errors import EnvironmentBroken, GraphError
from trt_wan.runtime.device.kernels import compile_source
from trt_wan.runtime.segments import native
from trt_wan.runtime.segments.native import block, cross_attention, gemm


@pytest.mark.parametrize("channels", [256, 512, 5120, 13824])
@pytest.mark.parametrize("limit", [32, 320, 576])
def test_threads_cover_all_channels_in_whole_warps(channels: int, limit: int) -> None:
    threads = block.threads_for(channels, limit)
    assert threads % 32 == 0 and threads <= limit and channels // block.VECTOR % threads == 0


def test_channels_that_warps_cannot_share_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="cannot be shared"):
        block.threads_for(200, 320)


@pytest.mark.parametrize(
    ("capability", "operands"),
    [
        *(((8, 9), "fp8"), ((9, 0), "fp8"), ((12, 0), "fp8"), ((8, 0), "int8")),
        *(pytest.param(c, "int8", marks=pytest.mark.long) for c in ((8, 6), (8, 9), (9, 0), (12, 0))),
        pytest.param((8, 0), "fp8", marks=pytest.mark.long),  # for the fuser in bf16
    ],
)
@pytest.mark.parametrize("model", ["14b", pytest.param("tiny", marks=pytest.mark.long)])
def test_kernels_compile(nvrtc: None, model: str, capability: tuple[int, int], operands: Any) -> None:
    code = bytes(compile_source(block.SOURCE, capability, block.macros(MODELS[model], operands)).code)
    for name in block.KERNELS:
        assert f".text.{name}".encode() + b"\0" in code


@pytest.mark.parametrize("model", ["14b", pytest.param("tiny", marks=pytest.mark.long)])
def test_hopper_s_kernels_compile(nvrtc: None, model: str) -> None:
    source, macros = cross_attention.source(MODELS[model]), cross_attention.hopper_macros(MODELS[model])
    code = bytes(compile_source(source, (9, 0), macros, accelerated=True).code)
    for name in cross_attention.KERNELS:
        assert f".text.{name}".encode() + b"\0" in code
    with pytest.raises(Exception, match="wgmma"):
        compile_source(source, (9, 0), macros)


@pytest.mark.parametrize("keys", [1, 16, 127, 128, 129, 257, 512, 513])
def test_tiles_hold_all_keys(keys: int) -> None:
    size, tiles = cross_attention.tiling(keys)
    assert size % 16 == 0 and size <= cross_attention.MOST_TILE
    assert (tiles - 1) * size < keys <= tiles * size


def test_every_kernel_has_a_launch() -> None:
    defined = re.findall(
        r'extern "C" __global__ void(?: __launch_bounds__\(.*\))?\s+(\w+)\(',  # one line or two
        block.SOURCE + cross_attention.source(TINY),
    )
    assert tuple(defined) == block.KERNELS + cross_attention.KERNELS
    assert {name for launches in LAUNCHES.values() for name in launches.split()} == {*defined, "product"}


# Where kernels write, by position of the argument; they read all other addresses.
WRITES = {
    "modulation_rows": (2,),
    "norm_quantize": (3, 4),
    "quantize_tokens": (1, 2),
    "product": (2,),
    "heads_from_products": (14, 15, 16),
    "rms_norm_product": (5,),
    "cross_attention": (7,),
    "add_norm_quantize": (6, 9, 10),
    "add_gated": (6,),
    "gelu_quantize": (4, 5),
    "arrange_keys": (4,),
    "cross_attention_hopper": (2,),
    "norm_tokens": (1,),
    "face_attention": (7,),
    "add_face": (6,),
}
LAUNCHES = {
    "attn_in native": "modulation_rows norm_quantize product product product heads_from_products",
    "attn_out native": "modulation_rows quantize_tokens product add_norm_quantize product rms_norm_product",
    "cross_attention native": "arrange_keys cross_attention_hopper",
    "cross_attention native 8.9": "cross_attention",
    "ffn native": "modulation_rows quantize_tokens product add_norm_quantize product gelu_quantize product "
    "add_gated",
    "fuser native": "norm_tokens product face_attention product add_face",
    "fuser native fp8": "norm_quantize quantize_tokens product face_attention quantize_tokens "
    "quantize_tokens product add_face",
}


LAUNCHES |= {f"{part} native int8": LAUNCHES[f"{part} native"] for part in block.PARTS}


class Recorder:
    """The kernels and products of a segment, as a list of launches."""

    def __init__(self) -> None:
        self.launches = list[tuple[str, tuple[Any, ...]]]()

    def launch(
        self, stream: Any, name: str, grid: Any, threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        self.launches.append((name, arguments))

    def product(self, *sizes: Any) -> Any:
        return SimpleNamespace(enqueue=lambda x, w, y, space: self.launches.append(("product", (x, w, y))))


@pytest.mark.parametrize("case", LAUNCHES)
def test_kernels_read_what_was_given_or_written_before(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read that an earlier segment left in the scratch, which all segments share."""
    name, candidate = case.removesuffix(" 8.9").split(" ", 1)
    plan, recorder = Plan(64, 48, 5, "int8" if candidate == "native int8" else "fp8"), Recorder()
    for kind in ("Fp8Gemm", "Int8Gemm", "Bf16Gemm"):
        monkeypatch.setattr(block, kind, recorder.product)
    capability = (8, 9) if case.endswith("8.9") else (9, 0)
    gpu = SimpleNamespace(
        stream=None, once=lambda key, make: recorder, capability=capability, multiprocessors=132
    )
    network = networks(TINY, plan)[name]
    tensors = network.inputs + network.weights + network.outputs
    addresses = {tensor.name: (1 << 40) + 256 * i for i, tensor in enumerate(tensors)}
    outputs = {addresses[tensor.name] for tensor in network.outputs}
    known = set(addresses.values()) - outputs
    segment = native.open_native(network, TINY, plan, cast(Any, gpu), candidate)
    segment.start(1 << 30)
    segment.enqueue(addresses)
    assert [launched for launched, _ in recorder.launches] == LAUNCHES[case].split()
    for launched, arguments in recorder.launches:
        places = [i for i, value in enumerate(arguments) if isinstance(value, int) and value]
        assert {arguments[i] for i in places if i not in WRITES[launched]} <= known, launched
        written = {arguments[i] for i in WRITES[launched]}
        assert not written & (set(addresses.values()) - outputs), launched
        assert all(
            value in outputs or 1 << 30 <= value < (1 << 30) + segment.scratch_bytes for value in written
        )
        rows = 6 if launched == "modulation_rows" else 1
        known |= {value + row * 4 * TINY.transformer.dim for value in written for row in range(rows)}
    assert outputs <= known


def test_the_reason_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.missing("ffn", (7, 5)) == "A GPU of compute capability 7.5 has no bf16 products."

    def absent() -> Any:
        raise EnvironmentBroken("cuBLASLt is not installed.", "Run:\npip install it")

    monkeypatch.setattr(gemm, "_open", absent)
    assert native.missing("ffn", (9, 0)) == "cuBLASLt is not installed."


class FakeCublasLt:
    """Knows which objects are alive. A matrix of 77 rows is refused; `found` is the number of algorithms."""

    found = 1

    def __init__(self) -> None:
        self.alive = dict[int, str]()
        self.types = list[int]()  # of sums, scales and matrices

    def __getattr__(self, function: str) -> Any:
        kind = function.removeprefix("cublasLt").removesuffix("Create").removesuffix("Destroy")

        def create(made: Any, *arguments: Any) -> int:
            self.types += [argument for argument in arguments if isinstance(argument, int)]
            if kind == "MatrixLayout" and arguments[2].value == 77:
                return 7
            made._obj.value = max(self.alive, default=0) + 1
            self.alive[made._obj.value] = kind
            return 0

        def destroy(made: Any) -> int:
            assert self.alive.pop(made.value) == kind
            return 0

        def choose(handle: Any, product: Any, w: Any, x: Any, *rest: Any) -> int:
            rest[-1]._obj.value = self.found
            return 0

        if function.endswith("Create"):
            return create
        if function.endswith("Destroy"):
            return destroy
        return choose if function.endswith("GetHeuristic") else lambda *_: 0


def test_all_that_cublaslt_creates_is_destroyed() -> None:
    fake = FakeCublasLt()
    library = gemm.CublasLt(fake)
    product = gemm.Fp8Gemm(cast(Any, None), library, 36, 256, 512)
    kinds = sorted(fake.alive.values())
    assert kinds == ["", "MatmulDesc", "MatmulPreference", *["MatrixLayout"] * 3]
    del product
    assert list(fake.alive.values()) == [""], "the handle outlives the product"
    del library
    assert not fake.alive


def test_int8_products_have_int32_sums_and_scales() -> None:
    fake = FakeCublasLt()
    product = gemm.Int8Gemm(cast(Any, None), gemm.CublasLt(fake), 36, 256, 512)
    compute_32i, int8, int32 = 72, 3, 10  # of cublasLt.h and library_types.h
    assert fake.types == [compute_32i, int32, int8, int8, int32]
    assert type(product._factor) is type(product._zero) is ctypes.c_int
    assert (product._factor.value, product._zero.value) == (1, 0)


def test_a_product_that_cublaslt_refuses_leaves_nothing() -> None:
    fake = FakeCublasLt()
    library = gemm.CublasLt(fake)
    with pytest.raises(GraphError, match="cublasLtMatrixLayoutCreate failed with status 7"):
        gemm.Fp8Gemm(cast(Any, None), library, 77, 256, 512)
    fake.found = 0
    with pytest.raises(GraphError, match="no FP8 product of 36x256x512"):
        gemm.Fp8Gemm(cast(Any, None), library, 36, 256, 512)
    gc.collect()
    assert list(fake.alive.values()) == [""]


# On a GPU


@pytest.fixture(scope="module")
def gpu() -> Any:
    found = require_gpu()
    if (reason := native.missing("ffn", found.capability)) is not None:
        pytest.skip(reason)
    return found


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        ("attn_in", "native"),
        ("attn_in", "native int8"),
        ("attn_out", "native int8"),
        ("ffn", "native int8"),
        ("attn_out", "native"),
        ("cross_attention", "native"),
        ("ffn", "native"),
        ("fuser", "native"),
        ("fuser", "native fp8"),
    ],
)
@pytest.mark.parametrize(
    ("model", "plan"),
    [
        (TINY, Plan(64, 48, 5, "fp8")),  # 36 tokens: less than a block of queries
        (TINY, Plan(256, 144, 9, "fp8")),  # 576: no multiple of 128
        (ANIMATE_14B, Plan(208, 112, 5, "fp8")),  # 273
    ],
)
def test_networks_against_the_fp32_graphs(
    gpu: Any, model: Any, plan: Plan, name: str, candidate: str
) -> None:
    plan = replace(plan, precision="int8") if candidate == "native int8" else plan
    segment = native.open_native(networks(model, plan)[name], model, plan, gpu, candidate)
    compare(gpu, segment, model, plan, name, "fast" if candidate == "native fp8" else "exact")


def test_cross_attention_for_every_gpu(gpu: Any) -> None:
    """On Hopper nothing else runs that kernel."""
    plan = Plan(256, 144, 9, "fp8")
    compare(gpu, block.CrossAttention(TINY, plan, gpu), TINY, plan, "cross_attention", "exact")


def compare(gpu: Any, segment: Any, model: Any, plan: Plan, name: str, tier: Any) -> None:
    """With the fp32 graph, at the first and the last token too (of a slot, for a fuser)."""
    network = networks(model, plan)[name]
    tokens = sample_of(name, plan, seed=1)
    if name == "fuser":
        size = plan.tokens_per_slot
        tokens[0] -= tokens[0] % size
        tokens[-1] += size - 1 - tokens[-1] % size
    else:
        tokens[:2] = 0, plan.tokens - 1
    values = realistic(network, seed=2)
    made, again = (run_segment(gpu, segment, network, values, poison) for poison in (0xFF, 0x7F))
    assert all((made[n].view(np.uint8) == again[n].view(np.uint8)).all() for n in made)
    error = relative_error(made, reference(name, model, values, tokens), values, tokens)
    assert error <= tolerance(name, plan.precision, tier)
