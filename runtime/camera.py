"""The camera of a job: which render Uni3C is given, how strongly, and in which steps.

A render shows the camera's path frame by frame. It is a video or a picture of the user's, or is made from the
reference by a simple path: the reference held still, or seen as a flat picture by a camera that
turns around it or comes closer. Nothing is known of its depth, so near and far parts do not move against each
other as in a render of a point cloud; pixels beyond the picture's edges are black, as holes are there.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trt_wan.runtime.fields import check_fields
from trt_wan.runtime.guidance import require_strength

Move = Literal["static", "orbit", "dolly"]
MOVES: tuple[Move, ...] = get_args(Move)
# At the last frame. A flat picture looks bent beyond, and an orbit's holes are up to an eighth of the width.
ORBIT_DEGREES, DOLLY_FACTOR = 15.0, 1.25
FOCAL_LENGTH = 1.0  # widths of the picture: 53 degrees are seen


@dataclass(frozen=True)
class Camera:
    """Raises UsageError for settings that no job can have; the percent are checked with its steps."""

    render: Move | Path = "static"
    strength: float = 1.0  # factor of the residuals
    start: float = 0.0  # percent of the steps, as for pose and face
    end: float = 100.0

    def __post_init__(self) -> None:
        check_fields(self)
        require_strength("camera", self.strength)

    @property
    def acts(self) -> bool:
        """Whether any step has it. An end of 0 percent is off, like a strength of 0. By the rule of the other
        percent it would be the first step, which every end from above 1 up to the second step is too.
        """
        return self.strength > 0 and (self.start, self.end) != (0, 0)


def homography(move: Move, done: float, width: int, height: int) -> NDArray[np.float64]:
    """From places of the picture to places of the frame, in pixels, where `done` 0 to 1 of a path is behind.
    At 0 it is the identity.
    """
    centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    if move == "orbit":  # the picture turns about its vertical axis, f away from the camera
        f, angle = FOCAL_LENGTH * width, math.radians(ORBIT_DEGREES) * done
        path = np.array([[math.cos(angle), 0, 0], [0, 1, 0], [math.sin(angle) / f, 0, 1]])
    else:
        factor = DOLLY_FACTOR**done if move == "dolly" else 1.0
        path = np.diag([factor, factor, 1])
    return np.asarray(centre @ path @ np.linalg.inv(centre))
