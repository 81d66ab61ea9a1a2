"""From candidates to segments: which of them can be used here, and the opening of those that were chosen.

Engines that are missing or damaged are built on the spot. Libraries and kernels of our own are imported only
when they are asked about.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trt_wan.engines.choice.candidates import Candidate, Engine, Machine
from trt_wan.engines.choice.recipes import Recipe
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import Capability, GpuKind
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.engines import ensure, open_checked
from trt_wan.engines.store.home import home
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.segments.tensorrt import finish_kernels, open_engines


def machine_of(gpu: Gpu, flavour: Flavour) -> Machine:
    return Machine(GpuKind(gpu.name, gpu.driver), gpu.capability, flavour)


def missing(candidate: Candidate, capability: Capability) -> str | None:
    """Why the candidate cannot be used on GPUs of that capability, in a sentence; None if it can."""
    if candidate.maker == "native":
        from trt_wan.runtime.segments import native

        return native.missing(capability)
    if candidate.maker == "attention":
        from trt_wan.runtime.segments import attention

        return attention.missing(candidate.name, capability)
    return None


def kernel_cache(flavour: Flavour) -> Path:
    return home() / "kernels" / flavour.name


def finish_engines(recipes: Iterable[Recipe], flavour: Flavour, progress: Progress) -> None:
    """Has the kernels of engines in the store finished for this GPU, so that no run has to."""
    plans = {recipe.engine.title: open_checked(recipe.engine) for recipe in recipes}
    finish_kernels(flavour, plans, kernel_cache(flavour), progress)


def open_segments(
    chosen: Mapping[str, Candidate],
    config: ModelConfig,
    plan: Plan,
    gpu: Gpu,
    flavour: Flavour,
    recipes: Mapping[Engine, Recipe],
    progress: Progress,
) -> dict[str, Segment]:
    """By network. All engines are opened in one call: new ones have their kernels finished side by side."""
    engines = {name: row.engine for name, row in chosen.items() if row.engine is not None}
    plans = {name: _plan(recipes[engine], progress) for name, engine in engines.items()}
    segments: dict[str, Segment] = {}
    segments |= open_engines(gpu, flavour, plans, kernel_cache(flavour), progress)
    for name, candidate in chosen.items():
        if candidate.maker == "native":
            from trt_wan.runtime.segments.native import open_native

            segments[name] = open_native(networks(config, plan)[name], config, plan, gpu)
        elif candidate.maker == "attention":
            from trt_wan.runtime.segments.attention import open_attention

            c = config.transformer
            segments[name] = open_attention(candidate.name, gpu, c.heads, plan.tokens, c.head_dim)
    return segments


def _plan(recipe: Recipe, progress: Progress) -> bytes:
    manifest, built = ensure(recipe.engine, lambda: recipe.compile(_ignore))
    if built:
        progress(Note(f"built {recipe.engine.title} in {manifest.build_seconds:.1f} s"))
    return open_checked(recipe.engine)


def _ignore(*progress: Any) -> None:
    """A run reports an engine when it is built, not while."""
