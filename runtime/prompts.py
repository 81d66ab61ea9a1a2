"""Prompts that change over a video: texts with `|` between them, in turn or each from a time on.

    a man walks | he stops | he dances       one for each window, the last one for all that remain
    0:00 a man walks | 0:05 he dances        each from its time in the video on

A time is m:ss or h:mm:ss, and seconds may have decimals. A prompt without `|` is one text, left as it is.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass

from trt_wan.errors import UsageError, shown

# Wan2.2-Animate was trained with it ("the person in the video is making movements"); others work, less well.
DEFAULT_PROMPT = "视频中的人在做动作"
# The negative prompt shared by all Wan models; only read when guidance is above 1.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)

TIME = re.compile(r"(?:(\d+):)?(\d+):([0-5]\d(?:\.\d+)?)(?=\s|$)")

NEARLY = re.compile(r"\d+:\d\d(?!\d)")  # as 0:90, 0:05x or 0:05: are: meant as a time

Seconds = tuple[float, float]  # from, to: places in the video


@dataclass(frozen=True)
class Prompts:
    texts: tuple[str, ...]
    times: tuple[float, ...] | None = None  # seconds at which the texts begin; rising, the first 0

    @staticmethod
    def parse(prompt: str) -> "Prompts":
        """Raises UsageError for empty texts, and for times that some lack or that do not rise from 0."""
        parts = [part.strip() for part in prompt.split("|")]
        if len(parts) == 1:
            return Prompts((prompt,))
        found = [TIME.match(part) for part in parts]
        texts = tuple(
            part[match.end() if match else 0 :].strip() for part, match in zip(parts, found, strict=True)
        )
        if not all(texts):
            raise UsageError(
                f"A part between the | of {shown(repr(prompt))} is empty.", "Write a text, or leave a | out."
            )
        for part, match in zip(parts, found, strict=True):
            if match is None and NEARLY.match(part):
                raise UsageError(
                    f"The prompt {shown(repr(part))} begins with no time that can be read.",
                    "Write m:ss or h:mm:ss, a space and the text: '0:00 a man walks | 0:05 he dances'.",
                )
        times = tuple(_seconds(match) for match in found if match)
        if not times:
            return Prompts(texts)
        if len(times) < len(texts):
            raise UsageError(
                f"{len(times)} of {len(texts)} prompts between | begin with a time.",
                "Give all of them one, or none: '0:00 a man walks | 0:05 he dances'.",
            )
        if times[0] != 0 or any(b <= a for a, b in zip(times, times[1:], strict=False)):
            raise UsageError(
                f"The times of the prompts are {', '.join(match[0] for match in found if match)}; "
                "they must rise from 0:00.",
                "Begin with 0:00, and put the prompts in the order of their times.",
            )
        return Prompts(texts, times)

    def of_window(self, j: int, seconds: Seconds) -> str:
        """The text of window j of a loop, whose new frames are `seconds` of the video. With times it is the
        text in force in their middle.
        """
        return self._at(seconds) if self.times else self.texts[min(j, len(self.texts) - 1)]

    def of_slots(self, last: int, slots: int, seconds: Seconds) -> str:
        """The text of a context window that ends with slot `last` of `slots` (kijai_semantics.md 3.4)."""
        count = len(self.texts)
        return self._at(seconds) if self.times else self.texts[min(last * count // slots, count - 1)]

    def _at(self, seconds: Seconds) -> str:
        assert self.times is not None
        return self.texts[bisect_right(self.times, (seconds[0] + seconds[1]) / 2) - 1]


def _seconds(time: re.Match[str]) -> float:
    hours, minutes, seconds = time.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds)
