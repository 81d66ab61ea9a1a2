"""`--lora FILE[:STRENGTH]` and `Job.loras`: what is a file's name, what is a strength, what is refused."""

from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

from trt_wan.cli.run import _loras, run
from trt_wan.errors import UsageError
from trt_wan.runtime.job import Inputs, Job, Lora

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), None)


def parsed(*values: str) -> tuple[Lora, ...]:
    option = next(param for param in run.params if param.name == "loras")
    return _loras(click.Context(run), option, values)


@pytest.mark.parametrize(
    ("name", "given", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors", "a.safetensors:0.8", 0.8),
        ("a.safetensors", "a.safetensors:-1e-1", -0.1),
        ("a.safetensors", "a.safetensors:0", 0.0),
        ("ratio 16:9", "ratio 16:9", 1.0),
        ("ratio 16:9", "ratio 16:9:0.5", 0.5),
        ("C:x.safetensors", "C:x.safetensors", 1.0),
        ("C:x.safetensors", "C:x.safetensors:2", 2.0),
    ],
)
def test_a_strength_stands_behind_the_last_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str, strength: float
) -> None:
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert parsed(given, given) == (Lora(Path(name), strength),) * 2


@pytest.mark.parametrize("given", ["a:nan", "a:inf", "a:101", "a:-1e9", "a:", "a:strong", "b", "b:1", ":1"])
def test_what_is_no_file_and_no_strength_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "a").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter):
        parsed(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a:nan", "A LoRA strength of nan is not possible: it is a number from -100 to 100, mostly 1. Write"),
        ("a:1e9", "A LoRA strength of 1000000000.0 is not possible: it is a number from -100 to 100"),
        (
            "a:1:2",
            "'1:2' behind 'a' is no strength: it is one number from -100 to 100, mostly 1. Write --lora",
        ),
        ("a:strong", "'strong' behind 'a' is no strength"),
        ("b:1", "File 'b' does not exist. Write FILE or FILE:STRENGTH."),
        ("empty", "'empty' is a folder, without a LoRA in it. Name a file"),
        (
            "some:0.5",
            "'some' is a folder, with the LoRAs 0.safetensors; 1.safetensors; 2.safetensors; 1 more.",
        ),
    ],
)
def test_the_message_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, says: str
) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "some").mkdir()
    made = {f"blocks.0.self_attn.q.lora_{side}.weight": np.zeros((4, 4), np.float32) for side in "AB"}
    for k in range(4):
        save_file(made, tmp_path / "some" / f"{k}.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "some" / "-.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter) as caught:
        parsed(given)
    assert says in caught.value.message and len(caught.value.message) < 400


def test_loras_of_a_job_are_checked() -> None:
    assert Job(INPUTS, loras=[Lora("a", 1)]).loras == (Lora(Path("a"), 1.0),)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Job.loras is .* which is not a list of Loras"):
        Job(INPUTS, loras=["a.safetensors"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="A LoRA strength of nan"):
        Lora(Path("a"), float("nan"))
