"""The options of `run` about guidance: schedules, NAG, strengths over the steps, and the pictures of CLIP."""

from pathlib import Path
from typing import Any

import click

from trt_wan.cli.options import group, is_typed
from trt_wan.errors import UsageError, shown
from trt_wan.runtime.guidance import ClipVision, Nag


def guidance_values(ctx: click.Context, param: click.Parameter, value: str) -> float | tuple[float, ...]:
    """The callback of --guidance: a number, or numbers with commas between them. The brackets are those of a
    list that is given in Python.
    """
    try:
        numbers = tuple(float(number) for number in value.strip("[]()").split(","))
    except ValueError:
        raise click.BadParameter(f"{shown(repr(value))} is no number, and no list such as 5,1.") from None
    return numbers if len(numbers) > 1 else numbers[0]


NAG = {"nag_scale": "scale", "nag_tau": "tau", "nag_alpha": "alpha"}
CLIP_VISION = {
    "clip_image_2": "second",
    "clip_strength": "strength",
    "clip_strength_2": "second_strength",
    "clip_tiles": "tiles",
    "clip_tile_ratio": "tile_ratio",
    "no_clip": "off",
}
PERCENT = [
    click.option(
        f"--{clip}-{end}",
        type=float,
        metavar="PERCENT",
        help=f"{'First' if end == 'start' else 'Last'} percent of the steps at which the {clip} clip acts, "
        f"{number} if it is left out.",
    )
    for clip in ("pose", "face")
    for end, number in (("start", 0), ("end", 100))
]
OPTIONS = [
    click.option(
        "--nag-prompt",
        help="Normalised attention guidance: a negative prompt without a second pass.",
    ),
    click.option("--nag-scale", type=float, show_default=f"{Nag.scale:g}", help="How strong it is."),
    click.option("--nag-tau", type=float, show_default=f"{Nag.tau:g}", help="How far it may go."),
    click.option("--nag-alpha", type=float, show_default=f"{Nag.alpha:g}", help="Its share of the result."),
    click.option(
        "--cfg-zero-star",
        is_flag=True,
        help="CFG-Zero*: scales the negative prompt's side of the guidance to the prompt's.",
    ),
    *PERCENT,
    click.option(
        "--clip-image-2",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="A second picture for CLIP. Its tokens are added to the reference's; the model takes the tokens "
        "of one picture, so they cannot be put side by side (concat).",
    ),
    click.option(
        "--clip-strength",
        type=float,
        show_default="1, with a second picture 0.5",
        help="Weight of the reference's CLIP tokens.",
    ),
    click.option(
        "--clip-strength-2", type=float, show_default="0.5", help="Weight of the second picture's tokens."
    ),
    click.option(
        "--clip-tiles",
        type=int,
        help="2: CLIP also sees the picture in 2x2 tiles, which may help likeness.",
    ),
    click.option(
        "--clip-tile-ratio",
        type=float,
        show_default=f"{ClipVision.tile_ratio:g}",
        help="Weight of the whole picture; that of the tiles together is 1.",
    ),
    click.option("--no-clip", is_flag=True, help="Zeros in place of CLIP's features."),
]


guidance_options = group(OPTIONS)


def with_guidance(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with `nag` and `clip_vision` in place of the options that make them up. Raises UsageError."""
    made = {name: value for name, value in given.items() if name not in (*NAG, *CLIP_VISION, "nag_prompt")}
    nag, clip_vision = (
        {field: given[name] for name, field in fields.items() if given[name] is not None}
        for fields in (NAG, CLIP_VISION)
    )
    if given["nag_prompt"] is not None:
        made["nag"] = Nag(given["nag_prompt"], **nag)
    elif nag:
        raise UsageError(
            "Without --nag-prompt the other options of NAG would do nothing.",
            "Add --nag-prompt TEXT, or leave them out.",
        )
    if "tile_ratio" in clip_vision and not clip_vision.get("tiles"):
        raise UsageError("Without --clip-tiles --clip-tile-ratio would do nothing.", "Add --clip-tiles 2.")
    made["clip_vision"] = ClipVision(**clip_vision)
    if made["clip_vision"].second is not None:
        _require_picture(made["clip_vision"].second)
    if not guided(made["guidance"]):
        if is_typed("cfg_zero_star"):
            raise UsageError("Without guidance --cfg-zero-star would do nothing.", "Add --guidance 5.")
        made["cfg_zero_star"] = False  # that of a video of --from
    for clip in ("pose", "face"):
        ends = [name for name in (f"{clip}_start", f"{clip}_end") if is_typed(name)]
        if ends and made[f"{clip}_strength"] == 0:
            option = f"--{ends[0].replace('_', '-')}"
            raise UsageError(
                f"With --{clip}-strength 0 {option} would do nothing.",
                f"Leave out {option}, or --{clip}-strength.",
            )
    return made


def guided(guidance: float | tuple[float, ...] | None) -> bool:
    return max(guidance) > 1 if isinstance(guidance, tuple) else (guidance or 1) > 1


def _require_picture(path: Path) -> None:
    """Raises InputError before anything slow if the picture cannot be read."""
    from trt_wan.runtime.video.pictures import read_transparent

    read_transparent(path)
