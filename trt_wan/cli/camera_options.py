"""`--camera` and the options that go with it, as one value of the job."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.options import group, is_typed, refuse_without

if TYPE_CHECKING:
    from trt_wan.runtime.camera import Camera

MOVES = ("static", "orbit", "dolly")  # a test compares them with the runtime's
FIELDS = {"camera_strength": "strength", "camera_start": "start", "camera_end": "end"}


class RenderType(click.Path):
    """A move, or a file of the render."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in MOVES:
            return value
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            moves = ", ".join(MOVES)
            raise click.BadParameter(
                f"{error.message.rstrip('.')}, and it is none of the moves {moves}.", ctx, param
            ) from None


OPTIONS = [
    click.option(
        "--camera",
        type=RenderType(path_type=Path, exists=True, dir_okay=False),
        metavar="static|orbit|dolly|FILE",
        help="Camera control by Uni3C. static: the camera stands. orbit, dolly: it turns around the "
        "reference or comes closer, as if that were flat. FILE: a video that shows the path frame by "
        "frame, or a picture.",
    ),
    click.option(
        "--camera-strength", type=float, show_default="1", help="0 is off; larger videos need more."
    ),
    click.option(
        "--camera-start",
        type=float,
        metavar="PERCENT",
        show_default="0",
        help="First percent of the steps at which it acts.",
    ),
    click.option(
        "--camera-end",
        type=float,
        metavar="PERCENT",
        show_default="100",
        help="Last percent of the steps. 0 is off. 10, the first step alone, often does with a distill LoRA.",
    ),
]
camera_options = group(OPTIONS)


def take_camera(given: dict[str, Any]) -> "Camera | None":
    """Takes the options out of `given`. Raises UsageError, and InputError for a file that cannot be read."""
    render = given.pop("camera")
    chosen = {field: value for name, field in FIELDS.items() if (value := given.pop(name)) is not None}
    if render is None:
        typed = [name for name in (*FIELDS, "camera_control") if is_typed(name)]
        refuse_without("--camera", typed, "--camera static")
        return None
    from trt_wan.runtime.camera import Camera

    camera = Camera(render, **chosen)
    if camera.acts:
        from trt_wan.runtime.video.camera_render import require_render

        require_render(camera)
    return camera
