"""`trt-wan bench vae`: what is timed, and its rows as they come. One test runs the command on the CPU."""

import json
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from trt_wan.benchmarks.measure import quality, vae
from trt_wan.benchmarks.measure.budget import Budget
from trt_wan.benchmarks.measure.processes import rows_of
from trt_wan.benchmarks.measure.vae_job import halves
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.cli.main import cli
from trt_wan.engines.choice.candidates import VAE
from trt_wan.errors import TrtWanError, UsageError
from trt_wan.runtime.events import Note
from trt_wan.runtime.executors import Array
from trt_wan.runtime.weights.tiny import write_tiny_weights

SHAPE = Shape("tiny", 64, 48, 13)


class FakeModel:
    """As decode and encode use a model. Counts the pieces of a decoded clip that the host has at a time."""

    tile = vae_pipeline = None
    ranks = SimpleNamespace(rank=0)
    plan = SimpleNamespace(vae_chunk=1)
    networks = dict.fromkeys((*VAE, "attention", "ffn"))

    def __init__(self) -> None:
        self.did: list[str] = []
        self.most: list[int] = []  # by clip

    def release(self, *names: str) -> None:
        self.did.append(f"release {' '.join(sorted(names))}")

    def run(self, name: str, *inputs: Array) -> tuple[Array, ...]:
        self.did.append(name)
        return np.zeros((3, 1, 2, 2), np.float32), np.zeros(1, np.float32)

    def fetched(self, arrays: Iterator[Array]) -> Iterator[Array]:
        fetched: list[Any] = []
        self.most.append(0)
        for array in arrays:
            copied = np.array(array)
            fetched.append(weakref.ref(copied))
            yield copied
            del copied
            self.most[-1] = max(self.most[-1], sum(each() is not None for each in fetched))


def test_the_vae_is_timed_without_the_loading_of_others_and_without_keeping_frames() -> None:
    """Beside the loader of the transformer, and with a window's frames kept, decode took three times as long
    as in a job.
    """
    model: Any = FakeModel()
    executor: Any = SimpleNamespace(start_watching=lambda: None, watched=lambda: {"decode": [0.25, 0.5]})
    latents, signal = np.zeros((16, 4, 2, 2), np.float32), np.zeros((3, 13, 16, 16), np.float32)
    results, times = halves(model, executor, latents, signal, repeats=2)
    assert model.did[0] == "release attention ffn" and model.did[1] == "vae_decode_first"
    assert results["decoded"].shape[1] == results["encoded"].shape[1] == 4
    kept, *taken = model.most
    assert kept == 4 and taken == [1, 1, 1], "results are kept once, then a first run and two that are timed"
    assert len(times["decode"]["seconds"]) == 2 and times["encode"]["networks"] == [0.75, 0.75]


def answer(name: str, off: float, target: str) -> dict[str, Any]:
    ones = np.ones(4, np.float32)
    np.savez(target, decoded=ones + off, encoded=ones)
    times = {"seconds": [3.0, 1.0, 2.0]}
    return {"name": name, "target": target, "decode": times, "encode": times, "files": {"vae": "v"}}


def ours(refused: str = "") -> Any:
    """A child as `measure_vae` starts it."""

    class Ours:
        def __init__(self, module: str, arguments: list[str], env: Any, patience: float) -> None:
            self.target = arguments[2]

        def __enter__(self) -> Any:
            if refused:
                raise TrtWanError(refused)
            return SimpleNamespace(read=lambda: answer("ours", 0.02, self.target))

        def __exit__(self, *error: object) -> None:
            pass

    return Ours


