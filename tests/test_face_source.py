"""Faces are cropped from the clip's own pictures: they keep detail that the smaller frame has lost."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from made_clips import box_of, standing

from trt_wan.preprocess.clips.sizes import Fit
from trt_wan.preprocess.drawing import Drawing
from trt_wan.preprocess.footage import plan_footage
from trt_wan.preprocess.job import PreprocessJob
from trt_wan.preprocess.observe import unobserved
from trt_wan.preprocess.people.person import Keypoints, PersonFrame
from trt_wan.preprocess.people.skeleton import from_keypoints
from trt_wan.preprocess.pictures.face import FaceCropper, PixelBox
from trt_wan.preprocess.pictures.masks import Compat
from trt_wan.runtime.video.reader import Picture

LARGE, FRAMES = (1920, 1080), 3


def write_fine(path: Path, size: tuple[int, int], turned: bool = False) -> list[Picture]:
    """A lossless clip of squares of 3 pixels, random in every frame. Returns its frames, upright."""
    random = np.random.default_rng(3)
    coded = size[::-1] if turned else size
    pictures = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb" if turned else "ffv1", rate=Fraction(12))
        stream.width, stream.height = coded
        stream.pix_fmt = "rgb24" if turned else "bgr0"
        stream.options = {"qp": "0", "preset": "ultrafast"} if turned else {}
        for _ in range(FRAMES):
            squares = random.integers(0, 256, (coded[1] // 3 + 1, coded[0] // 3 + 1, 3), np.uint8)
            picture = squares.repeat(3, 0).repeat(3, 1)[: coded[1], : coded[0]]
            pictures.append(picture)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return pictures


def drawing_of(job: PreprocessJob, points: Keypoints) -> tuple[Drawing, list[Picture]]:
    """The drawing of a person who stands still, and the crops that it makes."""
    footage, sizes = plan_footage(job, np.zeros((200, 150, 3), np.uint8), unobserved)
    found = [PersonFrame(box_of(points), points)] * len(footage.indices)
    people = [sizes.placed(person) for person in found]
    skeletons = [from_keypoints(person.keypoints, *sizes.frame) for person in people]
    drawing = Drawing(job, sizes, found, people, skeletons, skeletons, unobserved)
    return drawing, list(drawing.cropper.crops(shot.face for shot in drawing.shots(footage)))


def crop(picture: Picture, box: PixelBox | None) -> Picture:
    assert box is not None
    x0, y0, x1, y1 = box
    return np.asarray(cv2.resize(picture[y0:y1, x0:x1], (512, 512)), np.uint8)


def job_of(path: Path, size: tuple[int, int], **options: object) -> PreprocessJob:
    return PreprocessJob(Path("r"), path, Path("o"), "replace", size, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["area", "crop", "pad", "stretch"])
@pytest.mark.parametrize("x", [0.0, -910.0])  # in the middle, and half outside the picture
def test_detail_survives_in_a_small_video(tmp_path: Path, how: Fit, x: float) -> None:
    """The face is 190 pixels tall in the clip and 20 in the video: the crop equals a direct one."""
    pictures = write_fine(tmp_path / "c.mkv", LARGE)
    points = standing(LARGE, x)
    drawing, faces = drawing_of(job_of(tmp_path / "c.mkv", (192, 112), fit=how), points)
    (box,) = FaceCropper().boxes([from_keypoints(points, *LARGE)])
    assert box is not None and box[3] - box[1] > 150 and (box[0] == 0) == (x < 0)
    for picture, face in zip(pictures, faces, strict=True):
        np.testing.assert_array_equal(face, crop(picture, box))
        small = drawing.sizes.fitted(picture)
        blurred = crop(small, FaceCropper().boxes(drawing.skeletons)[0])
        assert np.abs(face.astype(int) - blurred).mean() > 40, "no more than the video's own pixels show"


@pytest.mark.parametrize("how", ["area", "crop", "pad", "stretch"])
def test_the_boxes_are_those_of_the_video(tmp_path: Path, how: Fit) -> None:
    """The same place, to a pixel of the video: only the pixels inside are finer."""
    write_fine(tmp_path / "c.mkv", LARGE)
    drawing, _ = drawing_of(job_of(tmp_path / "c.mkv", (640, 400), fit=how), standing(LARGE))
    for box, before in zip(drawing.faces, FaceCropper().boxes(drawing.skeletons), strict=True):
        assert box is not None and before is not None
        here = drawing.sizes.placed_box(box_of(np.array([box[:2], box[2:]], np.float32)))
        assert np.abs(np.subtract((here.x0, here.y0, here.x1, here.y1), before)).max() <= 1


@pytest.mark.parametrize("compat", [None, "official", "kijai"])
def test_at_the_videos_size_every_bit_is_the_same(tmp_path: Path, compat: Compat | None) -> None:
    size = (640, 400)
    pictures = write_fine(tmp_path / "c.mkv", size)
    job = job_of(tmp_path / "c.mkv", size, compat=compat, rate=Fraction(12))
    drawing, faces = drawing_of(job, standing(size))
    frames = [drawing.sizes.fitted(picture) for picture in pictures]
    cropper = FaceCropper(compat=compat)
    before = list(cropper.crops(cropper.cuts(frames, drawing.skeletons)))
    for face, expected in zip(faces, before, strict=True):
        np.testing.assert_array_equal(face, expected)


@pytest.mark.parametrize("compat", ["official", "kijai"])
def test_the_others_crop_from_the_scaled_frame(tmp_path: Path, compat: Compat) -> None:
    pictures = write_fine(tmp_path / "c.mkv", LARGE)
    job = job_of(tmp_path / "c.mkv", (640, 400), compat=compat, rate=Fraction(12))
    drawing, faces = drawing_of(job, standing(LARGE))
    assert drawing.sizes.frame != LARGE
    (box, *_) = FaceCropper(compat=compat).boxes(drawing.skeletons)
    for picture, face in zip(pictures, faces, strict=True):
        np.testing.assert_array_equal(face, crop(drawing.sizes.fitted(picture), box))


def test_a_turned_clip(tmp_path: Path) -> None:
    """Tagged as turned by a quarter: boxes and crops are those of the upright pictures."""
    path, tagged = tmp_path / "c.mp4", tmp_path / "t.mp4"
    coded = write_fine(path, LARGE[::-1], turned=True)
    with av.open(str(path)) as plain, av.open(str(tagged), "w") as container:
        source = plain.streams.video[0]
        stream = container.add_stream_from_template(source)
        for packet in plain.demux(source):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    content = bytearray(tagged.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16  # the matrix of version 0
    turn = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4")
    content[at : at + 36] = turn.tobytes()
    tagged.write_bytes(content)
    size = LARGE[::-1]
    points = standing(size)
    _, faces = drawing_of(job_of(tagged, (112, 192)), points)
    (box,) = FaceCropper().boxes([from_keypoints(points, *size)])
    for picture, face in zip(coded, faces, strict=True):
        np.testing.assert_array_equal(face, crop(np.rot90(picture, -1), box))


def test_padding_is_in_the_clips_pixels(tmp_path: Path) -> None:
    write_fine(tmp_path / "c.mkv", LARGE)
    job = job_of(tmp_path / "c.mkv", (192, 112))
    (plain, *_), (wide, *_) = (
        drawing_of(replace(job, face_padding=padding), standing(LARGE))[0].faces for padding in (0, 40)
    )
    assert plain is not None and wide is not None
    assert wide == (plain[0] - 40, plain[1] - 40, plain[2] + 40, plain[3] + 40)


def test_what_waits_of_a_face_is_no_more_than_its_crop() -> None:
    """A face that fills an 8K frame waits for its thread as 512x512 pixels, a small one as it is."""
    size = (7680, 4320)
    points = standing(size)
    points[:, :2] = (points[:, :2] - points[50, :2]) * 8 + (3840, 2160)
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    for keypoints, most in ((points, 512 * 512), (standing(LARGE), 250 * 250)):
        (cut,) = FaceCropper().cuts([frame], [from_keypoints(keypoints, *size)])
        assert cut is not None and cut.base is None and cut.size <= most * 3
