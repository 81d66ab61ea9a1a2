"""Sends made-up pictures as a camera does: `python tests/live_sender.py URL SECONDS [FILE]`.

H.264 at RATE frames per second; picture k is 4·k grey, mod 256. Waits until somebody listens, and prints the
number of frames that were sent. With FILE, the seconds begin when that file exists. It is a process of its
own: PyAV holds Python's lock while it connects.
"""

import os
import socket
import sys
import time

import av
import numpy as np

RATE = 15
WAIT = 60  # seconds for a receiver
MUXERS = {"rtsp": "rtsp", "rtmp": "flv"}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def connected(url: str) -> av.container.OutputContainer:
    until = time.monotonic() + WAIT
    scheme = url.partition("://")[0]
    options = {"rtsp_transport": "tcp"} if scheme == "rtsp" else {"flush_packets": "1"}
    while True:
        try:
            container = av.open(url, "w", format=MUXERS.get(scheme, "mpegts"), options=options)
            stream = container.add_stream(
                "libx264", rate=RATE, options={"preset": "ultrafast", "tune": "zerolatency"}
            )
            stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
            stream.codec_context.gop_size = RATE
            container.start_encoding()
            return container
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def main(url: str, seconds: float, file: str | None = None) -> None:
    container = connected(url)
    (stream,) = container.streams.video
    began = time.monotonic()
    until = None if file else began + seconds
    k = 0
    while until is None or began + k / RATE < until:
        frame = av.VideoFrame.from_ndarray(np.full((180, 320, 3), 4 * k % 256, np.uint8), format="rgb24")
        frame.pts = k
        container.mux(stream.encode(frame))
        k += 1
        time.sleep(max(0, began + k / RATE - time.monotonic()))
        if until is None and file and os.path.exists(file):
            until = time.monotonic() + seconds
    container.mux(stream.encode(None))
    container.close()
    print(k)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
