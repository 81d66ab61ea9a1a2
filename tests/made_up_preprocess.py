"""`trt-wan preprocess` with made-up people instead of networks, for tests/kills.py. Takes its arguments."""

from trt_wan.cli.stopping import end_at_once

end_at_once()  # as the command does first; imports take most of the time of a small clip


def main() -> None:
    from made_clips import FakePeople, FakeSegmenter

    import trt_wan.preprocess.stages as stages
    from trt_wan.__main__ import main

    stages.open_stages = lambda *_, **__: stages.Stages(FakePeople(), FakeSegmenter())  # type: ignore[assignment]
    main()


main()
