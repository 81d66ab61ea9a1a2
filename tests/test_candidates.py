"""The table of candidates, the tolerances, and the choice: without a GPU, from figures that are made up."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import trt_wan.runtime.segments.attention
import trt_wan.runtime.segments.native
from trt_wan.cli.main import cli
from trt_wan.engines.choice.candidates import (
    CANDIDATES,
    DEFAULTS,
    SEGMENTS,
    SPARSE,
    Candidate,
    Engine,
    Machine,
    candidates,
    default_order,
    tiers,
)
from trt_wan.engines.choice.choose import Choice, accurate, choose, place_of
from trt_wan.engines.choice.recipes import engines_of
from trt_wan.engines.choice.tolerances import tolerance
from trt_wan.engines.config import TINY
from trt_wan.engines.contracts import networks
from trt_wan.engines.flavour import Flavour
from trt_wan.engines.gpu import GpuKind
from trt_wan.engines.precision import PRECISIONS
from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan
from trt_wan.engines.store.engine_id import Recipe, wan_engine
from trt_wan.engines.store.engines import ensure
from trt_wan.engines.store.entries import entries, remove
from trt_wan.engines.store.measurements import Figure, read_figures, record_figures
from trt_wan.errors import GraphError, UsageError
from trt_wan.runtime.events import Event, Note
from trt_wan.runtime.opening import gpu_sizes as open_model
from trt_wan.runtime.opening import segments as open_segments
from trt_wan.runtime.settings import Settings

RTX = Flavour("tensorrt_rtx", "1.6.1.120", SimpleNamespace(), "a test")
FULL = Flavour("tensorrt", "10.14.0", SimpleNamespace(), "a test")
H200 = Machine(GpuKind("NVIDIA H200", 13), (9, 0), RTX)
ADA = Machine(GpuKind("NVIDIA L40S", 13), (8, 9), RTX)
A100 = Machine(GpuKind("NVIDIA A100", 13), (8, 0), FULL)
PLAN = Plan(64, 48, 5, "fp8")

Absent = Mapping[str, str]


def absent(sentences: Absent) -> Callable[[Candidate], str | None]:
    return lambda candidate: sentences.get(candidate.name)


NO_LIBRARIES = {name: f"{name} is not installed." for name in ("flash4", "cudnn", "cudnn fp8")}


def figure(name: str, ms: float, error: float, network: str = "attention", machine: Machine = H200) -> Figure:
    row = next(row for row in CANDIDATES if (row.network, row.name) == (network, name))
    largest = tolerance(network, "fp8", row.tier)
    here = (machine.gpu.name, machine.version)
    return Figure(network, name, "measured", ms, error, largest, row.tier, *here)


MEASURED = {
    f.candidate: f
    for f in (
        figure("tensorrt sm89", 77.6, 6.4e-3),
        figure("cudnn", 38.5, 3.1e-3),
        figure("flash4", 20.0, 2.3e-3),
        figure("tensorrt fp8", 26.4, 6.1e-2),
        figure("tensorrt", 90.0, 6.4e-3),
        figure("cudnn fp8", 22.0, 9e-2),
        figure("native", 80.0, 3e-3),
        figure("native int8", 81.0, 3e-2),
        figure("native fp8", 82.0, 4e-2),
    )
}
OWN = dict.fromkeys(("native", "native int8", "native fp8"), "It is gone.")


def chosen(
    tier: Any = "exact",
    figures: Mapping[str, Figure] = MEASURED,
    machine: Machine = H200,
    missing: Absent = {},  # noqa: B006  (read only)
    network: str = "attention",
    precision: Any = "fp8",
    asked: str | None = None,
) -> Choice:
    return choose(network, precision, tier, machine, figures, absent(missing), asked)


# --- the tables ------------------------------------------------------------------------------------------


def test_the_tables_name_what_there_is() -> None:
    assert len({(row.network, row.name) for row in CANDIDATES}) == len(CANDIDATES)
    beside = networks(TINY, CameraPlan.beside(PLAN, TINY.camera.ffn_dim))
    assert set(SEGMENTS) <= {*networks(TINY, PLAN), *beside} and {row.network for row in DEFAULTS} == set(
        SEGMENTS
    )
    for default in DEFAULTS:
        rows = {row.name: row for row in CANDIDATES if row.network == default.network}
        assert set(default.exact) <= set(default.fast) <= set(rows)
        assert all(rows[name].tier == "exact" for name in default.exact)
    libraries = {row.name for row in CANDIDATES if row.maker == "attention"}
    assert libraries == set(trt_wan.runtime.segments.attention.PROVIDERS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("machine", [H200, ADA, A100, replace(H200, flavour=FULL)])
def test_every_machine_has_a_default_without_any_library(machine: Machine, precision: Any) -> None:
    natives = {"native": "no", "native fp8": "no"}
    plan = replace(PLAN, precision=precision)
    for network in (*networks(TINY, plan), *networks(TINY, CameraPlan.beside(plan, 192))):
        for tier in tiers(precision):
            if network == SPARSE.network:  # refused for the tier as a whole
                continue
            choice = chosen(tier, {}, machine, NO_LIBRARIES | natives, network, precision)
            assert choice.candidate.maker == "engine" and choice.candidate.network == network
            assert choice.candidate in candidates(network, precision, machine)


def test_rows_fit_precision_flavour_and_gpu() -> None:
    def names(network: str, precision: Any, machine: Machine) -> set[str]:
        return {row.name for row in candidates(network, precision, machine)}

    assert names("attention", "fp32", ADA) == {"tensorrt"}
    assert names("attention", "bf16", ADA) == {"tensorrt", "native", "cudnn", "flash4"}
    assert names("attention", "fp8", H200) == {row.name for row in CANDIDATES if row.network == "attention"}
    assert "tensorrt sm89" not in names("attn_out", "fp8", replace(H200, flavour=FULL))
    assert names("attn_in", "bf16", ADA) == {"tensorrt"}
    assert names("attn_in", "fp8", ADA) == {"tensorrt", "native"}
    assert names("attn_in", "int8", A100) == names("ffn", "int8", H200) == {"tensorrt", "native int8"}
    assert names("context_kv", "int8", A100) == {"tensorrt"}
    assert names("vae_decode_next", "fp32", H200) == {"tensorrt"}
    assert names("vae_decode_next", "bf16", ADA) == {"tensorrt", "cudnn", "native"}
    assert default_order("vae_decode_next", "exact", (9, 0)) == ("native", "cudnn", "tensorrt")
    assert default_order("vae_decode_next", "exact", (8, 9)) == ("tensorrt",)
    (head,) = candidates("head", "fp8", H200)
    assert head.engine == Engine("head") and default_order("head", "exact", (9, 0)) == ("tensorrt",)


def test_a_machine_builds_its_own_engines_and_its_guests() -> None:
    own = (*networks(TINY, PLAN), "attention_fp8")
    assert [engine.recipe for engine in engines_of(TINY, PLAN, ADA)] == list(own)
    assert [e.title for e in engines_of(TINY, PLAN, H200)][len(own) :] == [
        "attention sm89",
    ]


@pytest.mark.parametrize("machine", [A100, ADA, H200])
@pytest.mark.parametrize("network", ["attn_in", "attn_out", "ffn"])
def test_int8_is_taken_by_measurement_or_on_request(machine: Machine, network: str) -> None:
    def int8(figures: Mapping[str, Figure], asked: str | None = None) -> str:
        return chosen("exact", figures, machine, {}, network, "int8", asked).candidate.name

    times = {"tensorrt": (20.0, 3e-3), "native int8": (12.0, 1.2e-2)}
    figures = {name: figure(name, *row, network, machine) for name, row in times.items()}
    assert (int8({}), int8(figures), int8({}, "native int8")) == ("tensorrt", "native int8", "native int8")
    unrotated = figures | {"native int8": figure("native int8", 12.0, 6e-2, network, machine)}
    assert int8(unrotated) == "tensorrt"
    assert trt_wan.runtime.segments.native.missing(network, (7, 5), "native int8") is not None


def test_tolerances() -> None:
    """Errors measured on the H200 with the tiny model are inside; SM89's wrong engines are outside."""
    measured = {
        ("attn_out", "fp8"): 2.6e-2,
        ("ffn", "fp8"): 2.9e-2,
        ("context_kv", "fp8"): 2.6e-2,
        ("attn_in", "fp8"): 2.6e-2,
        ("vae_decode_next", "bf16"): 1.4e-2,
        ("vae_encode_first", "fp8"): 1.4e-2,
        ("attention", "fp8"): 6.4e-3,
        ("motion_encoder", "fp32"): 4.1e-3,
        ("attn_out", "int8"): 1.1e-2,  # in numpy
    }
    for (network, precision), error in measured.items():
        assert 1.3 < tolerance(network, precision, "exact") / error < 1.8, network  # type: ignore[arg-type]
    assert tolerance("ffn", "fp8", "fast") < 5.8e-2
    assert all(tolerance(name, "bf16", "exact") < 8.8e-2 for name in ("attn_out", "cross_attention", "ffn"))
    assert tolerance("attention", "fp8", "exact") == 1e-2 and tolerance("attention", "fp8", "fast") == 8e-2
    for precision in PRECISIONS:
        for network in networks(TINY, PLAN):
            assert tolerance(network, precision, "exact") <= tolerance(network, precision, "fast") <= 0.1


