"""Lynx in an open model on a GPU that only counts: its networks are opened for jobs that need them, its
weights are freed after use, and a job without it is as it was.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_vae_tiles_open import LOAD, PLAN, Opened, Segment, least, with_graphs

from trt_wan.engines.config import TINY
from trt_wan.engines.lynx import FacePlan, Lynx, LynxPlan
from trt_wan.runtime.opening import gpu_sizes
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.residency import lynx_bytes
from trt_wan.runtime.weights.sources import FileSource

__all__ = ["with_graphs"]
BOTH = Lynx(True, True)
FACE = FacePlan(precision="fp8")


class OpenedLynx(Opened):
    def __init__(self, patch: pytest.MonkeyPatch, budget: int) -> None:
        super().__init__(patch, budget)
        self.engines: list[tuple[Any, list[str]]] = []
        patch.setattr(gpu_sizes, "recipes_for", lambda config, plan, *_: dict.fromkeys(PARTS, plan))
        patch.setattr(gpu_sizes, "open_engines", self._open_engines)
        self.passing: tuple[str, ...] = ()
        self.source: Any = FileSource({})
        self.sizes._faces = {}
        self.sizes._machine = SimpleNamespace(flavour=None, gpu=None)
        self.sizes.weights = SimpleNamespace(
            plan=lambda streamed, passing=(): setattr(self, "passing", tuple(passing)),
            prefetch=lambda *_: None,
            change=lambda source, keys: setattr(self, "source", source),
            source=self.source,
        )

    def _open_engines(self, gpu: Any, recipes: Any, progress: Any) -> dict[str, Segment]:
        self.engines.append((next(iter(recipes.values()), None), list(recipes)))
        return {name: Segment(name, plan) for name, plan in recipes.items()}

    def run(self, lynx: Lynx | None) -> Any:
        return self.sizes.begin(PLAN, replace(LOAD, lynx=lynx), None, (), self._progress)


PARTS = [
    *BOTH.networks,
    *("lynx_face_encode", "lynx_face_embed", "lynx_features", "lynx_ref_kv", "lynx_ref_norm"),
    *("attn_in", "attention", "attn_out", "cross_attention", "ffn"),
]


def test_it_is_opened_for_jobs_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OpenedLynx(monkeypatch, 1 << 40)
    model = opened.run(None)
    plain = opened.passing
    assert model.lynx is None and not opened.engines and not any("lynx" in name for name in plain)
    assert opened.sizes._gpu.arena.size == activation_bytes(TINY, PLAN, LOAD)

    assert opened.run(BOTH) is model
    steps = LynxPlan.of(PLAN, "full")
    assert opened.engines == [(steps, list(BOTH.networks)), (FACE, PARTS[len(BOTH.networks) :])]
    assert model.lynx.adapters == BOTH and model.lynx.face.plan == FACE
    assert model.networks["lynx_ref"].inputs[0].shape[1] == PLAN.tokens
    with_weights = {"lynx_resampler", "lynx_ip_kv", "lynx_ip_norm", *PARTS[5:10]}
    assert set(opened.passing) - set(plain) == with_weights, "no attention and no block"
    segments = opened.sizes._faces[FACE].segments
    assert all(segment.started == 1 for segment in segments.values()), "they have scratch"
    assert opened.sizes._gpu.arena.size > activation_bytes(TINY, PLAN, LOAD)

    opened.run(Lynx(True, False))
    assert model.lynx.face is None and len(opened.engines) == 3 and opened.engines[2][1] == []
    assert all(segment.started == 1 for segment in segments.values()), "no face, no start"
    assert opened.run(None).lynx is None and opened.passing == plain


def test_the_memory_of_its_weights_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OpenedLynx(monkeypatch, 1 << 40)
    opened.run(BOTH)
    load, scratch = replace(LOAD, lynx=BOTH), opened.sizes._executors[PLAN].scratch_bytes
    made = opened.sizes._residency(PLAN, load, None, scratch)
    assert made.spare == lynx_bytes(TINY, PLAN, BOTH) > 0


def test_in_tiles_too(monkeypatch: pytest.MonkeyPatch, with_graphs: None) -> None:
    room = activation_bytes(TINY, PLAN, replace(LOAD, lynx=BOTH)) - activation_bytes(TINY, PLAN, LOAD)
    opened = OpenedLynx(monkeypatch, least(None) + max(room, 0) + lynx_bytes(TINY, PLAN, BOTH) - 1)
    model = opened.run(BOTH)
    assert model.tile is not None and model.lynx.adapters == BOTH and "lynx_ip" in model.networks
    assert {"lynx_ip", "lynx_ref"} <= opened.sizes._executors[PLAN.vae_tile].segments.keys()


def test_files_are_taken_beside_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OpenedLynx(monkeypatch, 1 << 40)
    opened.source.parts = {"vae": "the VAE"}
    opened.sizes.take({"lynx_ip": "the adapter"})
    assert opened.source.parts == {"vae": "the VAE", "lynx_ip": "the adapter"}
    assert opened.sizes._host == {"lynx_ip": "the adapter"}
