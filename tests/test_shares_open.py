"""A rank's share of a job on a GPU: self-attention is opened for each number of heads in a group, and only
the rank's layers of the decoder are loaded. GpuSizes over a GPU that only counts.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from trt_wan.engines.choice.candidates import VAE
from trt_wan.engines.config import ANIMATE_14B
from trt_wan.engines.contract import Network
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan, ShardPlan
from trt_wan.runtime.executors import Array
from trt_wan.runtime.job import Load
from trt_wan.runtime.networks.model import Model
from trt_wan.runtime.networks.transformer import _attend
from trt_wan.runtime.opening import gpu_ranks, gpu_sizes
from trt_wan.runtime.parallel.vae_parts import part_name
from trt_wan.runtime.settings import Settings

PLAN = Plan(832, 480, 77, "fp8")
SHARE = ShardPlan.of(PLAN, 2)
DECODE = ["vae_decode_first", "vae_decode_next"]


class Segment:
    """Attention takes a byte of scratch for each head, and the others take none."""

    def __init__(self, row: Network) -> None:
        self.scratch_bytes = row.inputs[0].shape[0] if row.name.startswith("attention") else 0
        self.scratch: int | None = None

    def start(self, scratch: int) -> None:
        self.scratch = scratch


class Opened:
    """The share of a rank of two. `processors` are those of the other rank as `Ranks.least` gets them."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *,
        engine: object = None,
        attention: str = "cudnn fp8",
        processors: int = 132,
        tier: Any = "fast",
    ) -> None:
        self.loaded: list[list[str]] = []  # by call, the names of the packs
        self.opened: list[str] = []
        self.ran: list[str] = []
        self.processors = processors
        self.ranks: Any = SimpleNamespace(rank=0, count=2, least=self._least)
        choice = SimpleNamespace(engine=engine, maker="attention", name=attention)
        patch.setattr(gpu_sizes, "recipes_here", lambda *_: {})
        patch.setattr(gpu_sizes, "choose_segments", lambda *given: dict.fromkeys(given[-1], choice))
        patch.setattr(gpu_sizes, "open_segments", self._open)
        patch.setattr(gpu_ranks, "PeerSequence", SimpleNamespace(open=self._open_peers))
        patch.setattr(gpu_ranks, "open_pipeline", self._open_pipeline)
        sizes: Any = object.__new__(gpu_sizes.GpuSizes)
        sizes._gpu = SimpleNamespace(
            arena=SimpleNamespace(size=0),
            reserve=lambda size: None,
            allocate=lambda size: SimpleNamespace(handle=7),
            multiprocessors=132,
        )
        sizes.weights = SimpleNamespace(plan=lambda *_: None, prefetch=self._prefetch)
        sizes._machine = sizes._scratch = None
        sizes._ranks = gpu_ranks.GpuRanks(sizes._gpu, sizes.weights)
        sizes._observe = lambda executor: SimpleNamespace(run=self._run)
        sizes._config, sizes._host, sizes._total, sizes._slots = ANIMATE_14B, {}, 1 << 40, 0
        sizes._settings = Settings(tier=tier)
        sizes._executors, sizes._models = {}, {}
        self.sizes = sizes

    def begin(self) -> Model:
        model: Model = self.sizes.begin(PLAN, Load(4), None, (), lambda event: None, self.ranks, SHARE)
        return model

    @property
    def segments(self) -> dict[str, Segment]:
        segments: dict[str, Segment] = self.sizes._executors[SHARE].segments
        return segments

    def _open(self, chosen: Any, config: Any, plan: Plan, *rest: Any) -> dict[str, Segment]:
        rows = rest[3] if len(rest) > 3 else networks(config, plan)
        self.opened += chosen
        return {name: Segment(rows[name]) for name in chosen}

    def _least(self, value: int) -> int:
        """Of processors. The other rank has as much memory."""
        return self.processors if value == 132 else value

    def _open_peers(self, gpu: Any, ranks: Any, shards: Any, *_: Any) -> Any:
        return SimpleNamespace(shards=shards, memory=SimpleNamespace(size=0))

    def _open_pipeline(self, gpu: Any, segments: Any, contracts: Any, *_: Any) -> Any:
        parts = {part_name(name): replace(contracts[name], name=part_name(name)) for name in VAE}
        return SimpleNamespace(networks=parts, segments={}, nbytes=0)

    def _prefetch(self, packs: Any, room: int) -> None:
        self.loaded.append([pack.network.name for pack in packs])

    def _run(self, network: Network, n: int, inputs: Any) -> tuple[Array]:
        self.ran.append(network.name)
        return (inputs["q"],)