# --- the choice ------------------------------------------------------------------------------------------


def test_the_fastest_within_the_tolerance_of_the_tier() -> None:
    assert chosen().text == "attention = cudnn (38.5 ms; tensorrt sm89 77.6 ms; error 3.1e-03 <= 1.0e-02)"
    assert chosen("fast").text == (
        "attention = tensorrt fp8 (26.4 ms; cudnn 38.5 ms; error 6.1e-02 <= 8.0e-02)"
    )
    alone = {name: f if name == "cudnn" else replace(f, error=0.5) for name, f in MEASURED.items()}
    assert chosen(figures=alone).text == "attention = cudnn (38.5 ms; error 3.1e-03 <= 1.0e-02)"


def test_what_is_not_here_any_more_is_not_chosen() -> None:
    assert chosen(missing={"cudnn": "cudnn is gone."}).candidate.name == "tensorrt sm89"
    assert chosen("fast", missing={"cudnn fp8": "no"}).candidate.name == "tensorrt fp8"


def test_8_bit_attention_is_not_exact_however_good() -> None:
    good = MEASURED | {"cudnn fp8": figure("cudnn fp8", 1.0, 1e-3)}
    assert chosen(figures=good).candidate.name == "cudnn"
    assert chosen("fast", good).candidate.name == "cudnn fp8"
    ranked = [f.candidate for f in accurate(good.values(), "fp8", "exact")]
    assert ranked == ["flash4", "cudnn", "tensorrt sm89", "native", "tensorrt"]


