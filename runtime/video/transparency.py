"""Transparent pixels are put on a plain colour, for the model takes opaque pictures.

Pixels are uint8 [H, W, 3] RGB, opacity is uint8 [H, W], 255 where nothing shines through.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.errors import UsageError
from trt_wan.runtime.events import Note

Colour = tuple[int, int, int]
# The basic names of CSS, and green screens' own.
COLOURS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "gray": (128, 128, 128),
    "silver": (192, 192, 192),
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}


def colour(text: str) -> Colour:
    """The RGB values of a name or of #rrggbb. Raises UsageError."""
    if named := COLOURS.get(text.lower()):
        return named
    if match := re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text):
        red, green, blue = (int(part, 16) for part in match.groups())
        return red, green, blue
    raise UsageError(f"{text!r} is not a colour.", f"Use #rrggbb, or one of {', '.join(COLOURS)}.")


def over(pixels: NDArray[Any], opacity: NDArray[Any], behind: Colour) -> NDArray[np.uint8]:
    """The pixels in front of the plain colour `behind`."""
    made = np.empty(pixels.shape, np.uint8)
    for row, colours, part in zip(
        made, pixels, opacity[..., None], strict=True
    ):  # 2 bytes a row, not a picture
        part = part.astype(np.uint16)
        row[:] = (colours * part + np.asarray(behind, np.uint16) * (255 - part) + 127) // 255
    return made


def transparency_note(path: Path, opacity: NDArray[Any], behind: str, option: str = "") -> Note:
    """`option` decides the colour, if there is one."""
    share = float((opacity < 255).mean())
    decided = f" ({option})" if option else ""
    return Note(
        f"{path.name} has transparent pixels ({100 * share:.1f} %); {behind} is put behind them{decided}.",
        "transparent",
        {"file": str(path), "share": round(share, 6), "background": behind},
    )
