"""Pieces of a video file: fragments of mp4 and mov, clusters of Matroska. A header and pieces, one after
another, are a file that plays.

ffmpeg makes them in memory: PyAV has no call that makes a muxer write the packets it holds back. Times are
absolute. Decoding times may not be negative in an mp4, so there pictures are moved by MOST_DELAY frames,
which the edit list in the header takes back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream

Packets = Sequence["Packet[Any]"]

MOST_DELAY = 2  # frames that x264's decoding order runs ahead of the display, at most

_FRAGMENTS = "+delay_moov+default_base_moof+frag_custom"
_HEADER = {"movflags": _FRAGMENTS}
_PIECE = {"movflags": f"{_FRAGMENTS}+frag_discont", "use_editlist": "0", "avoid_negative_ts": "disabled"}
# Without `bitexact` a Matroska file gets a random number.
MATROSKA = {"fflags": "+bitexact"}
_CLUSTERS = {**MATROSKA, "avoid_negative_ts": "disabled"}

_CLUSTER, _CODEC_DELAY = b"\x1f\x43\xb6\x75", b"\x56\xaa"
BUFFER = 1 << 15  # bytes, ffmpeg's own
# Elements that are entered: Segment, Tracks, TrackEntry.
_MASTERS = (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae")


def is_mp4(muxer: str) -> bool:
    return muxer in ("mp4", "mov")


def header(muxer: str, first: Mapping[Stream, "Packet[Any]"], comment: str = "") -> memoryview:
    """`first` has the first packet of every stream: some codecs' headers are made from it. `comment` is
    for the metadata.
    """
    times = {packet: (packet.pts, packet.dts, packet.time_base) for packet in first.values()}
    for number, packet in enumerate(first.values()):
        set_times(packet, 0, -MOST_DELAY if number == 0 else 0, packet.time_base)
    options = _HEADER if is_mp4(muxer) else _CLUSTERS
    made = _muxed(muxer, {s: [p] for s, p in first.items()}, options, comment)
    for packet, (pts, dts, time_base) in times.items():
        set_times(packet, pts, dts, time_base)
    ends = (start for name, start, _ in _parts(muxer, made) if name in (b"moof", _CLUSTER))
    return made[: next(ends)]


def piece(
    muxer: str, streams: Mapping[Stream, Packets], rate: Fraction, order: int, number: int
) -> memoryview:
    """Piece `number`, from 1. The first stream has the pictures. Their pts are their numbers in display
    order. The first of them is number `order` in decoding order.
    """
    video = next(iter(streams))
    shift = MOST_DELAY if is_mp4(muxer) else 0
    for k, picture in enumerate(streams[video], start=order):
        assert picture.pts is not None
        set_times(picture, picture.pts + shift, k - MOST_DELAY + shift, 1 / rate)
        picture.duration = 1
    options = {**_PIECE, "fragment_index": str(number)} if is_mp4(muxer) else _CLUSTERS
    made = _muxed(muxer, streams, options)
    places = [(start, end) for name, start, end in _parts(muxer, made) if name in _PLAYING]
    return made[places[0][0] : places[-1][1]]


def codec_delay(muxer: str, header: memoryview) -> Fraction:
    """Seconds of sound that a Matroska header hides. The muxer counts times of sound from their start."""
    for name, start, end in _parts(muxer, header):
        if name == _CODEC_DELAY:  # an id of 2 bytes, a length of 1, nanoseconds
            return Fraction(int.from_bytes(header[start + 3 : end]), 10**9)
    return Fraction(0)


def has_no_piece(data: bytes) -> bool:
    """Whether a file is empty, zeros, or a header alone."""
    is_header = data[4:8] == b"ftyp" or data.startswith(b"\x1a\x45\xdf\xa3")
    return not any(data) or (is_header and not any(name in data for name in _PLAYING))


def set_times(packet: "Packet[Any]", pts: int | None, dts: int | None, time_base: Fraction) -> None:
    packet.time_base, packet.pts, packet.dts = time_base, pts, dts


def mux(output: OutputContainer, stream: Stream, packets: Iterable["Packet[Any]"]) -> None:
    for packet in packets:
        packet.stream = stream
        output.mux_one(packet)


_PLAYING = (b"moof", b"mdat", _CLUSTER)


def add_stream(output: OutputContainer, muxer: str, template: Stream) -> Stream:
    stream = output.add_stream_from_template(template, opaque=True)
    if is_mp4(muxer) and template.codec_context.codec.canonical_name == "hevc":
        stream.codec_context.codec_tag = "hvc1"  # Apple plays no other
    return stream


class _Collected(bytearray):
    """A file that cannot be sought in: ffmpeg then writes no index and leaves lengths open."""

    write = bytearray.extend


def _muxed(
    muxer: str, streams: Mapping[Stream, Packets], options: dict[str, str], comment: str = ""
) -> memoryview:
    made = _Collected()
    # ffmpeg goes back to write the length of a header, which it can do in its buffer alone.
    room = BUFFER + 2 * len(comment.encode())
    with av.open(made, "w", format=muxer, options=options, buffer_size=room) as output:
        output.metadata.update({"comment": comment} if comment else {})
        outputs = [add_stream(output, muxer, stream) for stream in streams]
        for stream, packets in zip(outputs, streams.values(), strict=True):
            mux(output, stream, packets)
    return memoryview(made)


def _parts(muxer: str, data: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each part of a file. Matroska's masters count as their heads alone."""
    position = 0
    while position < len(data):
        if is_mp4(muxer):  # ISO/IEC 14496-12, 4.2: a length of 4 bytes, then a name of 4 letters
            name = bytes(data[position + 4 : position + 8])
            end = position + int.from_bytes(data[position : position + 4])
        else:  # RFC 8794, 4: leading zeros of the first byte tell how many bytes follow it
            id_end = position + 9 - data[position].bit_length()
            name, width = bytes(data[position:id_end]), 9 - data[id_end].bit_length()
            length = int.from_bytes(data[id_end : id_end + width]) & ((1 << 7 * width) - 1)
            end = id_end + width + (0 if name in _MASTERS else length)
        assert end > position, f"a part without a length at byte {position}"
        yield name, position, end
        position = end
