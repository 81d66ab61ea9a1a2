"""How trt_wan/sample was made: python scripts/make_sample.py

Two still photographs of people, free to use, from scikit-image. One is the reference; the other becomes a
driving clip by a smooth sway and zoom of the whole picture, and the prepared clips follow from its joints and
outline. Nothing runs this script; it needs two packages that trt-wan does not, so an environment of its own:

    pip install -e . "mediapipe==0.10.14" "scikit-image==0.26.0"

Positions are (x, y); in the photograph's pixels until `moves` takes them to the canvas.
"""

import math
import tempfile
import wave
from fractions import Fraction
from pathlib import Path

import cv2
import mediapipe
import numpy as np
import skimage

from trt_wan.runtime.video.writer import VideoWriter

SAMPLE = Path(__file__).parent.parent / "trt_wan" / "sample"
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
WIDTH, HEIGHT, FACE = 320, 192, 512
FRAMES, RATE = 21, Fraction(12)
CENTRE, SPAN = (240, 188), 468  # of the photograph: middle and width of what the canvas shows
PERSON = (
    0,
    20,
    360,
    512,
)  # of the photograph: left, top, right, bottom; in the whole of it an arm is misplaced
FACE_CENTRE, FACE_SIDE = (226, 154), 124

# The 20 joints of the official drawing as means of MediaPipe's 33, and its limbs with their colours.
JOINTS = (
    *((0,), (11, 12), (12,), (14,), (16,), (11,), (13,), (15,), (24,), (26,)),
    *((28,), (23,), (25,), (27,), (5,), (2,), (8,), (7,), (31,), (32,)),
)
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11)),
    *((11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19)),
)
COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0)),
    *((0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255)),
    *((170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0)),
)


def main() -> None:
    SAMPLE.mkdir(exist_ok=True)
    astronaut = cv2.imread(str(PHOTOGRAPHS / "astronaut.png"))
    portrait = astronaut[: astronaut.shape[1] * HEIGHT // WIDTH]
    cv2.imwrite(
        str(SAMPLE / "src_ref.png"),
        cv2.resize(portrait, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA),
        [cv2.IMWRITE_PNG_COMPRESSION, 9],
    )

    photograph = cv2.imread(str(PHOTOGRAPHS / "camera.png"))[..., ::-1].copy()
    joints, scores, person = find_person(photograph)
    clips: dict[str, list[np.ndarray]] = {
        "driving": [],
        "src_pose": [],
        "src_face": [],
        "src_bg": [],
        "src_mask": [],
    }
    for move in moves():
        frame = warp(photograph, move)
        mask = in_blocks(cv2.dilate(warp(person, move), np.ones((7, 7), np.uint8), iterations=3) > 127)
        clips["driving"].append(frame)
        clips["src_pose"].append(skeleton(joints @ move[:, :2].T + move[:, 2], scores))
        clips["src_face"].append(face(photograph, move))
        clips["src_bg"].append(frame * ~mask[..., None])
        clips["src_mask"].append(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))

    with tempfile.TemporaryDirectory() as folder:
        tune = melody(Path(folder) / "tune.wav")
        for name, frames in clips.items():
            height, width = frames[0].shape[:2]
            sound = tune if name == "driving" else None
            with VideoWriter(SAMPLE / f"{name}.mp4", width, height, RATE, sound, overwrite=True) as writer:
                for frame in frames:
                    writer.write(frame)
                writer.finish()


