"""Whether this server can find people in a clip."""

from collections.abc import Sequence
from importlib.util import find_spec

from trt_wan.errors import shell_command, with_commands
from trt_wan.install import install_command


def people_hint(preparing: Sequence[str]) -> str | None:
    """How to make it possible; None where it is."""
    given = {text.partition("=")[0] for text in preparing}
    if {"--detector", "--pose"} <= given or find_spec("mediapipe") is not None:
        return None
    start = shell_command(("serve", "--detector", "yolov10m.onnx", "--pose", "vitpose.onnx"))
    return with_commands(
        "This server has nothing to find people with. Its operator can install MediaPipe, or name networks:",
        install_command("mediapipe"),
        start,
    )
