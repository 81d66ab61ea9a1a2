"""An open model takes tiles for a job that does not fit otherwise, and for no other: GpuSizes over a GPU that
only counts. The command line exports their graphs.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from trt_wan.build import compile as compile_module
from trt_wan.cli.main import cli
from trt_wan.cli.missing import tile_exporter
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan, VaeTile
from trt_wan.engines.store.graphs import graph_set
from trt_wan.errors import MemoryShort
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.job import Load
from trt_wan.runtime.opening import gpu_sizes
from trt_wan.runtime.opening import model as model_module
from trt_wan.runtime.opening.activation_memory import activation_bytes
from trt_wan.runtime.opening.gpu_ranks import GpuRanks
from trt_wan.runtime.opening.residency import BLOCK, plan_residency
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.pack import Pack
from trt_wan.runtime.weights.streaming import SLOTS

PLAN, SMALLER, LOAD = Plan(512, 128, 9, "fp8"), Plan(64, 48, 5, "fp8"), Load(4)
TILE = PLAN.vae_tile
VAE = {name for name, network in networks(TINY, PLAN).items() if network.part == "vae"}
SCRATCH = 1000  # bytes of a network's segment; of the VAE's as many as the picture has pixels
assert TILE is not None


class Segment:
    def __init__(self, name: str, plan: Plan) -> None:
        self.plan, self.started = plan, 0
        self.scratch_bytes = plan.width * plan.height if name in VAE else SCRATCH

    def start(self, scratch: int) -> None:
        self.started += 1


class Opened:
    """GpuSizes with `budget` bytes."""

    def __init__(self, patch: pytest.MonkeyPatch, budget: int, export: Any = None) -> None:
        self.plans: list[Plan] = []  # whose segments were opened
        self.notes: list[Note] = []
        patch.setattr(gpu_sizes, "recipes_here", lambda config, plan, machine: plan)
        patch.setattr(gpu_sizes, "choose_segments", lambda config, plan, *_: networks(config, plan))
        patch.setattr(gpu_sizes, "open_segments", self._open)
        sizes: Any = object.__new__(gpu_sizes.GpuSizes)
        sizes._gpu = SimpleNamespace(
            arena=SimpleNamespace(size=0),
            reserve=lambda size: setattr(sizes._gpu.arena, "size", size),
            allocate=lambda size: SimpleNamespace(handle=0, close=lambda stream: None),
            stream=None,
        )
        sizes.weights = SimpleNamespace(plan=lambda *_: None, prefetch=lambda *_: None)
        sizes._observe = sizes._machine = sizes._scratch = None
        sizes._config, sizes._host, sizes._total, sizes._slots = TINY, {}, budget, 0
        sizes._ranks = GpuRanks(sizes._gpu, sizes.weights)
        sizes._settings = Settings(keep_encoders=False)
        sizes._executors, sizes._models, sizes._export_tiles = {}, {}, export
        self.sizes = sizes

    def _open(self, chosen: Any, config: Any, plan: Plan, *_: Any) -> dict[str, Segment]:
        self.plans.append(plan)
        return {name: Segment(name, plan) for name in chosen}

    def begin(self, plan: Plan = PLAN) -> Any:
        self.notes.clear()
        return self.sizes.begin(plan, LOAD, None, (), self._progress)

    def _progress(self, event: Event) -> None:
        assert isinstance(event, Note)
        self.notes.append(event)

    def told(self) -> list[str]:
        return [note.code for note in self.notes if note.code == "vae_tiles"]


def least(tile: VaeTile | None) -> int:
    """Bytes with which all blocks stream."""
    table = networks(TINY, PLAN)
    arena, scratch = activation_bytes(TINY, PLAN, LOAD, None, tile), (tile or PLAN).width * PLAN.height
    blocks = [Pack.of(table[name], n).size for name in BLOCK for n in range(TINY.transformer.layers)]
    return plan_residency(TINY, table, arena, scratch, 1 << 50).total - sum(blocks) + SLOTS * max(blocks)


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sizes, "graph_set", lambda *_: SimpleNamespace(complete=lambda: True))


def test_a_job_that_fits_is_computed_whole(monkeypatch: pytest.MonkeyPatch, with_graphs: None) -> None:
    opened = Opened(monkeypatch, least(None))
    model = opened.begin()
    assert model.tile is None and opened.plans == [PLAN] and not opened.told()
    assert opened.sizes._gpu.arena.size == activation_bytes(TINY, PLAN, LOAD)


@pytest.mark.parametrize("missing", [1, least(None) - least(TILE)])
def test_a_job_that_does_not_fit_is_computed_in_tiles(
    monkeypatch: pytest.MonkeyPatch, with_graphs: None, missing: int
) -> None:
    """And a smaller one after it whole. The whole VAE's segments get no scratch, the others the tiles'."""
    opened = Opened(monkeypatch, least(None) - missing)
    model = opened.begin()
    assert model.tile == TILE and model.plan == PLAN and opened.plans == [PLAN, TILE]
    executor = opened.sizes._executors[TILE]
    assert {name for name, segment in executor.segments.items() if segment.plan == TILE} == VAE
    assert all(segment.started == 1 for segment in executor.segments.values())
    assert not any(opened.sizes._executors[PLAN].segments[name].started for name in VAE)
    assert opened.sizes._gpu.arena.size == activation_bytes(TINY, PLAN, LOAD, None, TILE)
    assert opened.sizes._scratch[1] == TILE.width * TILE.height
    assert opened.told() == ["vae_tiles"]
    assert model.networks["vae_decode_first"].outputs[0].shape == (3, 1, TILE.height, TILE.width)

    assert opened.begin(SMALLER).tile is None and not opened.told()
    assert opened.begin() is model and opened.plans == [PLAN, TILE, SMALLER], "nothing is opened again"
    opened.sizes._total = least(None)
    assert opened.begin().tile is None


def test_less_than_tiles_need_is_refused(monkeypatch: pytest.MonkeyPatch, with_graphs: None) -> None:
    opened = Opened(monkeypatch, least(TILE) - 1)
    with pytest.raises(MemoryShort, match="even if all blocks stream and the VAE computes in tiles"):
        opened.begin()
    opened = Opened(monkeypatch, 0)
    with pytest.raises(MemoryShort, match="even if all blocks stream; "):
        opened.begin(SMALLER)  # cannot be cut


COMMAND = "trt-wan build --model tiny --size 512x128 --window 9 --precision fp8 --vae-tiles"


def test_missing_graphs_are_exported_or_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    opened = Opened(monkeypatch, least(TILE))
    with pytest.raises(MemoryShort, match="even if all blocks stream; ") as short:
        opened.begin()
    assert short.value.hint.splitlines()[-1] == COMMAND and short.value.command == tuple(COMMAND.split()[1:])
    assert "--vram" in short.value.hint and opened.plans == [PLAN]
    asked: list[Any] = []
    opened = Opened(monkeypatch, least(TILE), export=lambda tile, progress: asked.append(tile))
    assert opened.begin().tile == TILE and asked == [TILE]
    asked.clear()
    with pytest.raises(MemoryShort):
        Opened(monkeypatch, least(TILE) - SCRATCH * 100, export=lambda *_: asked.append(1)).begin()
    assert not asked, "no export where it would not help"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["build", "--model", "tiny", *arguments])


def test_the_command_line_exports_the_graphs_that_a_job_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    basis: Any = SimpleNamespace(weights=SimpleNamespace(config=TINY))
    assert tile_exporter(basis, build=False) is None
    asked: list[Any] = []
    monkeypatch.setattr(compile_module, "export_graphs", lambda *given: asked.append(given))
    opened = Opened(monkeypatch, least(TILE), tile_exporter(basis, build=True))
    assert opened.begin().tile == TILE
    assert [given[:2] for given in asked] == [(TINY, TILE)]
    assert "two tiles. Their graphs are exported first" in opened.notes[0].text


def test_a_run_hands_the_exporter_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(model_module, "GpuSizes", lambda *given: seen.append(given[-1]))
    monkeypatch.setattr(model_module, "OpenModel", lambda *_: None)
    weights = SimpleNamespace(config=TINY, host={}, source=None)
    place, files = ("gpu", "flavour"), WeightFiles(random="tiny")
    basis = model_module.Basis(weights, place, "fp8", Settings(), files)  # type: ignore[arg-type]
    export = tile_exporter(basis, build=True)
    basis.open(export_tiles=export)
    assert seen == [export] and export is not None


@pytest.mark.long
def test_graphs_and_engines_of_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    plan = Plan(160, 16, 5, "fp8")
    tile = plan.vae_tile
    assert tile is not None
    shape = ("--size", "160x16", "--window", "5", "--vae-tiles", "--target", "sm89")
    built = run(*shape)
    assert built.exit_code == 0, built.output
    assert "sm89: 4 engines" in built.output and "4 built" in built.output
    assert graph_set(TINY, tile).complete() and not graph_set(TINY, plan).folder.exists()
    assert "0 built" in run(*shape).output


def test_a_dry_build_lists_the_vae_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    told = run("--size", "512x128", "--window", "9", "--target", "sm89", "--vae-tiles", "--dry-run", "--json")
    data = json.loads(told.stdout.splitlines()[-1])["data"]
    assert {engine["name"] for engine in data["engines"]} == VAE and len(data["missing_graphs"]) == len(VAE)


def test_what_cannot_be_cut_is_refused() -> None:
    for arguments, says in (
        (("--size", "64x48", "--window", "5"), "cannot be cut"),
        (("--size", "256x64", "--window", "5", "--measure", "--target", "sm89"), "measured on the GPU"),
        (("--check",), "Leave out"),
        (("--sam2", "tiny"), "Leave out"),
    ):
        result = run(*arguments, "--vae-tiles")
        assert result.exit_code == 2 and says in " ".join(result.output.split()), result.output


def test_tiles_are_sets_of_their_own() -> None:
    """The folder of a tile's size whole is another one; a whole size keeps the name that it had."""
    assert TILE is not None
    whole = Plan(TILE.width, TILE.height, TILE.frames, TILE.precision)
    assert whole != TILE and graph_set(TINY, whole).folder != graph_set(TINY, TILE).folder
    assert repr(PLAN) == ("Plan(width=512, height=128, frames=9, precision='fp8', vae_chunk=1, face_batch=8)")
    assert replace(PLAN, precision="bf16").vae_tile == replace(TILE, precision="bf16")
