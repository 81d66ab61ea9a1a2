"""Presets: the table, the settings that win, the LoRAs found by content, and what the run says."""

import json
from pathlib import Path
from typing import Any

import click
import lora_files
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from trt_wan.cli.main import cli
from trt_wan.cli.preset import with_preset
from trt_wan.cli.report import JsonReport
from trt_wan.cli.run import RunOptions, run
from trt_wan.errors import UsageError, WeightsError
from trt_wan.runtime.job import Inputs, Job, Lora
from trt_wan.runtime.preset_loras import DISTILLED, LINEARS, find_loras, kind_of
from trt_wan.runtime.presets import OFFICIAL, PRESETS, RECIPE_FIELDS
from trt_wan.runtime.published.files import FILES

INPUTS = Inputs(Path("ref.png"), Path("pose.mp4"), None)
PREFIX = "diffusion_model."


def test_the_official_recipe_is_the_default_of_jobs() -> None:
    assert {name: getattr(Job(INPUTS), name) for name in RECIPE_FIELDS} == vars(OFFICIAL)
    assert PRESETS["quality20"].recipe == OFFICIAL


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_makes_a_job(preset: Any) -> None:
    job = preset.apply(Job(INPUTS, seed=3, steps=9, shift=2.0))
    assert {name: getattr(job, name) for name in RECIPE_FIELDS} == vars(preset.recipe) and job.seed == 3


def test_fast4() -> None:
    recipe = PRESETS["fast4"].recipe
    assert (recipe.steps, recipe.sampler, recipe.shift, recipe.guidance) == (4, "euler", 5.0, 1.0)
    kinds = {
        mode: [(lora.kind, lora.strength) for lora in PRESETS["fast4"].loras_of(mode)]
        for mode in ("animate", "replace")
    }
    assert kinds == {"animate": [("distill", 1.0)], "replace": [("distill", 1.0), ("relight", 1.0)]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kijai4", (4, "dpm++_sde", "kijai", 5.0, 1)),
        ("native4", (4, "lcm", "simple", 8.0, 5)),
        ("native8", (8, "euler", "beta", 8.0, 1)),
    ],
)
def test_the_workflows_of_comfyui(name: str, settings: tuple[Any, ...]) -> None:
    """kijai_semantics.md 6.2; the shift of native ones is ComfyUI's own, 8."""
    recipe = PRESETS[name].recipe
    assert (recipe.steps, recipe.sampler, recipe.grid, recipe.shift, recipe.overlap) == settings
    assert (recipe.guidance, recipe.window) == (1.0, 77)
    loras = [(lora.kind, lora.strength) for lora in PRESETS[name].loras_of("animate")]
    assert loras == [("distill", 1.2), ("relight", 1.0)]


# --- LoRAs by content --------------------------------------------------------------------------------------


def pairs(layers: Any, up: str = ".lora_up.weight", down: str = ".lora_down.weight") -> list[str]:
    return [f"{PREFIX}{layer}{end}" for layer in layers for end in (up, down)]


def linears(*blocks: int, without: tuple[str, ...] = ()) -> list[str]:
    return [f"blocks.{n}.{name}" for n in blocks for name in sorted(LINEARS) if not name.endswith(without)]


RELIGHT = pairs(linears(0, 39))
RELIGHT_PEFT = [
    name.removeprefix(PREFIX) for name in pairs(linears(0, 39), ".lora_B.weight", ".lora_A.weight")
]
WHOLE = [f"{PREFIX}blocks.0.self_attn.norm_q.diff", f"{PREFIX}patch_embedding.diff_b"]
DISTILL = [*pairs([*linears(0, 39), *sorted(DISTILLED)]), *WHOLE]
OWN_DISTILL = [  # lightx2v's own file: the head and the patch embedding whole (files_and_loras.md 6.1)
    *pairs([*linears(0, 39), *sorted(DISTILLED - {"head.head"})]),
    *WHOLE,
    *(f"{PREFIX}{name}" for name in ("head.head.diff", "head.head.diff_b", "patch_embedding.diff")),
]
TEXT_TO_VIDEO = [
    *pairs([*linears(0, 39, without=("k_img", "v_img")), *sorted(DISTILLED - {"img_emb.proj.1"})]),
    *WHOLE,
]
LIGHTNING = [*pairs(linears(0, without=("k_img", "v_img"))), f"{PREFIX}blocks.0.ffn.0.alpha"]
CHECKPOINT = ["patch_embedding.weight", "blocks.0.self_attn.q.weight"]


