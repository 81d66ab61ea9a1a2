"""Which TensorRT is chosen and why, how it is driven, and what its refusals become.

TensorRT-RTX itself compiles small graphs here. Full TensorRT cannot be installed on this machine; a stand-in
shows only that it is asked for what its documentation has.
"""

import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import TensorProto, helper
from plan_text import fused_attentions, gemms

from trt_wan.engines.flavour import Flavour, choose_flavour
from trt_wan.engines.gpu import Capability
from trt_wan.engines.store.home import home
from trt_wan.engines.tensorrt import compile_attention, compile_onnx
from trt_wan.errors import EnvironmentBroken, GraphError, UsageError
from trt_wan.install import install_command

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

HOPPER, ADA, BLACKWELL = (9, 0), (8, 9), (12, 0)
FULL, OLD_FULL = ("tensorrt", "11.4.0"), ("tensorrt", "10.9.0.34")
RTX_16, RTX_17 = ("tensorrt_rtx", "1.6.1.120"), ("tensorrt_rtx", "1.7.1.116")
UNLISTED = "compute capability 9.0 is not on its list, but it runs there"
Installed = tuple[tuple[str, str], ...]


def install(monkeypatch: pytest.MonkeyPatch, packages: Installed) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails as if it were not there
    for name, version in packages:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__=version))


@pytest.mark.parametrize(
    ("packages", "capability", "forced", "chosen", "reason"),
    [
        ((RTX_16,), None, None, RTX_16, "it builds without a GPU"),
        ((FULL, RTX_17), None, None, RTX_17, "it builds without a GPU"),
        ((FULL, RTX_17), ADA, None, RTX_17, "it is made for RTX GPUs and builds in seconds"),
        ((FULL,), BLACKWELL, None, FULL, "tensorrt_rtx is not installed"),
        ((FULL, RTX_16), HOPPER, None, FULL, "its kernels are tuned for data-centre GPUs"),
        ((RTX_16,), HOPPER, None, RTX_16, f"tensorrt is not installed; {UNLISTED}"),
        ((FULL, RTX_17), HOPPER, None, FULL, "its kernels are tuned for data-centre GPUs"),
        ((OLD_FULL, RTX_16), HOPPER, None, RTX_16, f"tensorrt 10.9.0.34 is older than 10.13; {UNLISTED}"),
        ((FULL, RTX_16), HOPPER, "tensorrt_rtx", RTX_16, f"it was asked for; {UNLISTED}"),
        ((FULL, RTX_17), ADA, "tensorrt", FULL, "it was asked for"),
    ],
)
def test_flavour(
    monkeypatch: pytest.MonkeyPatch,
    packages: Installed,
    capability: Capability | None,
    forced: str | None,
    chosen: tuple[str, str],
    reason: str,
) -> None:
    install(monkeypatch, packages)
    flavour = choose_flavour(forced, capability)
    assert (flavour.name, flavour.version) == chosen
    assert flavour.reason == reason
    assert flavour.module is sys.modules[chosen[0]]


@pytest.mark.parametrize(
    ("packages", "capability", "forced", "message", "hint"),
    [
        ((), None, None, "tensorrt_rtx is not installed; tensorrt builds only", install_command("rtx")),
        ((FULL,), None, None, "tensorrt builds only for a GPU of this machine", install_command("rtx")),
        ((RTX_17,), HOPPER, None, "1.7.1.116 refuses compute capability 9.0", "'tensorrt-rtx>=1.6,<1.7'"),
        ((RTX_17,), HOPPER, "tensorrt_rtx", "refuses compute capability 9.0", "'tensorrt-rtx>=1.6,<1.7'"),
        ((RTX_17,), ADA, "tensorrt", "tensorrt is not installed", install_command("tensorrt")),
        ((OLD_FULL,), ADA, None, "tensorrt 10.9.0.34 is older than 10.13", install_command("rtx")),
    ],
)
def test_no_flavour(
    monkeypatch: pytest.MonkeyPatch,
    packages: Installed,
    capability: Capability | None,
    forced: str | None,
    message: str,
    hint: str,
) -> None:
    install(monkeypatch, packages)
    with pytest.raises(EnvironmentBroken) as caught:
        choose_flavour(forced, capability)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    (tmp_path / "tensorrt_rtx.py").write_text("raise OSError('libfoo.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentBroken, match="tensorrt_rtx does not load .libfoo.so.1: cannot open"):
        choose_flavour("tensorrt_rtx", ADA)


def test_a_flavour_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="no flavour 'trt'") as caught:
        choose_flavour("trt", ADA)
    assert "tensorrt, tensorrt_rtx" in caught.value.hint


