"""`trt-wan preprocess` with made-up people instead of networks, for tests/kills.py. Takes its arguments."""

from trt_wan.__main__ import main as command
from trt_wan.__main__ import stopping

stopping.end_at_once()  # as the command does first; imports take most of the time of a small clip


def main() -> None:
    from made_clips import FakePeople, FakeSegmenter

    import trt_wan.preprocess.stages as stages

    stages.open_stages = lambda *_, **__: stages.Stages(FakePeople(), FakeSegmenter())  # type: ignore[assignment]
    command()


main()
