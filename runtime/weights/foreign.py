"""Names a file that is no checkpoint by its first bytes: pictures, videos, archives, failed downloads."""

from pathlib import Path

FIRST = 512  # bytes that are looked at
LONGEST_LINE = 60  # characters of a text that are shown
AGAIN = "Download the file again."
OTHER = "Name a checkpoint or a LoRA: safetensors, GGUF or torch's .pth."
# Where the bytes stand, the bytes, and the kind with its hint. The first that fits.
SIGNS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://", "a pointer of Git LFS and not the file itself", "Fetch it with git lfs pull."),
    (0, b"\x89PNG", "a PNG picture", OTHER),
    (0, b"\xff\xd8\xff", "a JPEG picture", OTHER),
    (0, b"GIF8", "a GIF picture", OTHER),
    (8, b"WEBP", "a WebP picture", OTHER),
    (0, b"BM", "a BMP picture", OTHER),
    (0, b"II*\0", "a TIFF picture", OTHER),
    (0, b"MM\0*", "a TIFF picture", OTHER),
    (4, b"ftypavif", "an AVIF picture", OTHER),
    (4, b"ftyp", "an MP4 video", OTHER),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", OTHER),
    (8, b"AVI ", "an AVI video", OTHER),
    (0, b"PK\x03\x04", "a zip archive", "Unpack it, and name the checkpoint in it."),
    (0, b"7z\xbc\xaf", "a 7z archive", "Unpack it, and name the checkpoint in it."),
    (0, b"Rar!", "a RAR archive", "Unpack it, and name the checkpoint in it."),
    (0, b"\x1f\x8b", "a gzip archive", "Unpack it, and name the checkpoint in it."),
    (257, b"ustar", "a tar archive", "Unpack it, and name the checkpoint in it."),
    (0, b"%PDF", "a PDF document", OTHER),
    (0, b"\x89HDF", "an HDF5 file", "Use the safetensors file of the model."),
)
PAGE = "a web page"
EMPTY, ZEROS = "empty", "a file that begins with zeros, as an unfinished download does"


def foreign_kind(begin: bytes) -> tuple[str, str] | None:
    """The kind of a file, for a sentence after `is`, and a hint, by its first FIRST bytes; None if it may be
    a checkpoint. A zip archive may be torch's.
    """
    if not begin:
        return EMPTY, AGAIN
    if begin[8:9] == b"{":  # safetensors: any length may stand before it
        return None
    text = begin.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        return PAGE, f"{AGAIN[:-1]}; its site may ask for a login."
    for at, magic, kind, hint in SIGNS:
        if begin.startswith(magic, at) and (magic != b"BM" or begin[6:10] == b"\0\0\0\0"):
            return kind, hint
    if not any(begin):
        return ZEROS, AGAIN
    if (line := _line(begin)) is not None:
        return f"a text that begins with {line!r}", AGAIN
    return None


def foreign_file(path: Path) -> str:
    """The kind of a file that is no checkpoint; empty for a folder and for all that may be one."""
    try:
        with path.open("rb") as file:
            found = foreign_kind(file.read(FIRST))
    except OSError:
        return ""
    return found[0] if found else ""


def _line(begin: bytes) -> str | None:
    """The first line of a text; None for binary data."""
    try:
        text = begin[: FIRST - 3].decode("utf-8", "strict" if len(begin) < FIRST else "ignore")
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character in "\t\r\n" for character in text):
        return None
    return (text.strip().splitlines() or [""])[0][:LONGEST_LINE]
