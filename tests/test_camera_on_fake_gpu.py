"""The camera in an open model on a GPU that computes nothing: what is opened and loaded for which job."""

from types import SimpleNamespace
from typing import Any

import pytest

from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.shape import CameraPlan, Plan
from trt_wan.runtime.device.arena import Arena
from trt_wan.runtime.events import silent
from trt_wan.runtime.job import Load
from trt_wan.runtime.opening import gpu_sizes
from trt_wan.runtime.opening.gpu_sizes import GpuSizes
from trt_wan.runtime.settings import Settings
from trt_wan.runtime.weights.sources import RandomSource

PLAN = Plan(64, 48, 13, "fp8")
CAMERA = CameraPlan.beside(PLAN, TINY.camera.ffn_dim)


class Weights:
    """Keeps the names of the networks that a job asks for."""

    def plan(self, streamed: Any, passing: Any = ()) -> None:
        self.passing = set(passing)

    def prefetch(self, packs: Any, room: int) -> None:
        self.asked = {pack.network.name for pack in packs}


def test_a_job_with_a_camera_opens_its_networks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a job without one leaves them alone. Their weights stay, but for the modulation's."""
    opened: list[tuple[type, set[str]]] = []

    def segments(self: GpuSizes, plan: Plan, names: Any, progress: Any) -> dict[str, Any]:
        opened.append((type(plan), set(names)))
        segment = SimpleNamespace(scratch_bytes=256, start=lambda scratch: None)
        return dict.fromkeys(names, segment)

    monkeypatch.setattr(GpuSizes, "_segments", segments)
    gpu: Any = SimpleNamespace(
        free_bytes=lambda: 141 * 10**9,
        **{"name": "A GPU", "driver": 13, "capability": (9, 0), "loads": None, "copies": None},
        arena=Arena(0),
        reserve=lambda size: None,
        allocate=lambda size: SimpleNamespace(handle=256),
    )
    flavour = Flavour("tensorrt_rtx", "1.6.1", None, "a test")
    settings = Settings(keep_encoders=False)
    sizes = GpuSizes(gpu, flavour, TINY, {}, RandomSource(0), settings, None)
    sizes.weights = weights = Weights()  # type: ignore[assignment]
    uni3c = set(networks(TINY, CAMERA))
    with_weights = uni3c - {"uni3c_attention"}

    model = sizes.begin(PLAN, Load(), None, [], silent)
    assert weights.asked.isdisjoint(uni3c) and uni3c.isdisjoint(model.networks)
    plain = sizes._residency(PLAN, Load(), None, 256)
    assert opened == [(Plan, set(gpu_sizes.network_names(TINY, PLAN, "exact")))]

    load = Load(camera_ffn=TINY.camera.ffn_dim)
    for _ in range(2):
        model = sizes.begin(PLAN, load, None, [], silent)
        assert weights.asked >= with_weights and "uni3c_modulation" in weights.passing
        assert model.networks["uni3c_out"] == networks(TINY, CAMERA)["uni3c_out"]
    assert opened[1:] == [(CameraPlan, uni3c)]
    more = sizes._residency(PLAN, load, None, 256).resident - plain.resident
    sizes_of = gpu_sizes.weight_bytes(networks(TINY, CAMERA))
    assert more == sum(size for name, size in sizes_of.items() if name != "uni3c_modulation") > 0

    sizes.begin(PLAN, Load(), None, [], silent)
    assert weights.asked.isdisjoint(uni3c) and len(opened) == 2
