"""The sizes of an open model on a GPU: segments of each size, and the memory that all sizes share.

Weights, arena and scratch are one each. Before a job the weights are planned anew: a job that needs a larger
arena makes more blocks stream, a smaller one brings them back. Segments hold no weights; the sizes used last
are kept.

The VAE computes in tiles (networks/vae.py) for jobs that do not fit otherwise, and for no others.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from typing import Any

from trt_wan.engines.choice.candidates import SPARSE, VAE, Candidate, Engine, Machine, Tier, candidates, tiers
from trt_wan.engines.choice.choose import choose, place_of
from trt_wan.engines.choice.recipes import recipes as recipes_for
from trt_wan.engines.choice.recipes import recipes_here
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Network, Part
from trt_wan.engines.contracts import networks
from trt_wan.engines.contracts.attention import of_heads, to_rows
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import Capability
from trt_wan.engines.lynx import FacePlan, Lynx, LynxPlan
from trt_wan.engines.precision import Precision
from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan, VaeTile
from trt_wan.engines.store.engine_id import Recipe
from trt_wan.engines.store.graphs import graph_set
from trt_wan.engines.store.measurements import read_figures
from trt_wan.errors import GpuFault, MemoryShort, UsageError, shell_command, with_commands
from trt_wan.runtime.conditioning import MANY_RANKS
from trt_wan.runtime.context.parts import ContextPlan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.events import Note, Progress, silent
from trt_wan.runtime.executors import Array, Observe
from trt_wan.runtime.executors.gpu import GpuExecutor
from trt_wan.runtime.job import Load
from trt_wan.runtime.loras.merging import MergingSource
from trt_wan.runtime.networks.model import ALONE, LynxModel, Model
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.gpu_ranks import GpuRanks
from trt_wan.runtime.opening.residency import (
    BEFORE_THE_STEPS,
    BETWEEN_WINDOWS,
    BLOCK,
    CONTEXT_BYTES,
    KERNELS_BYTES,
    Residency,
    lynx_bytes,
    passing_bytes,
    plan_residency,
    weight_bytes,
)
from trt_wan.runtime.opening.segments import machine_of, missing, of_attention, open_segments
from trt_wan.runtime.parallel.peer_sequence import PeerSequence
from trt_wan.runtime.parallel.planner import groups_of
from trt_wan.runtime.parallel.ranks import Ranks
from trt_wan.runtime.parallel.shards import Shards
from trt_wan.runtime.parallel.vae_parts import part_name
from trt_wan.runtime.parallel.vae_pipeline import VaePipeline
from trt_wan.runtime.segments.segment import Segment
from trt_wan.runtime.segments.tensorrt import finish_engines, open_engines
from trt_wan.runtime.settings import Settings
from trt_wan.runtime.weights.on_device import DeviceWeights
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.sources import FileSource, WeightSource
from trt_wan.runtime.weights.stored import Tensors

NAG = "cross_attention_nag"
DENSE = "attention"
DECODERS = ("vae_decode_first", "vae_decode_next")
BLOCK_OF_A_FACE = ("attn_in", "attention", "attn_out", "cross_attention", "ffn")
MOST_SIZES = 4  # whose segments are kept
ExportTiles = Callable[[VaeTile, Progress], None]  # exports the graphs of a tile


class GpuSizes:
    def __init__(
        self,
        gpu: Gpu,
        flavour: Flavour,
        config: ModelConfig,
        host: Mapping[Part, Mapping[str, Array]],
        source: WeightSource,
        settings: Settings,
        observe: Observe | None,
        export_tiles: ExportTiles | None = None,
    ) -> None:
        self._export_tiles = export_tiles
        self._gpu, self._machine = gpu, machine_of(gpu, flavour)
        self._config, self._host, self._settings, self._observe = config, host, settings, observe
        # The CUDA context exists, so free memory lacks it already; --vram counts it.
        total = (
            gpu.free_bytes() - KERNELS_BYTES if settings.vram is None else settings.vram * 1e9 - CONTEXT_BYTES
        )
        self._total = int(total)
        self.weights = DeviceWeights(gpu, source)
        self._executors: dict[Plan, GpuExecutor] = {}  # the one used last comes last; a tile has its own
        self._models: dict[Plan, Model] = {}
        self._faces: dict[Plan, GpuExecutor] = {}  # they compute Lynx's picture
        self._scratch: tuple[Any, int] | None = None  # buffer, bytes
        self._ranks = GpuRanks(gpu, self.weights)
        self._slots = 0  # bytes that blocks stream through

    @property
    def numerics(self) -> tuple[str, ...]:
        machine = self._machine
        return machine.version, machine.gpu.name, str(machine.gpu.driver)

    def begin(
        self,
        plan: Plan,
        load: Load,
        context: ContextPlan | None,
        skip: Collection[str],
        progress: Progress,
        ranks: Ranks = ALONE,
        share: ShardPlan | None = None,
    ) -> Model:
        opened: Plan = share or plan
        peers = None if share is None else self._open_peers(plan, ranks, share)
        contracts = networks_for(self._config, plan, load)
        blocks = [
            Pack.of(contracts[name], n) for n in range(self._config.transformer.layers) for name in BLOCK
        ]
        others = [
            Pack.of(network, n)
            for network in contracts.values()
            if network.weights and network.name not in (*BLOCK, *skip)
            for n in range(network.repeats)
        ]
        if not self._models:
            keeps = self._settings.keep_encoders and sum(weight_bytes(contracts).values()) <= self._budget
            self.weights.plan([], () if keeps else BEFORE_THE_STEPS)
        if opened not in self._models:
            room = (
                self._budget - self._gpu.arena.size - (self._scratch[1] if self._scratch else 0) - self._slots
            )
            known = [pack for pack in others if ranks.count == 1 or pack.network.name not in DECODERS]
            self.weights.prefetch(known, room)  # while the segments are opened
            self._open(plan, progress, share=share)
        if share is not None and peers is not None:
            self._open_heads(share, peers.shards, progress)
        if ranks.count > 1:
            segments, whole = self._executors[opened].segments, networks(self._config, plan)
            pipeline = self._ranks.pipeline(ranks, opened, segments, whole, lambda: self._budget)
            self._models[opened].take_pipeline(pipeline)
        if load.nag:
            self._open_more(opened, opened, (NAG,), progress)
        camera = camera_of(plan, load)
        if camera is not None:
            names = network_names(self._config, camera, self._settings.tier)
            self._open_more(opened, camera, names, progress)
        adapters = {} if load.lynx is None else self._open_lynx(opened, load.lynx, progress)
        self._executors[opened] = self._executors.pop(opened)
        try:
            residency = self._residency(plan, load, context, self._scratch_bytes(opened, load))
        except MemoryShort as short:
            if share is not None or (tile := plan.vae_tile) is None:
                raise
            residency, opened = self._in_tiles(plan, tile, load, context, short, progress), tile
        executor = self._executors[opened]
        if camera is not None:
            self._models[opened].take(camera)
        for old in list(self._executors)[:-MOST_SIZES]:
            del self._executors[old], self._models[old]
        if residency.streamed:
            streamed = len({pack.n for pack in residency.streamed})
            text = f"{streamed} of {self._config.transformer.layers} blocks stream from host memory"
            limit = self._budget / 1e9 if self._settings.vram is None else self._settings.vram
            progress(Note(f"{text} ({limit:.1f} GB)"))
        self.weights.plan(residency.streamed, (*residency.passing, *adapters))
        if self._gpu.arena.size != residency.arena:
            self._gpu.reserve(residency.arena)
        scratch = self._take_scratch(residency.scratch)
        executor.start(scratch)
        self._use_lynx(self._models[opened], load, scratch)
        self._slots = residency.slots
        room = self._budget - residency.arena - residency.scratch - residency.slots
        model = self._models[opened]
        if model.vae_pipeline is not None:
            others = _with_parts(others, model.vae_pipeline, encodes=ranks.count >= MANY_RANKS)
        self.weights.prefetch([*others, *blocks], room)
        model.ranks, model.sequence = ranks, peers
        return model

    def take(self, parts: Mapping[Part, Any]) -> None:
        """Weights that random numbers stand for need no files."""
        self._host = {**self._host, **parts}
        if isinstance(self.weights.source, FileSource):
            source = copy(self.weights.source)
            source.parts = {**source.parts, **parts}
            self.weights.change(source, ())

    def change(self, transformer: Tensors, changed: Collection[str]) -> None:
        table = networks(self._config, Plan()).values()  # weights do not depend on the plan
        keys = {
            (network.name, n)
            for network in table
            if network.part == "transformer"
            for n in range(network.repeats)
            if not network.keys(n).isdisjoint(changed)
        }
        parts: dict[Part, Any] = {**self._host, "transformer": transformer}
        self.weights.change(MergingSource(parts), keys)

    def abandon(self) -> None:
        self._ranks.abandon()

    def resume(self) -> None:
        self._gpu.device.set_current()

    def close(self) -> None:
        with suppress(GpuFault):  # everything else is freed all the same
            self._gpu.sync()
        self._ranks.close()
        self._executors.clear()
        self._faces.clear()
        self._models.clear()
        self.weights.close()
        if self._scratch is not None:
            self._scratch[0].close(self._gpu.stream)
            self._scratch = None
        self._gpu.close()

    @property
    def _budget(self) -> int:
        """Bytes for weights and activations."""
        return self._total - self._ranks.nbytes

    def _open_peers(self, plan: Plan, ranks: Ranks, share: ShardPlan) -> PeerSequence:
        dtype = networks(self._config, share)[DENSE].inputs[0].dtype
        joined = 4 * plan.tokens * self._config.transformer.dim
        return self._ranks.peers(ranks, share, lambda: self._in_groups(ranks, share), dtype, joined)

    def _in_groups(self, ranks: Ranks, share: ShardPlan) -> Shards:
        """The same on all ranks. TensorRT's attention takes all of a rank's heads: its graph has them."""
        shards, (chosen, _) = Shards.of(self._config, share), self._chosen(share, [DENSE], silent)
        processors = ranks.least(0 if chosen[DENSE].engine else self._gpu.multiprocessors)
        if not processors:
            return shards
        rows, queries = of_attention(chosen[DENSE])
        rows = rows and self._settings.keep is None and shards.is_even
        shards = replace(shards, to_rows=bool(ranks.least(int(rows))))
        return replace(shards, groups=groups_of(shards, processors, ranks.least(queries)))

    def _open_heads(self, share: ShardPlan, shards: Shards, progress: Progress) -> None:
        """Opens a rank's self-attention for the heads of each group, once."""
        contracts = networks(self._config, share)
        for name in network_names(self._config, share, self._settings.tier):
            if name in (DENSE, SPARSE.network):
                of_groups = [of_heads(contracts[name], heads) for heads in shards.groups]
                if shards.to_rows:
                    held = shards.slots * shards.share
                    of_groups = [to_rows(each, shards.ranks, held) for each in of_groups]
                parts = {each.name: each for each in of_groups}
                segments = self._executors[share].segments
                if not parts.keys() <= segments.keys():
                    chosen, recipes = self._chosen(share, [name], progress)
                    rows = dict.fromkeys(parts, chosen[name])
                    made = open_segments(rows, self._config, share, self._gpu, recipes, progress, parts)
                    segments.update(made)
                self._models[share].networks |= parts

    def _in_tiles(
        self,
        plan: Plan,
        tile: VaeTile,
        load: Load,
        context: ContextPlan | None,
        short: MemoryShort,
        progress: Progress,
    ) -> Residency:
        """Opens the tile for a job that raised `short`. Raises MemoryShort if that does not help, or if the
        tile's graphs are missing and cannot be exported from here.
        """
        config, whole, vae = self._config, self._executors[plan], networks(self._config, tile)
        others = {name: segment for name, segment in whole.segments.items() if name not in vae}
        scratch = max(segment.scratch_bytes for segment in others.values())
        self._residency(plan, load, context, scratch, tile)  # before anything is opened or asked for
        if not graph_set(config, tile).complete():
            if self._export_tiles is None:
                raise _would_fit(short, tile.build_command(config.name)) from short
            self._export_tiles(tile, progress)
        if tile not in self._models:
            self._open(plan, progress, tile)
        executor = self._executors[tile] = self._executors.pop(tile)
        executor.segments |= others  # the size may have been opened anew, or have optional ones by now
        residency = self._residency(plan, load, context, self._scratch_bytes(tile, load), tile)
        arenas = [activation_bytes(config, plan, load, context, cut) for cut in (None, tile)]
        saved = (arenas[0] + whole.scratch_bytes - arenas[1] - executor.scratch_bytes) / 1e9
        size = f"{tile.width}x{tile.height}"
        progress(
            Note(
                f"The VAE computes in two tiles of {size}, which takes {saved:.1f} GB less: memory is short. "
                "The picture differs a little from one computed whole.",
                "vae_tiles",
                {"tile": size, "saved_gb": round(saved, 2)},
            )
        )
        return residency

    def _open(
        self, plan: Plan, progress: Progress, tile: VaeTile | None = None, share: ShardPlan | None = None
    ) -> None:
        """With `tile` only the VAE's segments are opened. Those of a block are the rank's, with `share`."""
        opened = tile or plan
        names, keep = network_names(self._config, opened, self._settings.tier), self._settings.keep
        own: tuple[str, ...] = ()
        if share is not None:
            own = network_names(self._config, share, self._settings.tier)
            names = tuple(name for name in names if name not in own)
            own = tuple(name for name in own if name not in (DENSE, SPARSE.network))  # by _open_heads
        if keep is not None and tile is None:
            exact = f"{keep:.0%} of its blocks of keys exactly, the others by their means"
            progress(Note(f"turbo: attention takes {exact}, after the first quarter of the steps."))
        executor = GpuExecutor(self._gpu, self._segments(opened, names, progress), self.weights)
        if share is not None:
            opened = share
            executor.segments |= self._segments(opened, own, progress)
        self._executors[opened] = executor
        observed = self._observe(executor) if self._observe else executor
        model = self._models[opened] = Model(self._config, plan, observed, self._host, tile, keep)
        if share is not None:
            model.take(share)

    def _open_more(self, plan: Plan, of: Plan, names: Sequence[str], progress: Progress) -> None:
        """Opens optional networks, of `of`, for a size that is open, once."""
        segments = self._executors[plan].segments
        if missing := [name for name in names if name not in segments]:
            self._executors[plan].segments |= self._segments(of, missing, progress)

    def _open_lynx(self, plan: Plan, adapters: Lynx, progress: Progress) -> dict[str, Network]:
        """Opens the networks of the adapters, once. Returns those whose weights are freed after each use."""
        own = LynxPlan.of(plan, adapters.kind)
        contracts = dict(networks(self._config, own))
        executor = self._executors[plan]
        executor.segments |= self._engines(
            own, [name for name in adapters.networks if name not in executor.segments], progress
        )
        if adapters.ref:
            face = FacePlan(precision=plan.precision)
            contracts |= networks(self._config, face)
            if face not in self._faces:
                segments = self._engines(face, list(networks(self._config, face)), progress)
                self._faces[face] = GpuExecutor(self._gpu, segments, self.weights)
        return {name: row for name, row in contracts.items() if row.weights and name not in BLOCK_OF_A_FACE}

    def _engines(self, plan: Plan, names: Sequence[str], progress: Progress) -> dict[str, Segment]:
        """TensorRT's engines: networks that run once, or are a small part of a step, have no other."""
        machine = self._machine
        recipes = recipes_for(self._config, plan, "current", machine.flavour, machine.gpu)
        return {**open_engines(self._gpu, {name: recipes[name] for name in names}, progress)}

    def _scratch_bytes(self, plan: Plan, load: Load) -> int:
        used = [self._executors[plan], *(self._faces.values() if load.lynx and load.lynx.ref else ())]
        return int(max(executor.scratch_bytes for executor in used))

    def _use_lynx(self, model: Model, load: Load, scratch: int) -> None:
        """Gives `model` the adapters of the job, or none."""
        model.lynx = None
        if load.lynx is None:
            return
        model.take(LynxPlan.of(model.plan, load.lynx.kind))
        face = None
        if load.lynx.ref:
            plan = FacePlan(precision=model.plan.precision)
            executor = self._faces[plan]
            executor.start(scratch)
            observed = self._observe(executor) if self._observe else executor
            face = Model(self._config, plan, observed, self._host)
        model.lynx = LynxModel(load.lynx, face)

    def _segments(self, plan: Plan, names: Sequence[str], progress: Progress) -> dict[str, Segment]:
        chosen, recipes = self._chosen(plan, names, progress)
        return open_segments(chosen, self._config, plan, self._gpu, recipes, progress)

    def _chosen(
        self, plan: Plan, names: Sequence[str], progress: Progress
    ) -> tuple[dict[str, Candidate], dict[Engine, Recipe]]:
        return chosen_with_recipes(self._config, plan, self._machine, self._settings, progress, names)

    def _residency(
        self,
        plan: Plan,
        load: Load,
        context: ContextPlan | None,
        scratch: int,
        tile: VaeTile | None = None,
    ) -> Residency:
        """Keeps a larger arena and scratch of an earlier job, unless a block must stream for them."""
        arena = activation_bytes(self._config, plan, load, context, tile)
        contracts = networks_for(self._config, plan, load)
        spare = passing_bytes(contracts, BETWEEN_WINDOWS) if load.travels else 0
        if load.lynx is not None:
            spare = max(spare, lynx_bytes(self._config, plan, load.lynx))

        def planned(arena: int, scratch: int) -> Residency:
            keep = self._settings.keep_encoders
            return plan_residency(
                self._config, contracts, arena, scratch, self._budget, keep, spare, tile is not None
            )

        least = planned(arena, scratch)
        held = max(arena, self._gpu.arena.size), max(scratch, self._scratch[1] if self._scratch else 0)
        if held == (arena, scratch) or least.streamed:
            return least
        kept = planned(*held)
        return least if kept.streamed else kept

    def _take_scratch(self, size: int) -> int:
        if self._scratch is None or self._scratch[1] != size:
            if self._scratch is not None:
                self._scratch[0].close(self._gpu.stream)
                self._scratch = None
            self._scratch = self._gpu.allocate(size), size
        return int(self._scratch[0].handle)