class FullTensorRt:
    """As much of TensorRT 10 and 11 as building touches. The build steps until it is told to stop."""

    __version__ = "11.4.0"
    ILogger = type("ILogger", (), {})
    IProgressMonitor = type("IProgressMonitor", (), {})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")

    def __init__(self, steps: int) -> None:
        self.steps, self.stopped_after, self.cleared = steps, 0, list[str]()

    def Builder(self, log: Any) -> Any:  # noqa: N802
        self.log = log
        self.config = SimpleNamespace(
            clear_flag=self.cleared.append,
            create_timing_cache=lambda blob: None if blob == b"nonsense" else blob,
            set_timing_cache=self.set_timing_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: self.timings + b" and this build"),
        )
        return SimpleNamespace(
            create_network=self.create_network,
            create_builder_config=lambda: self.config,
            build_serialized_network=self.build,
        )

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timings = cache
        return cache != b"another GPU's"

    def create_network(self, flags: int) -> Any:
        self.flags = flags
        return SimpleNamespace(num_outputs=1)

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(parse=lambda graph: graph == b"graph")

    def build(self, network: Any, config: Any) -> bytes | None:
        config.progress_monitor.phase_start("Tuning", None, self.steps)
        for step in range(self.steps):
            time.sleep(0.01)
            if not config.progress_monitor.step_complete("Tuning", step):
                self.stopped_after = step + 1
                return None
        config.progress_monitor.phase_finish("Tuning")
        return b"plan"


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))


def full(trt: FullTensorRt) -> Flavour:
    return Flavour("tensorrt", trt.__version__, trt, "")


def test_full_tensorrt_is_asked_for_a_strongly_typed_engine() -> None:
    trt, seen = FullTensorRt(steps=30), []
    plan = compile_onnx(full(trt), b"graph", "current", lambda *progress: seen.append(progress))
    assert plan == b"plan"
    assert trt.flags == 1 << 1 and trt.cleared == ["TF32"] and trt.config.max_aux_streams == 0
    assert not hasattr(trt.config, "num_compute_capabilities")
    assert seen and all(("Tuning", 0, 30) < state <= ("Tuning", 30, 30) for state in seen)


def test_full_tensorrt_keeps_what_it_timed() -> None:
    def build(known: bytes | None) -> bytes:
        if known is not None:
            file.write_bytes(known)
        trt = FullTensorRt(steps=1)
        compile_onnx(full(trt), b"graph", "current", silent)
        assert file.read_bytes() == trt.timings + b" and this build"
        return trt.timings

    file = home() / "timings" / "11.4.0.timings"
    assert build(None) == b""
    assert build(None) == b" and this build"
    assert build(b"nonsense") == build(b"another GPU's") == b""
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing partial is left"


def test_full_tensorrt_builds_for_no_other_gpu() -> None:
    with pytest.raises(UsageError, match="not for sm89"):
        compile_onnx(full(FullTensorRt(1)), b"graph", "sm89", lambda *progress: None)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_build_ends_at_its_next_step(interruption: type[BaseException]) -> None:
    trt = FullTensorRt(steps=1000)

    def interrupt(*progress: object) -> None:
        raise interruption

    with pytest.raises(interruption):
        compile_onnx(full(trt), b"graph", "current", interrupt)
    assert 0 < trt.stopped_after < 100


def silent(phase: str, step: int, steps: int) -> None:
    pass