def test_within_noise_the_more_accurate_one_wins() -> None:
    """26.64 and 26.69 ms change places from one build to the next; 3 % do not."""
    near = {
        "tensorrt fp8": figure("tensorrt fp8", 26.64, 6.1e-2),
        "cudnn fp8": figure("cudnn fp8", 26.69, 5e-2),
    }
    assert chosen("fast", MEASURED | near).text == (
        "attention = cudnn fp8 (26.7 ms; tensorrt fp8 26.6 ms; error 5.0e-02 <= 8.0e-02, "
        "the more accurate within 3 %)"
    )
    far = near | {"cudnn fp8": figure("cudnn fp8", 26.64 * 1.031, 5e-2)}
    assert chosen("fast", MEASURED | far).candidate.name == "tensorrt fp8"


def test_a_build_that_was_stopped_while_measuring_decides_nothing() -> None:
    """The only candidate measured is the slow bf16 one: --tier fast takes its default, and says why."""
    some = {"cudnn": MEASURED["cudnn"]}
    assert chosen("fast", some).text == (
        "attention = native fp8 (default for compute capability 9.0; measuring was not finished)"
    )
    assert chosen("fast", some).unmeasured
    rest = {name: "It is gone." for name in ("tensorrt", "tensorrt sm89", "tensorrt fp8", "cudnn fp8")}
    assert chosen("fast", some, missing=rest | OWN).text.startswith("attention = cudnn (38.5 ms;")
    unbuilt = replace(MEASURED["tensorrt"], state="missing", ms=None, error=None, problem="68 GB.")
    every = MEASURED | {"tensorrt": unbuilt}  # that an engine cannot be built is known for good
    assert chosen(figures=every).text.startswith("attention = cudnn (38.5 ms;")
    installed = replace(unbuilt, candidate="cudnn fp8")  # a library that has come since is not
    assert "measuring was not finished" in chosen("fast", MEASURED | {"cudnn fp8": installed}).text