def _with_parts(packs: Sequence[Pack], pipeline: VaePipeline, encodes: bool) -> list[Pack]:
    """A rank's own layers in place of the decoder. With `encodes` also those of the encoder, which is run
    whole for some pictures.
    """
    made: list[Pack] = []
    for pack in packs:
        decodes = (name := pack.network.name) in DECODERS
        made += () if decodes else (pack,)
        if decodes or (encodes and name in VAE):
            made.append(Pack.of(pipeline.networks[part_name(name)], pack.n))
    return made


def camera_of(plan: Plan, load: Load) -> CameraPlan | None:
    return CameraPlan.beside(plan, load.camera_ffn) if load.camera_ffn else None


def networks_for(config: ModelConfig, plan: Plan, load: Load) -> dict[str, Network]:
    """The networks whose weights a job needs: all of the model, and Uni3C's for one with a camera."""
    camera = camera_of(plan, load)
    return {**networks(config, plan), **({} if camera is None else networks(config, camera))}


def _would_fit(short: MemoryShort, command: tuple[str, ...]) -> MemoryShort:
    text = f"{short.hint} Or have the VAE compute in two tiles, with which it fits; export their graphs once:"
    return MemoryShort(short.message, with_commands(text, shell_command(command)), command)


def build_engines(
    config: ModelConfig,
    plan: Plan,
    gpu: Gpu,
    flavour: Flavour,
    settings: Settings,
    progress: Progress,
    without: Collection[str] = (),
) -> None:
    """Builds the engines that `GpuSizes` would choose at that shape for all networks but `without`, and
    finishes their kernels.
    """
    machine = machine_of(gpu, flavour)
    names = [name for name in network_names(config, plan, settings.tier) if name not in without]
    chosen, recipes = chosen_with_recipes(config, plan, machine, settings, silent, names)
    engines = [row.engine for row in chosen.values() if row.engine is not None]
    finish_engines(gpu, [recipes[engine] for engine in engines], progress)