def test_rows_are_told_and_kept_before_diffusers_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[vae.VaeTimes] = []
    told: list[str] = []

    def progress(event: Any) -> None:
        told.append(event.text)

    def peers(*arguments: Any) -> Any:
        yield answer("diffusers float32", 0.0, str(tmp_path / "exact.npz"))
        assert [len(unfinished.rows) for unfinished in kept] == [1, 2]
        assert told[-1] == "ours: decode off by 2.00e-02 (PSNR 46.0 dB), encode by 0.00e+00"
        yield answer("diffusers compiled", 0.5, str(tmp_path / "compiled.npz"))

    monkeypatch.setattr(vae, "Child", ours())
    monkeypatch.setattr(vae, "rows_of", peers)
    wanted = [quality.Wanted("ours", {})]
    made = vae.measure_vae(SHAPE, wanted, "weights", progress=progress, keep=kept.append)
    assert made.finished and not any(unfinished.finished for unfinished in kept)
    assert [row.name for row in made.rows] == ["ours", "diffusers float32", "diffusers compiled"]
    assert made.rows[0].decode == 2.0 and made.rows[0].psnr == pytest.approx(
        20 * np.log10(2 / 0.01), abs=0.01
    )
    assert made.rows[0].runs["decode"]["seconds"] == [3.0, 1.0, 2.0]
    assert kept[0].rows[0].psnr is None and kept[1].rows == made.rows[:2]
    assert told[-1].startswith("diffusers compiled: decode off by 5.00e-01")
    assert "ours: decode 2.000 s, encode 2.000 s" in told


def test_a_row_of_ours_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "Child", ours("It cannot be."))
    with pytest.raises(TrtWanError, match="It cannot be"):
        vae.measure_vae(SHAPE, [quality.Wanted("ours", {})], "weights")
    with pytest.raises(UsageError, match="Nothing was measured: the budget of 0 s was over"):
        vae.measure_vae(SHAPE, [quality.Wanted("ours", {})], "weights", budget=1e-9)


def test_several_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="on one GPU"):
        vae.measure_vae(SHAPE, [quality.Wanted("two", {"gpus": 2})], "weights")


def test_rows_that_the_budget_ends_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = [
        {"event": "rows", "names": ["float32", "bf16", "compiled", "last"]},
        {"event": "row", "name": "float32"},
        {"event": "row", "name": "bf16", "reason": "no GPU"},
    ]
    code = "".join(f"print({json.dumps(line)!r}, flush=True)\n" for line in lines)
    (tmp_path / "a_peer.py").write_text(f"import time\n{code}time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    not_measured, told = list[str](), list[str]()

    def progress(event: Any) -> None:
        assert isinstance(event, Note)
        told.append(event.text)

    now = [0.0]
    budget = Budget(300, clock=lambda: now[0])
    rows = rows_of("a_peer", [], dict(os.environ), not_measured, progress, budget)
    assert next(rows)["name"] == "float32"
    now[0] = 301.0  # a second of patience is left
    began = time.monotonic()
    assert list(rows) == []
    assert time.monotonic() - began < 40
    assert not_measured == [
        "bf16: no GPU",
        "compiled: the budget of 300 s was over",
        "last: the budget of 300 s was over",
    ]
    assert told == [f"not measured: {text}" for text in not_measured]


@pytest.mark.long
def test_the_command(tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))
    write_tiny_weights(tmp_path / "weights", 0)
    arguments = f"--model tiny --size 64x48 --window 13 --weights {tmp_path / 'weights'} --repeats 2"
    command = ["bench", "vae", *arguments.split(), "--budget", "500", "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(cli, command)
    assert ran.exit_code == 0, ran.stderr
    document = json.loads((tmp_path / "out" / "vae.json").read_text())
    mine, exact = document["rows"]
    assert (mine["name"], exact["name"]) == ("trt-wan", "diffusers float32") and document["finished"]
    assert 0 < mine["decode_error"] < 1e-5 and 0 < mine["encode_error"] < 1e-5
    for row in document["rows"]:
        assert 0 < row["decode_networks"] <= row["decode"] and 0 < row["encode_networks"] <= row["encode"]
    assert "vae PSNR dB,trt-wan," in (tmp_path / "out" / "vae.csv").read_text()
