"""The names of settings in Python: diffusers' where it has one."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from trt_wan.errors import UsageError, shown

# diffusers' names for fields of Job.
RENAMED = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "flow_shift": "shift",
    "segment_frame_length": "window",
    "prev_segment_conditioning_frames": "overlap",
}


def unknown_setting(names: Iterable[str], known: Sequence[str]) -> UsageError:
    name = min(names)
    near = get_close_matches(RENAMED.get(name, name), known, 3) or known[:8]
    return UsageError(f"There is no setting {shown(name)!r} here.", f"Nearest: {', '.join(near)}.")
