"""The one person that networks with random weights are made to find, because by themselves they find nobody.

He stands upright, faces the camera and never moves. Places in the frame are parts of its width and height,
his joints parts of his box.
"""

import numpy as np
from numpy.typing import NDArray

from trt_wan.preprocess.people.person import BODY, FACE, FEET, JOINTS, LEFT_HAND, RIGHT_HAND

Points = NDArray[np.float32]

BOX = (0.375, 0.125, 0.625, 0.875)  # x0, y0, x1, y1 in the frame
SCORE = 0.9  # of the box and of every joint
PADDING = 1.25  # a pose network sees the box that much enlarged, at its own aspect
SIGMA = 2.0  # pixels of a heat map that a joint's peak is wide, as ViTPose is trained with

# x from his right to his left as the picture shows them, y from head to feet; the left side is the mirror of
# the right one, about x = 0.5. In COCO's order of the body: nose, eyes, ears, shoulders, elbows, wrists, ...
NOSE = (0.5, 0.10)
RIGHT = {
    "eye": (0.46, 0.08),
    "ear": (0.41, 0.09),
    "shoulder": (0.28, 0.20),
    "elbow": (0.18, 0.36),
    "wrist": (0.14, 0.50),
    "hip": (0.38, 0.52),
    "knee": (0.37, 0.74),
    "ankle": (0.36, 0.94),
}
FOOT = {"big toe": (0.31, 0.99), "small toe": (0.27, 0.98), "heel": (0.38, 0.96)}
FACE_CENTRE, FACE_RADII = (0.5, 0.095), (0.085, 0.055)
FINGERS, KNUCKLES, HAND_LENGTH = 5, 4, 0.08


def joints() -> Points:
    """[133, 2]: x and y as parts of the box."""
    found = np.zeros((JOINTS, 2), np.float32)
    body = [NOSE]
    for place in RIGHT.values():
        body += [_mirrored(place), place]  # COCO names the left one first
    found[BODY] = body
    found[FEET] = [_mirrored(place) for place in FOOT.values()] + list(FOOT.values())
    found[FACE] = _face()
    hand = _hand(RIGHT["wrist"])
    found[RIGHT_HAND] = hand
    found[LEFT_HAND] = hand * (-1, 1) + (1, 0)
    return found


def in_frame(width: int, height: int) -> Points:
    """[133, 2] in pixels of a frame."""
    x0, y0, x1, y1 = BOX
    corner, size = np.array((x0, y0)), np.array((x1 - x0, y1 - y0))
    places: Points = ((corner + joints() * size) * (width, height)).astype(np.float32)
    return places


def detector_rows(side: int, rows: int) -> Points:
    """[rows, 6] of a detector whose input is `side` pixels wide and high: x0, y0, x1, y1, score, class 0."""
    found = np.zeros((rows, 6), np.float32)
    found[0] = (*(side * part for part in BOX), SCORE, 0)
    return found


def heat_maps(width: int, height: int, aspect: float) -> Points:
    """[133, height, width] of a pose network that sees the box of a frame of that aspect, width / height."""
    x0, y0, x1, y1 = BOX
    box_width, box_height = (x1 - x0) * aspect, y1 - y0
    tall = max(box_width * height / width, box_height) * PADDING
    wide = tall * width / height
    # The crop's edges are not shifted by half a pixel: the middle is pixel width / 2.
    at = (joints() - 0.5) * (box_width / wide, box_height / tall) * (width, height) + (width / 2, height / 2)
    x, y = np.arange(width), np.arange(height)
    across = np.exp(-np.square(x - at[:, :1]) / (2 * SIGMA**2))
    down = np.exp(-np.square(y - at[:, 1:]) / (2 * SIGMA**2))
    return (SCORE * down[:, :, None] * across[:, None, :]).astype(np.float32)


def _mirrored(place: tuple[float, float]) -> tuple[float, float]:
    return 1 - place[0], place[1]


def _face() -> Points:
    """68 landmarks: jaw 17, brows 10, nose 9, eyes 12, mouth 20, as parts of the box."""
    angles = np.linspace(np.pi, 0, 17)
    jaw = np.stack([np.cos(angles), np.sin(angles)], 1)
    brows = [(x, -0.45) for x in (*np.linspace(-0.75, -0.2, 5), *np.linspace(0.2, 0.75, 5))]
    nose = [(0, y) for y in np.linspace(-0.2, 0.2, 4)] + [(x, 0.3) for x in np.linspace(-0.2, 0.2, 5)]
    eyes = [*_ring((-0.45, -0.2), (0.2, 0.08), 6), *_ring((0.45, -0.2), (0.2, 0.08), 6)]
    mouth = [*_ring((0, 0.55), (0.4, 0.15), 12), *_ring((0, 0.55), (0.3, 0.08), 8)]
    points = np.array([*jaw, *brows, *nose, *eyes, *mouth], np.float32)
    return points * FACE_RADII + FACE_CENTRE


def _ring(centre: tuple[float, float], radii: tuple[float, float], count: int) -> list[tuple[float, float]]:
    angles = np.linspace(np.pi, 3 * np.pi, count, endpoint=False)
    return [(centre[0] + radii[0] * np.cos(a), centre[1] + radii[1] * np.sin(a)) for a in angles]


def _hand(wrist: tuple[float, float]) -> Points:
    """21 points: the wrist, then four along each finger, hanging down."""
    points = [wrist]
    for finger in np.linspace(-0.5, 0.5, FINGERS):
        for k in range(1, KNUCKLES + 1):
            reach = HAND_LENGTH * k / KNUCKLES
            points.append((wrist[0] + finger * reach, wrist[1] + reach))
    return np.array(points, np.float32)