def test_a_measured_candidate_is_taken_where_every_default_is_wrong() -> None:
    figures = {
        "tensorrt": figure("tensorrt", 9.0, 0.5, "attn_in"),
        "native": figure("native", 5.0, 2e-2, "attn_in"),
    }
    assert chosen(figures=figures, network="attn_in", machine=ADA).candidate.name == "native"


def test_without_figures_the_default_says_so() -> None:
    assert chosen(figures={}, missing=OWN | {"cudnn": "cudnn is not installed."}).text == (
        "attention = tensorrt sm89 (default for compute capability 9.0; native: It is gone; "
        "cudnn: cudnn is not installed; not measured)"
    )
    assert chosen(figures={}).candidate.name == "native"
    assert chosen(figures={}).unmeasured and not chosen().unmeasured
    assert chosen(figures={}, missing=NO_LIBRARIES | OWN).candidate.name == "tensorrt sm89"
    assert chosen("fast", {}).candidate.name == "native fp8"
    assert chosen("fast", {}, missing=OWN).candidate.name == "tensorrt fp8"
    assert chosen(figures={}, network="attn_in").candidate.name == "native"
    assert chosen(figures={}, network="attn_in", missing={"native": "No."}).candidate.name == "tensorrt"
    assert chosen(figures={}, network="attn_in", precision="bf16").candidate.name == "tensorrt"
    assert chosen(figures={}, machine=ADA).candidate.name == "tensorrt"


def test_a_default_that_was_found_wrong_is_passed_over() -> None:
    sm89 = figure("tensorrt sm89", 1.0, 0.5)
    broken = replace(MEASURED["cudnn"], state="broken", ms=None, error=None, problem="NaN.")
    text = chosen(figures={"tensorrt sm89": sm89, "cudnn": broken}, missing=OWN).text
    ground = "default for compute capability 9.0; native: It is gone"
    assert text.startswith(f"attention = tensorrt ({ground}; cudnn: broken: NaN.")
    assert "error 5.0e-01 > 1.0e-02" in text
    failed = {"cudnn": replace(broken, state="failed", problem="No memory.")}
    assert chosen(figures=failed, missing=OWN).text == (
        f"attention = cudnn ({ground}; measuring it failed: No memory)"
    )


def test_nothing_accurate_enough_is_an_error_with_the_way_out() -> None:
    wrong = {"tensorrt": figure("tensorrt", 30.0, 9.2e-2, "attn_out")}
    with pytest.raises(GraphError, match="attn_out is within 4.0e-02 of fp32 .*9.2e-02") as caught:
        chosen(figures=wrong, network="attn_out", machine=ADA)
    assert "build --measure" in caught.value.hint and "--segment attn_out=tensorrt" in caught.value.hint


