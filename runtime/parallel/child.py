"""The process of a rank other than 0: `python -m trt_wan.runtime.parallel.child`, started by group.py.

It opens the model, then computes every job that rank 0 tells it of, in step with the others. It writes
nothing. An error ends it, after it has told rank 0.
"""

import os
import pickle
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import silent
from trt_wan.runtime.parallel.ranks import Links, Ranks


def main() -> None:
    rank, count, control_fd, lifeline = map(int, sys.argv[1:5])
    sockets = {
        int(other): Connection(int(fd)) for other, fd in (pair.split(":") for pair in sys.argv[5].split(","))
    }
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    control = Connection(control_fd)
    links = Links(sockets, [int(fd) for fd in sys.argv[6].split(",")])
    told: object
    try:
        # Rank 0 may be as slow as its consumers. It finds ranks that do not answer, and ends all.
        _compute(control, Ranks(rank, count, links, seconds=None))
    except TrtWanError as error:
        told = error
    except BaseException as error:
        traceback.print_exc()
        told = f"{type(error).__name__}: {error}"
    with suppress(OSError):  # rank 0 has ended
        control.send_bytes(pickle.dumps(told))
    os._exit(1)


def _compute(control: Connection, ranks: Ranks) -> None:
    from trt_wan.runtime.opening.model import open_basis
    from trt_wan.runtime.parallel.relay import taking
    from trt_wan.runtime.video.clips import open_clips

    files, settings = _received(control)
    with open_basis(files, settings, silent, ranks.rank).open(ranks=ranks) as model:
        while True:
            job, begin_from, endings, live = _received(control)
            with open_clips(job.inputs, job.history) if live is None else taking(live, ranks) as clips:
                for _ in model.pieces(job, clips=replace(clips, endings=endings), begin_from=begin_from):
                    pass


def _received(control: Connection) -> Any:
    try:
        return pickle.loads(control.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)  # rank 0 has ended


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when rank 0 has ended
    os._exit(1)


if __name__ == "__main__":
    main()