def test_attention_is_opened_by_the_heads_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch)
    model = opened.begin()
    assert {name for name in opened.segments if name.startswith("attention")} == {
        "attention of 1 heads",
        "attention of 18 heads",
    }
    assert opened.sizes._scratch == (SimpleNamespace(handle=7), 18)
    assert {segment.scratch for segment in opened.segments.values()} == {7}
    before = list(opened.opened)
    assert opened.begin() is model and opened.opened == before, "nothing is opened again"
    attend = partial(_attend, model, "attention", ())
    for heads in (1, 18):
        given: Any = [SimpleNamespace(shape=(heads, PLAN.tokens, 128))] * 3
        assert attend(*given) is given[0]
    assert opened.ran == ["attention of 1 heads", "attention of 18 heads"]


@pytest.mark.parametrize(
    ("attention", "groups"), [("native", (1, 18, 1)), ("native int8", (1, 18, 1)), ("native fp8", (10, 10))]
)
def test_our_attention_leaves_the_own_tokens_where_they_are(
    monkeypatch: pytest.MonkeyPatch, attention: str, groups: tuple[int, ...]
) -> None:
    """In groups of heads that its tiles fill."""
    opened = Opened(monkeypatch, attention=attention)
    model = opened.begin()
    names = [f"attention of {heads} heads to rows" for heads in groups]
    assert {name for name in opened.segments if name.startswith("attention")} == set(names)
    attend = partial(_attend, model, "attention", ())
    for heads in groups:
        given: Any = [SimpleNamespace(shape=(heads, PLAN.tokens, 128))] * 3
        own: Any = [SimpleNamespace(shape=(heads, PLAN.tokens // 2, 128))] * 3
        assert attend(*given, *own, SimpleNamespace(shape=(7,))) is given[0]
    assert opened.ran == names


@pytest.mark.parametrize("given", [{"engine": "attention"}, {"processors": 0}])
def test_all_ranks_attend_in_one_group_where_one_has_an_engine(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    opened = Opened(monkeypatch, **given)
    opened.begin()
    assert {name for name in opened.segments if name.startswith("attention")} == {"attention"}


def test_turbo_attends_in_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch, attention="native", tier="turbo")
    model = opened.begin()
    sparse = model.networks["sparse_attention of 18 heads"]
    assert [t.shape for t in sparse.inputs] == [(18, PLAN.tokens, 128)] * 3 + [(1,)]
    assert sparse.outputs[0].shape == (PLAN.tokens, 18 * 128) and not sparse.weights
    assert {name for name in opened.segments if name.startswith("sparse")} == {
        "sparse_attention of 1 heads",
        "sparse_attention of 18 heads",
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_loads_its_layers_of_the_decoder_only(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Four ranks encode together too."""
    opened = Opened(monkeypatch)
    opened.ranks.count = ranks
    opened.begin()
    first, last = opened.loaded
    encoders = {"vae_encode_first", "vae_encode_next"}
    parts = {part_name(name) for name in ({*DECODE} if ranks == 2 else {*DECODE, *encoders})}
    assert {name for name in first if name.startswith("vae")} == encoders
    assert {name for name in last if name.startswith("vae")} == encoders | parts
    opened.begin()
    assert opened.loaded[2] == last