def test_what_is_asked_for() -> None:
    assert chosen(asked="flash4").text == "attention = flash4 (asked for)"  # and only then, though it is fast
    wrong = {"cudnn": figure("cudnn", 1.0, 0.5)}
    assert chosen(figures=wrong, asked="cudnn").text == "attention = cudnn (asked for)"
    for tier, asked, missing, says in (
        ("exact", "cudnn fp8", {}, "belongs to the tier fast"),
        ("fast", "cudnn fp8", {"cudnn fp8": "cudnn fp8 is not installed."}, "cudnn fp8 is not installed"),
        ("exact", "nonsense", {}, "cannot be nonsense here"),
    ):
        with pytest.raises(UsageError, match=says):
            chosen(tier, asked=asked, missing=missing)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at precision bf16") as caught:
        chosen(network="attn_in", asked="native", precision="bf16")
    assert caught.value.hint == "Use one of: tensorrt."


# --- from the store to a run -----------------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Engine, Recipe]:
    """For the H200; "compiling" gives the engine's title."""
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))

    def recipe(engine: Engine) -> Recipe:
        gpu = H200.gpu if engine.target == "current" else None
        identity = wan_engine(engine.recipe, "tiny", PLAN, engine.recipe, engine.target, RTX, gpu)
        return Recipe(identity, lambda progress: engine.title.encode())

    return {engine: recipe(engine) for engine in engines_of(TINY, PLAN, H200)}


def measure(recipes: dict[Engine, Recipe], *figures: Figure) -> None:
    """Attention's."""
    place = place_of(recipes[Engine("attention")].engine.source, H200)
    record_figures(place, [], {figure.candidate: figure for figure in figures})


def test_figures_survive_the_removal_of_every_engine(recipes: dict[Engine, Recipe]) -> None:
    place = place_of(recipes[Engine("attention")].engine.source, H200)
    assert read_figures(place) == {}
    measure(recipes, *MEASURED.values())
    ensure(recipes[Engine("attention")].engine, lambda: b"a plan")
    assert [remove(entry.key) for entry in entries()] == [True] and not entries()
    assert read_figures(place) == MEASURED
    assert read_figures(place_of(place.graph, ADA)) == {}


def segments_of(
    recipes: dict[Engine, Recipe], settings: Settings, plan: Plan = PLAN
) -> tuple[dict[str, Candidate], list[str]]:
    events: list[Event] = []
    found = open_model.choose_segments(TINY, plan, H200, recipes, settings, events.append)
    assert all(isinstance(event, Note) for event in events)
    return found, [event.text for event in events if isinstance(event, Note)]


def test_a_run_takes_what_was_measured_and_says_why(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_model, "missing", lambda candidate, capability: None)
    measure(recipes, *MEASURED.values())
    found, notes = segments_of(recipes, Settings())
    assert list(found) == [name for name, row in networks(TINY, PLAN).items() if not row.optional]
    assert (
        len(notes) == len(SEGMENTS) - 1
    )  # one has no choice, one is Uni3C's; and a note that some were not measured
    told, command = notes[-1].splitlines()
    assert told == "9 parts run by default, not by measurement. Measure them once:", "all but attention"
    assert command == "trt-wan build --model tiny --size 64x48 --window 5 --precision fp8"
    assert found["attention"].name == "cudnn" and found["head"].engine == Engine("head")
    assert any(note.startswith("attention = cudnn (38.5 ms;") for note in notes)
    asked = Settings(tier="fast", segments={"attention": "cudnn fp8", "attn_out": "native"})
    found, notes = segments_of(recipes, asked)
    assert found["attention"].name == "cudnn fp8" and found["attn_out"].maker == "native"
    assert "attention = cudnn fp8 (asked for)" in notes
    tier: Any
    for tier in ("fast", "turbo"):
        with pytest.raises(UsageError, match=f"{tier} needs FP8; the precision is bf16"):
            segments_of(recipes, Settings(tier=tier), replace(PLAN, precision="bf16"))


