"""Engines, and the rows beside them on disk, in words and tables: for `trt-wan list`, `show` and `rm`."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_wan.cli.report import readable_bytes, table
from trt_wan.errors import shell_command

if TYPE_CHECKING:
    from trt_wan.engines.store.entries import Entry
    from trt_wan.engines.store.folders import Folder
    from trt_wan.engines.store.manifest import Manifest
    from trt_wan.engines.store.measurements import Figure

SHORT = 8  # digits of a key that are shown
Row = dict[str, Any]


def manifest_of(entry: "Entry") -> "Manifest | None":
    """Also of a damaged engine whose manifest is good: it holds the command that rebuilds it."""
    from trt_wan.engines.store.manifest import read_manifest

    return entry.manifest or read_manifest(entry.key)


def removal(key: str) -> tuple[str, ...]:
    """The command that removes an engine."""
    return ("rm", key[:SHORT], "--yes")


DESCRIBED = "kind network about precision target gpu driver flavour version rebuild".split()


def described(entry: "Entry") -> Row:
    """A row of `list`; an engine whose file has another size is damaged."""
    manifest = manifest_of(entry)
    return {
        "key": entry.key,
        "state": "whole" if entry.manifest else "damaged",
        **{name: getattr(manifest, name, None) for name in DESCRIBED},
        "bytes": entry.bytes,
        "used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
    }


def folder_table(others: "Sequence[Folder]") -> str:
    rows = [(other.name, str(other.files), readable_bytes(other.bytes), other.about) for other in others]
    return table([("FOLDER", "FILES", "BYTES", "CONTENT; MADE AGAIN BY"), *rows])


def files_in(name: str) -> list[Row]:
    """The files of a row, by name, bytes and state. A set of graphs also has those that are missing."""
    from trt_wan.engines.store.folders import GRAPHS, files_of, graphs_of
    from trt_wan.engines.store.graphs import is_whole, read_manifest
    from trt_wan.engines.store.home import home

    files = files_of(name)
    if not name.startswith(f"{GRAPHS}/"):
        return [_file(path, str(path.relative_to(home())), "") for path in files]
    folder = graphs_of(name)
    manifest = read_manifest(folder)
    graphs = {f"{graph}.onnx": graph for graph in manifest.names}
    found = []
    for path in dict.fromkeys((*files, *(folder / graph for graph in graphs))):
        state = ""
        if graph := graphs.get(path.name):
            whole = is_whole(folder, graph, manifest)
            state = "whole" if whole else "damaged" if path.exists() else "missing"
        found.append(_file(path, path.name, state))
    return found


def _file(path: Path, name: str, state: str) -> Row:
    return {"name": name, "bytes": path.lstat().st_size if path.exists() else 0, "state": state}


def file_table(files: Sequence[Row]) -> str:
    rows = [(file["name"], readable_bytes(file["bytes"]), file["state"]) for file in files]
    return table([("FILE", "BYTES", "STATE"), *rows])


def engine_table(rows: list[Row]) -> str:
    header = "KEY KIND ENGINE ABOUT PRECISION TARGET GPU TENSORRT BYTES USED STATE".split()
    return table([header, *([_cell(row, name) for name in header] for row in rows)])


def _cell(row: Row, column: str) -> str:
    known = row["network"] is not None
    match column:
        case "KEY":
            return str(row["key"])[:SHORT]
        case "BYTES":
            return readable_bytes(row["bytes"])
        case "USED":
            return str(row["used"])[:16].replace("T", " ")
        case "STATE":
            return "" if row["state"] == "whole" else "damaged"
        case _ if not known:
            return "?"
        case "ENGINE":
            return str(row["network"])
        case "GPU":
            return _gpu(row["gpu"], row["driver"])
        case "TENSORRT":
            return f"{row['flavour']} {row['version']}"
    return str(row[column.lower()])


def _gpu(name: str | None, driver: int | None) -> str:
    return f"{name}, CUDA {driver}" if name else "-"


def in_words(m: "Manifest", row: Row) -> str:
    again = shell_command(m.rebuild) if m.rebuild else "the next use builds it"
    if row["state"] == "damaged" and not m.rebuild:
        again = shell_command(removal(m.key))
    lines = [
        ("key", m.key),
        ("kind", m.kind),
        ("engine", m.network),
        ("first for", m.about),
        ("precision", m.precision),
        ("target", m.target if m.gpu is None else f"{m.target}: {_gpu(m.gpu, m.driver)}"),
        ("tensorrt", f"{m.flavour} {m.version} ({m.flavour_reason})"),
        ("built", f"{m.built}, in {m.build_seconds:.1f} s"),
        ("last used", str(row["used"])),
        ("plan", f"{readable_bytes(m.bytes)}, sha256 {m.sha256}"),
        ("graph", f"sha256 {m.source}"),
        ("state", str(row["state"])),
        ("rebuild", again),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)


def candidates(figures: "list[Figure]") -> str:
    """The fastest first; candidates without a time come last, with the reason."""
    if not figures:
        return "No candidates were measured."
    rows = [
        (f.candidate, _figure(f.ms, ".2f"), _figure(f.error, ".1e"), f"{f.tolerance:.1e}", f.tier)
        + (f.chosen, f.gpu, f.version, f.problem)
        for f in sorted(figures, key=lambda f: (f.gpu, f.ms is None, f.ms, f.candidate))
    ]
    return table([tuple("CANDIDATE MS ERROR TOLERANCE TIER CHOSEN GPU TENSORRT PROBLEM".split()), *rows])


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