@pytest.fixture
def rtx() -> Flavour:
    return choose_flavour("tensorrt_rtx", None)


def graph(*nodes: Any, inputs: dict[str, tuple[int, Any]], constants: tuple[Any, ...] = ()) -> bytes:
    """One output, y [32, 64] in bf16."""
    made = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, (32, 64))],
        list(constants),
    )
    opset = [helper.make_opsetid("", 22)]
    return bytes(helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString())


def fp8_linear(scale_is_constant: bool) -> bytes:
    """y = x wᵀ with x and w in FP8; the scale of w is a constant, as it has to be, or an input."""
    inputs = {
        "x": (TensorProto.BFLOAT16, (32, 128)),
        "w": (TensorProto.FLOAT8E4M3FN, (64, 128)),
    }
    constants = [
        helper.make_tensor("one", TensorProto.BFLOAT16, (), [1.0]),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, (), [0.0]),
    ]
    if not scale_is_constant:
        inputs["w_scale"] = (TensorProto.BFLOAT16, ())
    return graph(
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one" if scale_is_constant else "w_scale"], ["wd"]),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "wt"], ["y"]),
        inputs=inputs,
        constants=tuple(constants),
    )


@needs_rtx
@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_a_scale_that_is_no_constant_costs_the_fp8_gemm(rtx: Flavour, target: Any) -> None:
    """What test_compile.py counts can be counted wrong: this formulation builds, and multiplies in bf16."""
    right, wrong = (compile_onnx(rtx, fp8_linear(constant), target, silent) for constant in (True, False))
    assert gemms(right) == [("fp8_e4m3", "fp8_e4m3", "bf16")]
    assert gemms(wrong) == [("bf16", "bf16", "bf16")]


@needs_rtx
@pytest.mark.parametrize("tokens", [64, 97, 210])
def test_attention_of_any_token_count(rtx: Flavour, tokens: int) -> None:
    """The mean of k is taken in two steps: over groups, and prime counts have none."""
    fp8 = compile_attention(rtx, 2, tokens, 128, True, "sm120", silent)
    assert fused_attentions(fp8) == [("fp8_e4m3",) * 3]
    bf16 = compile_attention(rtx, 2, tokens, 128, False, "sm120", silent)
    assert fused_attentions(bf16) == [("bf16",) * 3]


@needs_rtx
def test_a_node_that_is_not_supported_is_named(rtx: Flavour) -> None:
    nodes = (helper.make_node("Det", ["x"], ["y"], name="the_determinant"),)
    with pytest.raises(GraphError) as caught:
        compile_onnx(rtx, graph(*nodes, inputs={"x": (TensorProto.BFLOAT16, (3, 3))}), "sm89", silent)
    assert "the_determinant (Det)" in caught.value.message and rtx.version in caught.value.message
    assert caught.value.hint


@needs_rtx
@pytest.mark.parametrize("data", [b"", b"no graph", b"\x00" * 100])
def test_bytes_that_are_no_graph(rtx: Flavour, data: bytes) -> None:
    with pytest.raises(GraphError, match="cannot read the graph"):
        compile_onnx(rtx, data, "sm89", silent)


@needs_rtx
def test_what_the_builder_refuses_is_told(rtx: Flavour) -> None:
    with pytest.raises(GraphError, match="cannot build for sm86: .*fp8_e4m3"):
        compile_onnx(rtx, fp8_linear(True), "sm86", silent)


BUILD_FOR_EVER = """
import sys
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.tensorrt import compile_attention
flavour = choose_flavour("tensorrt_rtx", None)
print("ready", flush=True)
try:
    while True:
        compile_attention(flavour, 40, 32760, 128, True, "sm89", lambda *progress: None)
except KeyboardInterrupt:
    compile_attention(flavour, 2, 64, 128, True, "sm89", lambda *progress: None)
    print("stopped")
"""


@needs_rtx
@pytest.mark.parametrize("delay", [0.1, 0.33])
def test_ctrl_c_stops_a_build_and_the_next_one_works(delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD_FOR_EVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("stopped\n", 0), err
