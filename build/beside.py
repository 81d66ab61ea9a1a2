"""Exports graphs in other processes beside this one: one export keeps one core busy for a second or more.

A helper gets a pickled function `write(name, path)` and then one line per graph on stdin, and answers each
finished one with a line on stdout. It ends with its stdin, and so with this process. What goes wrong in it
goes back to this process, which exports that graph itself.

python -m trt_wan.build.beside      is such a helper
"""

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO

Write = Callable[[str, Path], None]  # exports the graph of a network to a file

MOST = 4  # processes, this one among them
WORTH = 5  # graphs per process; importing torch takes as long as exporting two or three
MEMORY = 1 << 30  # bytes free per process; one takes 0.6 GB


def helpers_for(graphs: int) -> int:
    """How many helpers shorten the export of so many graphs on this machine."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = int(psutil.virtual_memory().available)
    return max(0, min(MOST, cores, graphs // WORTH, memory // MEMORY) - 1)


@contextmanager
def helpers(count: int, write: Write, work: Callable[[Write], None]) -> Iterator[Callable[[], None]]:
    """Starts `count` helpers. A thread per helper calls `work` with a function that has the helper export one
    graph, and raises OSError if it fails. Yields a function that waits for the threads.
    """
    command = (sys.executable, "-m", "trt_wan.build.beside")
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none) for _ in range(count)]

    def follow(process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None and process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def have_written(name: str, path: Path) -> None:
            asked.write(json.dumps([name, str(path)]).encode() + b"\n")
            asked.flush()
            if json.loads(answers.readline() or "null") != name:
                raise OSError(f"the helper failed at {name}")

        try:
            asked.write(pickle.dumps(write))
            work(have_written)
        except OSError:  # it could not import torch, was killed, or failed at a graph
            pass

    threads = [Thread(target=follow, args=(process,), daemon=True) for process in processes]
    for thread in threads:
        thread.start()

    def wait() -> None:
        for thread in threads:
            thread.join()

    try:
        yield wait
    finally:
        for process in processes:
            process.kill()
        wait()
        for process in processes:
            process.communicate()


def _serve(asked: BinaryIO, answers: BinaryIO) -> None:
    write: Write = pickle.load(asked)
    lines: SimpleQueue[bytes] = SimpleQueue()

    def receive() -> None:
        for line in asked:
            lines.put(line)
        os._exit(0)  # also in the middle of a graph: no file may appear when a killed build starts again

    Thread(target=receive, daemon=True).start()
    while True:
        name, path = json.loads(lines.get())
        write(name, Path(path))
        answers.write(json.dumps(name).encode() + b"\n")
        answers.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the other process, which ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stdout has answers alone
    gc.disable()  # see graphs.py
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
