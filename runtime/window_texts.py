"""The prompts of every window of the loop, and of every context window in it."""

from dataclasses import dataclass
from functools import partial

from trt_wan.runtime.context.parts import Part
from trt_wan.runtime.guidance import Texts
from trt_wan.runtime.job import Job
from trt_wan.runtime.prompts import Prompts


@dataclass(frozen=True)
class WindowTexts:
    """`frames` and `rate` (frames per second) are those of the clips. `known` frames come before the first,
    whose time is 0.
    """

    job: Job
    frames: int
    rate: float
    known: int = 0

    def of(self, j: int, part: Part | None = None) -> Texts:
        """The prompts of window j, or of its context window `part`. Prompts without times go by context
        windows where one window of the loop holds the whole video, else by windows of the loop.
        """
        windows = self.job.windows(self.known + self.frames)
        start, kept = j * windows.stride - self.known, windows.keep(j)
        seconds = (start + kept.start) / self.rate, (start + kept.stop) / self.rate
        if part is None:
            return self.job.texts_of(partial(Prompts.of_window, j=j, seconds=seconds))
        middle = (start + part.frames[len(part.frames) // 2]) / self.rate
        seconds = middle, middle
        if windows.total > 1:
            return self.job.texts_of(partial(Prompts.of_window, j=j, seconds=seconds))
        slots = (windows.length(j) - 1) // 4 + 2
        last = max(part.slots) - (part.shared - 1)
        return self.job.texts_of(partial(Prompts.of_slots, last=last, slots=slots, seconds=seconds))

    def used(self, j: int) -> tuple[str, ...]:
        """Every text of window j, once."""
        plan = self.job.context_plan(self.job.windows(self.known + self.frames).length(j))
        if plan is None or plan.is_one or not self.job.load.travels:
            return self.of(j).all
        parts = dict.fromkeys(part for step in range(self.job.schedule.steps) for part in plan.parts(step))
        return tuple(dict.fromkeys(text for part in parts for text in self.of(j, part).all))

    def unused(self) -> list[str]:
        """The texts that no window has."""
        if not self.job.load.travels:
            return []
        used = {
            text for j in range(self.job.windows(self.known + self.frames).total) for text in self.used(j)
        }
        return [text for text in self.job.texts if text not in used]
