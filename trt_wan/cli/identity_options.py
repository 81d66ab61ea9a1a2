"""The options of `run` about the identity of a face (Lynx), and the search for its landmarks."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import note
from trt_wan.cli.options import group, is_given, is_typed, refuse_without
from trt_wan.cli.report import Report
from trt_wan.errors import UsageError, shown

if TYPE_CHECKING:
    from trt_wan.runtime.identity import FaceIdentity

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
ALIGNED = "aligned"


def _landmarks(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None or value == ALIGNED:
        return value
    try:
        count = len([float(number) for number in value.split(",")])
    except ValueError:
        count = 0
    if count != 10:
        raise click.BadParameter(f"{shown(repr(value))} is not x,y of five points, and not {ALIGNED}.")
    return value


OPTIONS = [
    click.option(
        "--identity",
        type=FILE,
        metavar="PICTURE",
        help="A face that the character is to have, by Lynx's adapters; a trial, for Lynx was trained on "
        "another model. The largest face of the picture counts.",
    ),
    click.option(
        "--identity-landmarks",
        callback=_landmarks,
        metavar="X,Y,…",
        help="Pixels of the eyes, the tip of the nose and the corners of the mouth, left ones first. "
        f"{ALIGNED}: the picture is such a crop already, 112x112 or 256x256. Default: found.",
    ),
    click.option(
        "--identity-ip-scale",
        type=float,
        show_default="1",
        help="Strength of the IP adapter, which sees numbers of --face-embedder; 0: off.",
    ),
    click.option(
        "--identity-ref-scale",
        type=float,
        show_default="1",
        help="Strength of the ref adapter, which sees the face's picture; 0: off.",
    ),
    click.option(
        "--identity-start",
        type=float,
        metavar="PERCENT",
        help="First percent of the steps at which the identity acts, 0 if it is left out.",
    ),
    click.option(
        "--identity-end",
        type=float,
        metavar="PERCENT",
        help="Last percent of the steps at which it acts, 100 if it is left out; 0: off.",
    ),
    click.option(
        "--face-embedder",
        type=FILE,
        help="ArcFace IR-SE50 as ONNX, for the IP adapter. The usual weights are for non-commercial use.",
    ),
    click.option(
        "--lynx",
        type=click.Path(path_type=Path, exists=True),
        multiple=True,
        help="Lynx's files, known by content, or their folder; may be repeated. Default: among the weights.",
    ),
]
FIELDS = {
    "identity_ip_scale": "ip_scale",
    "identity_ref_scale": "ref_scale",
    "identity_start": "start",
    "identity_end": "end",
    "face_embedder": "embedder",
}
FILES = ("face_embedder", "lynx")
NAMES = ("identity", "identity_landmarks", *FIELDS)
identity_options = group(OPTIONS)


def with_identity(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with a FaceIdentity in place of the options that make it up. Raises UsageError."""
    made = {name: value for name, value in given.items() if name not in NAMES}
    picture = given["identity"]
    if picture is None:
        others = [name for name in NAMES if name not in FILES and is_given(name)]
        if not is_typed("redo"):  # a server names its files for each
            others += [name for name in FILES if is_typed(name)]
        refuse_without("--identity", others, "--identity PICTURE")
        return made | {"identity": None}
    from trt_wan.runtime.identity import FaceIdentity

    fields = {field: given[name] for name, field in FIELDS.items() if given[name] is not None}
    identity = FaceIdentity(picture, **fields)
    if identity.acts and given["identity_landmarks"] is not None:
        identity = _inside(replace(identity, landmarks=_points(picture, given["identity_landmarks"])))
    return made | {"identity": identity}


def _points(picture: Path, landmarks: str) -> tuple[float, ...]:
    if landmarks != ALIGNED:
        return tuple(float(number) for number in landmarks.split(","))
    from trt_wan.runtime.identity import TEMPLATES
    from trt_wan.runtime.video.pictures import read_picture

    height, width, _ = read_picture(picture).shape
    if width != height or width not in TEMPLATES:
        sides = " or ".join(f"{side}x{side}" for side in TEMPLATES)
        raise UsageError(
            f"An aligned face is {sides}; {picture} is {width}x{height}.",
            "Give the five points of the face with --identity-landmarks, or leave it out.",
        )
    return tuple(float(number) for number in TEMPLATES[width].reshape(-1))


def _inside(identity: "FaceIdentity") -> "FaceIdentity":
    from trt_wan.runtime.identity import require_inside
    from trt_wan.runtime.video.pictures import read_picture

    require_inside(identity, read_picture(identity.picture))
    return identity


def require_usable(identity: "FaceIdentity | None", detector: Path | None, pose: Path | None) -> None:
    """Raises UsageError for a face that nothing can find, WeightsError for a file that embeds no face."""
    if identity is None or not identity.acts:
        return
    if identity.embedder is not None and identity.ip_scale > 0:
        from trt_wan.runtime.identity_embedder import require_embedder

        require_embedder(identity.embedder)
    if not identity.landmarks:
        from trt_wan.preprocess.stages import Networks, require_finder

        try:
            require_finder(Networks(detector, pose))
        except UsageError as error:
            points = f"Name the face's points with --identity-landmarks X,Y,… or {ALIGNED}."
            raise UsageError(error.message, f"{points} Or let it be found. {error.hint}") from error


def found_landmarks(
    report: Report, identity: "FaceIdentity", detector: Path | None, pose: Path | None
) -> "FaceIdentity":
    """The identity with its landmarks: given, or found in the picture. Raises UsageError, InputError."""
    if not identity.acts or identity.landmarks:
        return identity
    from trt_wan.preprocess.identity import face_landmarks
    from trt_wan.preprocess.stages import Networks, open_stages

    networks = Networks(detector, pose)
    stages = open_stages(networks, "animate", None, needs_people=True, progress=report.progress)
    assert stages.people is not None
    found = face_landmarks(identity.picture, stages.people)
    text = ",".join(f"{number:.1f}" for number in found)
    note(report, f"identity: the face is at {text} (--identity-landmarks)", "landmarks", landmarks=text)
    return _inside(replace(identity, landmarks=tuple(float(number) for number in text.split(","))))