def chosen_candidates(
    config: ModelConfig, plan: Plan, gpu: Gpu, flavour: Flavour, settings: Settings
) -> dict[str, str]:
    """The names of the candidates that `GpuSizes` would choose at that shape, by network."""
    machine = machine_of(gpu, flavour)
    chosen = choose_segments(config, plan, machine, recipes_here(config, plan, machine), settings, silent)
    return {network: candidate.name for network, candidate in chosen.items()}


def require_tier(tier: Tier, precision: Precision, capability: Capability) -> None:
    """Raises UsageError for a tier that the precision or the GPU has not."""
    if tier not in tiers(precision):
        raise UsageError(f"The tier {tier} needs FP8; the precision is {precision}.", "Use --tier exact.")
    if tier == "turbo" and (sentence := missing(SPARSE, capability)) is not None:
        raise UsageError(f"The tier turbo: {sentence.partition(':')[0].rstrip('.')}.", "Use --tier fast.")


def network_names(config: ModelConfig, plan: Plan, tier: Tier) -> tuple[str, ...]:
    """The networks that every job of a tier runs."""
    rows = networks(config, plan).items()
    own = {SPARSE.network} if tier == SPARSE.tier else set()
    return tuple(name for name, row in rows if not row.optional or name in own)


def chosen_with_recipes(
    config: ModelConfig,
    plan: Plan,
    machine: Machine,
    settings: Settings,
    progress: Progress,
    names: Sequence[str],
) -> tuple[dict[str, Candidate], dict[Engine, Recipe]]:
    """The candidates of the networks `names`, and the recipes of engines at the shape `plan`. A rank's share
    has the candidates that were chosen for the whole.
    """
    whole = plan.undivided
    recipes = recipes_here(config, whole, machine)
    chosen = choose_segments(config, whole, machine, recipes, settings, progress, names)
    return chosen, recipes if whole == plan else recipes_here(config, plan, machine)


