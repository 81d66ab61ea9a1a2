"""The process of a rank other than 0: `python -m trt_wan.runtime.parallel.child`, started by group.py.

It opens the model, then computes every job that rank 0 tells it of, in step with the others. It writes
nothing. An error ends it, after it has told rank 0.
"""

import os
import pickle
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from trt_wan.errors import TrtWanError
from trt_wan.runtime.events import silent
from trt_wan.runtime.parallel.ranks import Links, RankLost, Ranks


def main() -> None:
    rank, count, control_fd, lifeline = map(int, sys.argv[1:5])
    sockets = {
        int(other): Connection(int(fd)) for other, fd in (pair.split(":") for pair in sys.argv[5].split(","))
    }
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    control = Connection(control_fd)
    ranks = Ranks(rank, count, Links(sockets, [int(fd) for fd in sys.argv[6].split(",")]))
    try:
        _compute(control, ranks)
    except (EOFError, RankLost):
        os._exit(1)  # rank 0 knows it, or has ended
    except BaseException as error:
        traceback.print_exc()
        known = isinstance(error, TrtWanError)
        control.send_bytes(pickle.dumps(error if known else f"{type(error).__name__}: {error}"))
        os._exit(1)


def _compute(control: Connection, ranks: Ranks) -> None:
    from trt_wan.runtime.opening.model import open_basis

    files, settings = pickle.loads(control.recv_bytes())
    with open_basis(files, settings, silent, ranks.rank).open(ranks=ranks) as model:
        while True:
            job, begin_from = pickle.loads(control.recv_bytes())
            for _ in model.pieces(job, begin_from=begin_from):
                pass


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when rank 0 has ended
    os._exit(1)


if __name__ == "__main__":
    main()
