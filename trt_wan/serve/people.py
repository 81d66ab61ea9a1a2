"""Whether this server can find people in a clip."""

from collections.abc import Sequence
from importlib.util import find_spec

from trt_wan.errors import UsageError

NONE = "This server has nothing to find people with."
HINT = (
    "Send prepared clips, or keypoints. Its operator can install the extra mediapipe, or start it with "
    "--detector and --pose."
)


def people_hint(preparing: Sequence[str]) -> str | None:
    """None where people can be found."""
    given = {text.partition("=")[0] for text in preparing}
    found = {"--detector", "--pose"} <= given or find_spec("mediapipe") is not None
    return None if found else f"{NONE} {HINT}"


def require_people(preparing: Sequence[str]) -> None:
    """Raises UsageError."""
    if people_hint(preparing) is not None:
        raise UsageError(NONE, HINT)
