"""`python -m trt_wan` is the `trt-wan` command. Signals are handled before anything else is imported."""

import io
import os
import sys

try:
    from trt_wan.cli import stopping
except KeyboardInterrupt:
    os.write(2, b"Error: Stopped at once.\n")
    os._exit(130)


def main() -> None:
    stopping.end_at_once()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would get its number, and be written to as stdout or stderr
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # print would write to stdout
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path is written byte for byte, also one that is no text
        sys.stdout.reconfigure(errors="surrogateescape")
    from trt_wan.cli.main import cli

    try:
        cli()
    except SystemExit as ended:
        stopping.end_with(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise


if __name__ == "__main__":
    main()