def find_person(photograph: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joints [20, 2], their scores [20], and the outline as uint8 [H, W], 255 inside."""
    x0, y0, x1, y1 = PERSON
    crop = photograph[y0:y1, x0:x1].copy()
    with mediapipe.solutions.pose.Pose(static_image_mode=True, enable_segmentation=True) as pose:
        found = pose.process(crop)
    landmarks = np.array([(p.x, p.y, p.visibility) for p in found.pose_landmarks.landmark])
    joints = np.array([landmarks[list(group)].mean(axis=0) for group in JOINTS])
    outline = np.zeros(photograph.shape[:2], np.uint8)
    outline[y0:y1, x0:x1] = (found.segmentation_mask > 0.5) * 255
    return joints[:, :2] * (x1 - x0, y1 - y0) + (x0, y0), joints[:, 2], outline


def moves() -> list[np.ndarray]:
    """Affine [2, 3] from the photograph to the canvas, one per frame: sway, nod, slow zoom, and back."""
    found = []
    for phase in np.linspace(0, 2 * math.pi, FRAMES):
        scale = WIDTH / SPAN * (1 + 0.04 * (1 - math.cos(phase)))
        move = cv2.getRotationMatrix2D(CENTRE, 2.0 * math.sin(phase), scale)
        move[:, 2] += (WIDTH / 2 - CENTRE[0], HEIGHT / 2 - CENTRE[1])
        move[:, 2] += (9 * math.sin(phase), 3 * math.sin(2 * phase))
        found.append(move)
    return found


def warp(picture: np.ndarray, move: np.ndarray) -> np.ndarray:
    """The canvas after `move`, drawn at four times its size and averaged."""
    big = cv2.warpAffine(
        picture, move * 4, (4 * WIDTH, 4 * HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return cv2.resize(big, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


def face(photograph: np.ndarray, move: np.ndarray) -> np.ndarray:
    """A square upright on the canvas around the moved face, always of the same size on the canvas."""
    centre = move[:, :2] @ FACE_CENTRE + move[:, 2]
    enlarge = FACE / (FACE_SIDE * WIDTH / SPAN)
    crop = move * enlarge
    crop[:, 2] = (move[:, 2] - centre) * enlarge + FACE / 2
    return cv2.warpAffine(photograph, crop, (FACE, FACE), flags=cv2.INTER_CUBIC)


def skeleton(joints: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The official drawing, without hands, at its thinnest."""
    canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        if min(scores[a], scores[b]) < 0.5:
            continue
        (xa, ya), (xb, yb) = joints[a], joints[b]
        length, angle = math.hypot(xa - xb, ya - yb), math.degrees(math.atan2(ya - yb, xa - xb))
        middle = (int((xa + xb) / 2), int((ya + yb) / 2))
        polygon = cv2.ellipse2Poly(middle, (int(length / 2), 1), int(angle), 0, 360, 1)
        cv2.fillConvexPoly(canvas, polygon, tuple(int(0.6 * channel) for channel in colour))
    for (x, y), score, colour in zip(joints, scores, COLOURS, strict=True):
        if score >= 0.5:
            cv2.circle(canvas, (int(x), int(y)), 1, colour, thickness=-1)
    return canvas


def in_blocks(mask: np.ndarray, columns: int = 10, rows: int = 20) -> np.ndarray:
    """Fills every cell of a grid over the mask's bounding box that the mask touches: it hides the outline."""
    ys, xs = np.nonzero(mask)
    blocks = np.zeros_like(mask)
    width, height = max((xs.max() - xs.min()) // columns, 1), max((ys.max() - ys.min()) // rows, 1)
    for y in range(ys.min(), ys.max() + 1, height):
        for x in range(xs.min(), xs.max() + 1, width):
            blocks[y : y + height, x : x + width] = mask[y : y + height, x : x + width].any()
    return blocks


def melody(path: Path, rate: int = 48_000) -> Path:
    """Seven soft plucked notes of a pentatonic scale, in time with the sway."""
    notes = (392.0, 440.0, 523.25, 659.25, 523.25, 440.0, 392.0)
    seconds = float(FRAMES / RATE)
    t = np.arange(int(seconds * rate)) / rate
    tune = np.zeros_like(t)
    for number, pitch in enumerate(notes):
        since = t - number * seconds / len(notes)
        tune += np.where(since >= 0, np.sin(2 * np.pi * pitch * since) * np.exp(-6 * since), 0)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tune * 0.15 * 32767).astype("<i2").tobytes())
    return path


if __name__ == "__main__":
    main()
