"""Measurements on disk: one file per GPU, TensorRT and graph, apart from the engines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trt_wan.engines.store.measurements import (
    Figure,
    Place,
    figures_beside,
    read_figures,
    record_figures,
    title,
)

HERE = Place("H200", "tensorrt_rtx 1.6", "a graph")
FIGURE = Figure("attention", "cudnn", "measured", 25.0, 0.006, 0.01, "exact", "H200", "tensorrt_rtx 1.6")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path))
    return tmp_path


def test_new_figures_replace_those_of_the_same_candidate_and_place_only(home: Path) -> None:
    elsewhere, later = replace(HERE, gpu="L40S"), replace(HERE, version="tensorrt_rtx 1.7")
    slow, other = replace(FIGURE, ms=99.0), replace(FIGURE, candidate="native", ms=3.0)
    record_figures(HERE, ["one"], {"cudnn": slow, "native": other})
    record_figures(HERE, ["two"], {"cudnn": FIGURE})
    record_figures(elsewhere, ["one"], {"cudnn": replace(FIGURE, gpu="L40S", ms=60.0)})
    assert read_figures(HERE) == {"cudnn": FIGURE, "native": other}
    assert read_figures(elsewhere)["cudnn"].ms == 60.0
    assert read_figures(later) == read_figures(replace(HERE, graph="another")) == {}
    assert len(list((home / "measurements").glob("*.json"))) == 2
    assert not list(home.rglob("*.partial"))


def test_an_engine_knows_the_figures_of_its_rivals() -> None:
    record_figures(HERE, ["one", "two"], {"cudnn": FIGURE})
    record_figures(replace(HERE, gpu="L40S"), ["two"], {"cudnn": replace(FIGURE, gpu="L40S")})
    assert [f.gpu for f in figures_beside("one")] == ["H200"]
    assert sorted(f.gpu for f in figures_beside("two")) == ["H200", "L40S"] and figures_beside("three") == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"sources": [], "figures": [{"ms": 1}]}', "[" * 100_000])
def test_a_damaged_file_holds_no_figures_and_is_replaced(text: str) -> None:
    record_figures(HERE, ["one"], {"cudnn": FIGURE})
    HERE.file.write_text(text)
    assert read_figures(HERE) == {} and figures_beside("one") == []
    record_figures(HERE, ["one"], {"cudnn": FIGURE})
    assert read_figures(HERE) == {"cudnn": FIGURE}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ms", "25"),
        ("ms", {}),
        ("error", 10**400),
        ("tolerance", [1]),
        ("tolerance", None),
        ("candidate", {}),
        ("network", 25.0),
    ],
)
def test_figures_of_other_types_do_not_count(name: str, value: object) -> None:
    record_figures(HERE, ["one"], {"cudnn": FIGURE})
    values = json.loads(HERE.file.read_text())
    values["figures"][0][name] = value
    values["sources"] = [{}, "\ud800", "one"]
    HERE.file.write_text(json.dumps(values))
    assert read_figures(HERE) == {} and figures_beside("one") == []


def test_sources_of_other_types_are_dropped_or_kept() -> None:
    record_figures(HERE, ["one"], {"cudnn": FIGURE})
    HERE.file.write_text(json.dumps(json.loads(HERE.file.read_text()) | {"sources": [{}, "\ud800", "one"]}))
    record_figures(HERE, ["two"], {"cudnn": FIGURE})
    assert json.loads(HERE.file.read_text())["sources"] == ["one", "two", "\ud800"]


def test_a_title() -> None:
    assert title(FIGURE) == "25.00 ms, error 6.0e-03 <= 1.0e-02"
    assert title(replace(FIGURE, error=0.5)) == "25.00 ms, error 5.0e-01 > 1.0e-02"
    assert title(replace(FIGURE, state="failed", ms=None, error=None, problem="No.")) == "failed: No."