def write(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros((1, 1), np.float32) for name in names}, path)
    return path


def write_sparse(path: Path, names: list[str], size: int) -> Path:
    """A file of that size, whose first tensor takes the room."""
    room, text = size, b""
    for _ in range(3):  # until the header has its final length
        ends = [room, *(room + i for i in range(1, len(names)))]
        header = {
            name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
        }
        text = json.dumps(header).encode()
        room = size - 8 - len(text) - len(names) + 1
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (RELIGHT, "relight"),
        (RELIGHT_PEFT, "relight"),
        (DISTILL, "distill"),
        (OWN_DISTILL, "distill"),
        (TEXT_TO_VIDEO, None),
        (LIGHTNING, None),
        ([*RELIGHT, f"{PREFIX}something.else.lora_up.weight"], None),
        (CHECKPOINT, None),
    ],
)
def test_a_lora_is_known_by_its_layers(tmp_path: Path, names: list[str], kind: str | None) -> None:
    assert kind_of(write(tmp_path / "x.safetensors", names)) == kind


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lora_files.lightx2v_kijai, "distill"),
        (lora_files.lightx2v_own, "distill"),
        (lora_files.relight_first, "relight"),
        (lora_files.relight, "relight"),
        (lora_files.relight_resized, "relight"),
        (lora_files.t2v_kijai, None),
        (lora_files.t2v_own, None),
        (lora_files.high_noise, None),
        (lora_files.lightning, None),
        (lora_files.pusa, None),
        (lora_files.lokr, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_layouts_of_published_loras(tmp_path: Path, made: Any, kind: str | None) -> None:
    assert kind_of(write(tmp_path / "x.safetensors", list(made().tensors))) == kind


def test_what_is_no_file_is_no_lora(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    assert kind_of(tmp_path / "broken.safetensors") is None


def found(folder: Path, mode: str = "animate", *given: Lora) -> list[str]:
    return [lora.file.name for lora in find_loras(PRESETS["fast4"], mode, [folder], given)]


def test_the_loras_of_a_mode_are_found_in_any_folder(tmp_path: Path) -> None:
    write(tmp_path / "loras" / "wan" / "lightx2v_r64.safetensors", DISTILL)
    write(tmp_path / "diffusion_models" / "WanAnimate_relight.safetensors", RELIGHT)
    write(tmp_path / "loras" / "character.safetensors", RELIGHT)
    (tmp_path / "loras" / "link.safetensors").symlink_to(
        tmp_path / "loras" / "wan" / "lightx2v_r64.safetensors"
    )
    assert found(tmp_path) == ["link.safetensors"], "a link and its file are one"
    assert found(tmp_path, "replace")[1] == "WanAnimate_relight.safetensors"


def test_the_official_ckpt_is_found(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.zeros(1, 1) for name in RELIGHT_PEFT}
    torch.save({"state_dict": tensors}, tmp_path / "relighting_lora.ckpt")
    write(tmp_path / "lightx2v.safetensors", DISTILL)
    assert found(tmp_path, "replace") == ["lightx2v.safetensors", "relighting_lora.ckpt"]


def test_the_published_file_is_taken_of_several(tmp_path: Path) -> None:
    """Known by its size, whatever its name."""
    write(tmp_path / "lightx2v_a.safetensors", DISTILL)
    write(tmp_path / "lightx2v_b.safetensors", OWN_DISTILL)
    with pytest.raises(
        UsageError, match="Several files may be the distill LoRA .*: lightx2v_a.*, lightx2v_b"
    ):
        found(tmp_path)
    (published,) = [file for file in FILES if file.part == "distill LoRA"]
    assert published.size is not None
    write_sparse(tmp_path / "z.safetensors", DISTILL, published.size)
    assert found(tmp_path) == ["z.safetensors"]


@pytest.mark.parametrize("name", ["character.safetensors", "wan2.2_i2v_low_noise_lightx2v.safetensors"])
def test_none_is_guessed(tmp_path: Path, name: str) -> None:
    """The low-noise expert's has the same layers."""
    write(tmp_path / name, DISTILL)
    with pytest.raises(WeightsError, match="needs the distill LoRA, which is in no folder") as raised:
        found(tmp_path)
    assert raised.value.hint.splitlines()[-1] == "trt-wan pull fast4"


def test_a_given_lora_takes_the_place_of_its_kind(tmp_path: Path) -> None:
    write(tmp_path / "lightx2v.safetensors", DISTILL)
    mine = Lora(write(tmp_path / "mine" / "other.safetensors", OWN_DISTILL), 0.7)
    face = Lora(write(tmp_path / "mine" / "face.safetensors", LIGHTNING))
    assert found(tmp_path, "animate", mine) == ["other.safetensors"]
    assert found(tmp_path, "animate", face) == ["lightx2v.safetensors", "face.safetensors"]


# --- The command line ------------------------------------------------------------------------------------


def options_of(*arguments: str) -> tuple[RunOptions, dict[str, Any]]:
    """What `run` makes of a command line, and its note."""
    notes: list[Any] = []

    class Report(JsonReport):
        def progress(self, event: Any) -> None:
            notes.append(event)

    with run.make_context("run", ["-o", "out.mp4", *arguments]) as context:
        given = {name: value for name, value in context.params.items() if name in RunOptions.__annotations__}
        made = RunOptions(**with_preset(Report(), context.params["preset"], given))
    return made, notes[0].__dict__ if notes else {}


def test_options_that_are_given_win(tmp_path: Path) -> None:
    write(tmp_path / "lightx2v.safetensors", DISTILL)
    made, note = options_of("--preset", "fast4", "--weights", str(tmp_path), "--steps", "6", "--shift", "5")
    assert (made.steps, made.sampler, made.grid, made.shift) == (6, "euler", "simple", 5.0)
    assert made.loras == (Lora(tmp_path / "lightx2v.safetensors", 1.0),)
    assert note["code"] == "preset" and note["data"]["given"] == {"steps": 6}
    assert note["data"]["official"] == {"steps": 20, "sampler": "unipc", "grid": "official"}
    assert note["data"]["loras"] == [{"file": str(tmp_path / "lightx2v.safetensors"), "strength": 1.0}]
    assert note["text"] == (
        "preset = fast4, 4 Euler steps with lightx2v's distill LoRA. Not the official recipe: "
        "steps 6 (officially 20), sampler euler (officially unipc), grid simple (officially official), "
        "the LoRA lightx2v.safetensors at 1. Given: steps 6."
    )


def test_an_option_that_is_the_default_wins_too(tmp_path: Path) -> None:
    write(tmp_path / "lightx2v.safetensors", DISTILL)
    made, _ = options_of("--preset", "fast4", "--weights", str(tmp_path), "--sampler", "unipc")
    assert (made.sampler, made.steps) == ("unipc", 4)


def test_without_a_preset_nothing_changes() -> None:
    made, note = options_of("--weights", ".")
    assert (made.steps, made.sampler, made.loras, note) == (20, "unipc", (), {})


def test_the_official_recipe_is_called_so(tmp_path: Path) -> None:
    _, note = options_of("--preset", "quality20", "--weights", str(tmp_path))
    assert note["text"].endswith("It is the official recipe.")


def test_the_command_refuses_before_anything_else(tmp_path: Path) -> None:
    """A missing LoRA, with the command that fetches it."""
    arguments = ["run", "--inputs", str(tmp_path), "-o", str(tmp_path / "o.mp4"), "--weights", str(tmp_path)]
    result = CliRunner().invoke(cli, [*arguments, "--preset", "fast4", "--json"])
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert (result.exit_code, error["code"]) == (1, "weights_unusable")
    assert error["hint"].endswith("\ntrt-wan pull fast4")


def test_click_offers_the_table() -> None:
    (option,) = [param for param in run.params if param.name == "preset"]
    assert isinstance(option.type, click.Choice) and list(option.type.choices) == list(PRESETS)