def test_turbo_takes_what_fast_takes_and_one_network_more(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(open_model, "missing", lambda candidate, capability: None)
        measure(recipes, *MEASURED.values())
        (fast, _), (turbo, _) = (
            segments_of(recipes, Settings(tier=tier))
            for tier in ("fast", "turbo")  # type: ignore[arg-type]
        )
    assert turbo == fast | {"sparse_attention": SPARSE}
    for capability in ((8, 9), (12, 0)):
        with pytest.raises(UsageError, match="turbo: native sparse needs .* capability 9.0 and") as refused:
            open_model.require_tier("turbo", "fp8", capability)
        assert refused.value.hint == "Use --tier fast."
        open_model.require_tier("fast", "fp8", capability)
    open_model.require_tier("turbo", "fp8", (9, 0))


def test_engines_made_ahead_are_those_of_a_job(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the candidates of the settings, and no others."""
    made: list[list[Recipe]] = []
    monkeypatch.setattr(open_model, "missing", lambda candidate, capability: None)
    monkeypatch.setattr(open_model, "recipes_here", lambda config, plan, machine: recipes)
    monkeypatch.setattr(open_model, "finish_engines", lambda gpu, wanted, progress: made.append([*wanted]))
    measure(recipes, *MEASURED.values())
    gpu: Any = SimpleNamespace(name=H200.gpu.name, driver=13, capability=(9, 0))
    for settings in (Settings(), Settings(segments={"attention": "tensorrt"})):
        open_model.build_engines(TINY, PLAN, gpu, RTX, settings, lambda event: None)
        chosen, _ = segments_of(recipes, settings)
        assert made.pop() == [recipes[row.engine] for row in chosen.values() if row.engine is not None]
    # A GPU's share has the candidates of the whole. Where it is made, the whole has none of its networks.
    share, settings = ShardPlan.of(PLAN, 2), Settings(segments={"attention": "tensorrt"})
    for plan, without in ((share, ()), (PLAN, networks(TINY, share)), (PLAN, ())):
        open_model.build_engines(TINY, plan, gpu, RTX, settings, lambda event: None, without)
    own, rest, whole = made
    assert own and rest and not {id(one) for one in own} & {id(one) for one in rest}
    assert sorted(map(id, [*own, *rest])) == sorted(map(id, whole))
    with pytest.raises(UsageError, match="fast needs FP8"):
        open_model.build_engines(
            TINY, replace(PLAN, precision="bf16"), gpu, RTX, Settings(tier="fast"), lambda event: None
        )


def test_only_what_is_chosen_is_opened_and_the_engines_together(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def engines(gpu: Any, wanted: dict[str, Recipe], progress: Any) -> Any:
        opened.append(wanted)
        return {name: f"engine {name}" for name in wanted}

    def library(name: str, gpu: Any, heads: int, tokens: int, head_dim: int) -> str:
        return f"{name} {heads} {tokens} {head_dim}"

    def native(network: Any, config: Any, plan: Plan, gpu: Any, name: str) -> str:
        assert (network, config, plan) == (networks(TINY, PLAN)[network.name], TINY, PLAN)
        return f"{name} {network.name}"

    monkeypatch.setattr(open_segments, "open_engines", engines)
    monkeypatch.setattr(trt_wan.runtime.segments.attention, "open_attention", library)
    monkeypatch.setattr(trt_wan.runtime.segments.native, "open_native", native)
    rows = {(row.network, row.name): row for row in CANDIDATES}
    (head,) = candidates("head", "fp8", H200)
    places = {
        "head": head,
        "attn_in": rows["attn_in", "native"],
        "attention": rows["attention", "cudnn"],
        "attn_out": rows["attn_out", "tensorrt"],
        "vae_decode_next": rows["vae_decode_next", "cudnn"],
    }
    events: list[Event] = []
    gpu: Any = SimpleNamespace()
    found = open_segments.open_segments(places, TINY, PLAN, gpu, recipes, events.append)
    assert found == {
        "head": "engine head",
        "attn_in": "native attn_in",
        "attention": f"cudnn 2 {PLAN.tokens} 128",
        "attn_out": "engine attn_out",
        "vae_decode_next": "cudnn vae_decode_next",
    }
    assert opened == [{"head": recipes[Engine("head")], "attn_out": recipes[Engine("attn_out")]}]


def test_nag_is_opened_for_the_first_job_that_has_it(
    recipes: dict[Engine, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[list[str]] = []
    monkeypatch.setattr(open_model, "missing", lambda candidate, capability: None)
    monkeypatch.setattr(open_model, "recipes_here", lambda config, plan, machine: recipes)
    monkeypatch.setattr(
        open_model,
        "open_segments",
        lambda chosen, *_: opened.append(list(chosen)) or {name: f"engine {name}" for name in chosen},
    )
    sizes: Any = object.__new__(open_model.GpuSizes)
    sizes._gpu = sizes.weights = sizes._observe = None
    sizes._config, sizes._machine, sizes._settings, sizes._host = TINY, H200, Settings(), {}
    sizes._executors, sizes._models = {}, {}
    sizes._open(PLAN, lambda event: None)
    segments = sizes._executors[PLAN].segments
    assert "cross_attention" in segments and "cross_attention_nag" not in segments
    for _ in range(2):
        sizes._open_more(PLAN, PLAN, (open_model.NAG,), lambda event: None)
    assert segments["cross_attention_nag"] == "engine cross_attention_nag"
    assert opened == [[name for name in networks(TINY, PLAN) if name in opened[0]], ["cross_attention_nag"]]
    assert "sparse_attention" not in segments and sizes._models[PLAN].keep is None
    sizes._settings = Settings(tier="turbo", attention_keep=0.3)
    sizes._open(PLAN, lambda event: None)
    assert opened[-1] == [name for name in networks(TINY, PLAN) if name != "cross_attention_nag"]
    assert sizes._models[PLAN].keep == 0.3


def test_what_is_missing_is_asked_of_who_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trt_wan.runtime.segments.attention, "missing", lambda name, capability: f"{name} {capability}"
    )
    monkeypatch.setattr(
        trt_wan.runtime.segments.native, "missing", lambda network, *rest: f"{network} {rest}"
    )
    found = {(row.network, row.name): open_segments.missing(row, (9, 0)) for row in CANDIDATES}
    assert (
        found["attention", "cudnn fp8"] == "cudnn fp8 (9, 0)"
        and found["ffn", "native"] == "ffn ((9, 0), 'native')"
    )
    assert found["vae_decode_next", "cudnn"] == "vae_decode_next ((9, 0), 'cudnn')"
    assert found["attention", "tensorrt"] is found["attention", "tensorrt sm89"] is None


@pytest.mark.parametrize(
    ("value", "says", "names"),
    [
        (
            "attn=cudnn",
            "network called 'attn'",
            "attn_in, attention, sparse_attention, attn_out, cross_attention, ffn",
        ),
        ("attention=cuddn", "no candidate called 'cuddn'", "tensorrt, tensorrt sm89, native, cudnn, flash4"),
        ("attention", "'attention' is not NETWORK=CANDIDATE", "run --help"),
    ],
)
def test_the_override_refuses_bad_names(tmp_path: Path, value: str, says: str, names: str) -> None:
    for name in ("src_ref.png", "src_pose.mp4"):
        (tmp_path / name).touch()
    command = ["run", "--inputs", str(tmp_path), "-o", "x.mp4", "--random-weights", "tiny", "--json"]
    result = CliRunner().invoke(cli, [*command, "--segment", value])
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert result.exit_code == 2 and says in error["message"] and names in error["hint"]


def test_the_override_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import trt_wan.cli.run

    seen: list[Any] = []
    monkeypatch.setattr(
        trt_wan.cli.run, "render_prepared", lambda *given, **_: seen.extend(given) or (None, {})
    )
    options = ["--segment", "attention=cudnn fp8", "--segment", "attn_in=native"]
    result = CliRunner().invoke(cli, ["run", "--inputs", str(tmp_path), "-o", "x.mp4", *options])
    assert result.exit_code == 0, result.output
    assert seen[3].settings().segments == {"attention": "cudnn fp8", "attn_in": "native"}
    assert "--segment NETWORK=CANDIDATE" in CliRunner().invoke(cli, ["run", "--help"]).output
