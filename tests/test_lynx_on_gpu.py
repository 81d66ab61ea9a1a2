"""Lynx on a GPU: every engine against its graph in fp32, and jobs with and without an identity in a row.

Tiny random weights; skipped where there is no GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from eager_vae import EagerExecutor
from on_gpu import require_gpu, run_segment, with_kernels
from test_identity import POINTS, embedder
from tiny_job import PLAN, prepare, write_sound

from trt_wan.build.graphs import build_graphs
from trt_wan.engines.choice.recipes import recipes
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import choose_flavour
from trt_wan.engines.gpu import GpuKind
from trt_wan.engines.lynx import Lynx, lynx_plans
from trt_wan.engines.shape import Plan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.identity import FaceIdentity
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.segments.tensorrt import open_engines
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.random import random_tensor
from trt_wan.runtime.weights.tiny import write_tiny_lynx, write_tiny_weights

FP8 = replace(PLAN, precision="fp8")
TOLERANCE = 2e-2  # of the RMS: bf16


@pytest.fixture(scope="module")
def gpu() -> Any:
    return require_gpu()


@pytest.fixture(scope="module")
def home(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("lynx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(with_kernels(base / "home")))
        for plan in (FP8, *plans("full"), *plans("lite")):
            build_graphs(TINY, plan, lambda name, seconds: None)
        prepare(base / "in", write_sound(base / "tone.m4a", 1))
        write_tiny_weights(base / "weights", seed=5)
        write_tiny_lynx(base / "weights", seed=5)
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
        cv2.imwrite(str(base / "face.png"), noise)
        embedder(base / "net.onnx", np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32))
        yield base


def plans(kind: Any) -> tuple[Plan, ...]:
    return lynx_plans(FP8, Lynx(True, True, kind))


@pytest.mark.parametrize("kind", ["full", "lite"])
def test_every_engine_computes_its_graph(gpu: Any, home: Path, kind: Any) -> None:
    flavour = choose_flavour(None, gpu.capability)
    rng = np.random.default_rng(2)
    for plan in plans(kind):
        made = recipes(TINY, plan, "current", flavour, GpuKind(gpu.name, gpu.driver))
        names = [name for name in networks(TINY, plan) if name.startswith("lynx")]
        segments = open_engines(gpu, {name: made[name] for name in names})
        exact = networks(TINY, replace(plan, precision="fp32"))
        for name in names:
            network, plain = networks(TINY, plan)[name], exact[name]
            weights = {w.name: random_tensor(w.name, w.shape, rng) for w in plain.weights}
            inputs = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in plain.inputs}
            kinds = {t.name: np.dtype(t.dtype) for t in (*network.inputs, *network.weights)}
            given = {key: value.astype(kinds[key]) for key, value in (inputs | weights).items()}
            found = run_segment(gpu, segments[name], network, given)
            eager = EagerExecutor(TINY, replace(plan, precision="fp32"), {plain.part: weights})
            eager.weights._bound[name, 0] = weights
            wanted = eager.run(plain, 0, inputs)
            for tensor, want in zip(network.outputs, wanted, strict=True):
                error = np.linalg.norm(found[tensor.name].astype(np.float32) - want) / np.linalg.norm(want)
                assert error < TOLERANCE, (name, tensor.name, error)


def opened(home: Path, **settings: Any) -> OpenModel:
    given = {"precision": "fp8", "text_cache": False} | settings
    return open_model(WeightFiles((home / "weights",)), Settings(**given))


def frames(model: OpenModel, job: Job) -> Array:
    return np.concatenate(list(model.pieces(job)), axis=1)


def test_jobs_with_and_without_an_identity_in_a_row(home: Path) -> None:
    plain = Job(Inputs.from_folder(home / "in", "animate"), window=PLAN.frames, steps=2, guidance=2.0)
    both = replace(plain, identity=FaceIdentity(home / "face.png", POINTS, home / "net.onnx"))
    ref = replace(both, identity=FaceIdentity(home / "face.png", POINTS))
    with opened(home) as model:
        made = [frames(model, job) for job in (plain, both, ref, plain, both)]
    np.testing.assert_array_equal(made[0], made[3])
    np.testing.assert_array_equal(made[1], made[4])
    assert min(np.abs(a - b).max() for a, b in ((made[0], made[1]), (made[1], made[2]))) > 1e-3
    with opened(home, keep_encoders=False) as model:
        np.testing.assert_array_equal(frames(model, both), made[1])