def choose_segments(
    config: ModelConfig,
    plan: Plan,
    machine: Machine,
    recipes: Mapping[Engine, Recipe],
    settings: Settings,
    progress: Progress,
    names: Sequence[str] | None = None,
) -> dict[str, Candidate]:
    """The candidate for the networks `names`, by default those of every job. Reports the choice and its
    reason where there are several.
    """
    require_tier(settings.tier, plan.precision, machine.capability)
    chosen, unmeasured = {}, 0
    for network in network_names(config, plan, settings.tier) if names is None else names:
        rows = candidates(network, plan.precision, machine)
        graph = recipes[Engine(network)].engine.source
        choice = choose(
            network,
            plan.precision,
            settings.tier,
            machine,
            read_figures(place_of(graph, machine)),
            lambda row: missing(row, machine.capability),
            settings.segments.get(network),
        )
        if len(rows) > 1:
            data = {"network": network, "candidate": choice.candidate.name}
            progress(Note(choice.text, "candidate", data))
        chosen[network] = choice.candidate
        unmeasured += choice.unmeasured and len(rows) > 1
    if unmeasured:
        text = f"{unmeasured} parts run by default, not by measurement. Measure them once:"
        command = plan.build_command(config.name)
        progress(Note(with_commands(text, shell_command(command)), "unmeasured", {"parts": unmeasured}))
    return chosen
