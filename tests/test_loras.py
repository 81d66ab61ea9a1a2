"""LoRA files of every family merged into every kind of base, against the plain formula in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import FAMILIES, OF_BASE, Array, of_base

from trt_wan.engines.config import TINY
from trt_wan.runtime.events import Event, Note, silent
from trt_wan.runtime.job import Lora
from trt_wan.runtime.loras.loras import Loras, Merging
from trt_wan.runtime.weights.random import random_weights
from trt_wan.runtime.weights.stored import Stored, Tensors


class InMemory(dict[str, Array]):
    """`Tensors` of float32 arrays."""

    def stored(self, name: str) -> Stored:
        return Stored(self[name])

    def rows(self, name: str, indices: Any) -> Array:
        return self[name][list(indices)]


@pytest.fixture(scope="module")
def base() -> InMemory:
    return InMemory(random_weights(TINY, "transformer", 1))


def merged(base: Tensors, *loras: Lora, notes: list[Event] | None = None) -> Merging:
    return Loras(TINY, base).merging(loras, notes.append if notes is not None else silent)


def require_merged(
    merging: Merging, base: Mapping[str, Array], deltas: Mapping[str, Array], strength: float
) -> None:
    """Exactly the tensors of `deltas` change, by strength times delta; rounded once to float32."""
    assert set(merging.changed) == set(deltas)
    for name, weight in base.items():
        if name not in deltas:
            stored = merging.tensors.stored(name)
            assert stored.values is weight and stored.delta is None, name
            continue
        got = merging.tensors[name]
        delta = strength * deltas[name]
        wanted = weight.astype(np.float64) + delta
        assert got.shape == weight.shape and got.dtype == np.float32
        largest = np.abs(delta).max()
        assert largest > 1e-4 and np.all(np.abs(got - wanted) <= 2e-6 * np.abs(wanted) + 4e-6 * largest), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_merged(base: InMemory, tmp_path: Path, family: str) -> None:
    made = FAMILIES[family]()
    path = made.save(tmp_path / "lora.safetensors")
    notes: list[Event] = []
    require_merged(merged(base, Lora(path, 0.7), notes=notes), base, made.deltas, 0.7)
    (note,) = notes
    assert isinstance(note, Note) and f"changes {len(made.deltas)} tensors." in note.text
    assert ("Keys that are left out" in note.text) == (family == "t2v_own"), note.text
    if family == "t2v_own":
        assert note.text.endswith("Keys that are left out: 2 of a patch embedding for text to video.")


@pytest.mark.parametrize("kind", OF_BASE)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_delta_that_depends_on_the_base(base: InMemory, tmp_path: Path, kind: str, strength: float) -> None:
    made = of_base(kind, base)
    path = made.save(tmp_path / "lora.safetensors")
    require_merged(merged(base, Lora(path, strength)), base, made.deltas, strength)
