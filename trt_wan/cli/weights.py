"""`trt-wan weights`: checkpoints to try the program with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from trt_wan.cli.command import Group, command, note
from trt_wan.cli.report import Report, TextReport, readable_bytes, table
from trt_wan.errors import UsageError, WeightsError

LONGEST = 600  # characters of a line of `weights show`


@click.group(cls=Group)
def weights() -> None:
    """Make or inspect checkpoints."""


@weights.command(short_help="Write a complete set of tiny random weights.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--lynx", type=click.Choice(["full", "lite"]), help="Write Lynx's files too, of this kind.")
@command
def tiny(*, report: Report, folder: Path, seed: int, lynx: Any) -> Any:
    """Write a complete set of tiny random weights to FOLDER, in the formats of the real files."""
    from trt_wan.runtime.weights.tiny import write_tiny_lynx, write_tiny_weights

    paths = write_tiny_weights(folder, seed)
    paths += [] if lynx is None else write_tiny_lynx(folder, seed, lynx)
    return folder, {
        "files": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
    }


@weights.command(short_help="Say what a file is.")
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@command
def show(*, report: Report, file: Path) -> Any:
    """Say what the checkpoint or LoRA FILE is: part, layout, types, what is missing or unexpected; of a LoRA
    its ranks, what it changes, and for which model.

    \b
    trt-wan weights show models/wan2.2_animate_14B_bf16.safetensors

    Only headers are read, and of scaled files the scales. FILE may be the index or the folder of a sharded
    checkpoint. Exit code 1 if a run could not use it.
    """
    from trt_wan.runtime.loras.describe import describe_lora
    from trt_wan.runtime.preset_loras import is_lora
    from trt_wan.runtime.weights.describe import describe

    found = describe_lora(file) if is_lora(file) else describe(file)
    described = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    data = json.loads(json.dumps(described, default=str))
    problem, hint = described.pop("problem", ""), described.pop("hint", "")
    lines = [(name.replace("_", " "), _shown(_readable(name, value))) for name, value in described.items()]
    text = table([line for line in lines if line[1]])
    if not problem:
        return text, data
    if isinstance(report, TextReport):
        click.echo(text)
    else:
        note(report, problem, "described", **data)
    raise WeightsError(problem, hint)


def _shown(text: str) -> str:
    """A name in a file may be of any length, and drive the terminal."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}…"


def _readable(name: str, value: Any) -> str:
    """Empty for a missing value."""
    if name == "bytes":
        return readable_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} ({count:,})" for key, count in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value) if value is not None else ""


@weights.command(short_help="Write a checkpoint again in the layout that loads fastest.")
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The .safetensors file to write.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["fp8", "bf16"]),
    help="fp8: E4M3 with a scale per output row, for GPUs with FP8. Default: fp8 for the transformer, else "
    "bf16.",
)
@click.option("-y", "--overwrite", is_flag=True, help="Replace the output if it exists.")
@command
def convert(*, report: Report, file: Path, output: Path, kind: Any, overwrite: bool) -> Any:
    """Write the checkpoint FILE, of any layout, under the official names with the types of the engines.

    \b
    trt-wan weights convert animate-Q8_0.gguf -o animate_fp8.safetensors

    The engines get the same bits from the new file as from the old one, sooner. FILE may be the index, a
    shard or the folder of a sharded checkpoint.
    """
    from trt_wan.runtime.weights.rewrite import rewrite

    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists.", "Name another file, or add -y to replace it.")
    made = rewrite(file, output, kind, report.progress)
    return output, made
