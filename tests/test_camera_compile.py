"""Uni3C's graphs become engines without a GPU. At full size: docs/log.md."""

from pathlib import Path

import pytest
from plan_text import fused_attentions, gemms
from tiny_job import PLAN

from trt_wan.build.export import export
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.shape import CameraPlan, Plan
from trt_wan.engines.tensorrt import compile_onnx

pytest.importorskip("tensorrt_rtx")

FP8, BF16 = ("fp8_e4m3", "fp8_e4m3"), ("bf16", "bf16")
FP8_GEMMS = {"uni3c_in": 3, "uni3c_out": 3, "uni3c_add": 1}


@pytest.mark.long
def test_every_graph_compiles_with_fp8_gemms_and_one_attention(tmp_path: Path) -> None:
    plan = CameraPlan.beside(Plan(PLAN.width, PLAN.height, PLAN.frames, "fp8"), TINY.camera.ffn_dim)
    flavour, plans = choose_flavour("tensorrt_rtx", None), {}
    for name, network in networks(TINY, plan).items():
        export(network, TINY, plan, path := tmp_path / f"{name}.onnx")
        plans[name] = compile_onnx(flavour, path.read_bytes(), "sm89", lambda *_: None)
    found = {name: [gemm[:2] for gemm in gemms(made)] for name, made in plans.items()}
    assert {name: kinds for name, kinds in found.items() if FP8 in kinds} == {
        name: [FP8] * count for name, count in FP8_GEMMS.items()
    }
    assert fused_attentions(plans["uni3c_attention"]) == [("bf16",) * 3]
