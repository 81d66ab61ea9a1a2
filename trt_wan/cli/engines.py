"""`trt-wan list`, `show` and `rm`: the engines and caches on disk.

A key may be shortened as long as one engine fits.
"""

import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report, readable_bytes, table
from trt_wan.errors import GraphError, UsageError, shell_command, with_commands

if TYPE_CHECKING:
    from trt_wan.engines.store.entries import Entry
    from trt_wan.engines.store.folders import Folder
    from trt_wan.engines.store.manifest import Manifest
    from trt_wan.engines.store.measurements import Figure

SHORT = 8  # digits of a key that are shown
Row = dict[str, Any]


@click.command("list", short_help="List the engines and caches on disk.")
@command
def list_engines(*, report: Report) -> Any:
    """List the engines on disk, the last used first, and the other folders that trt-wan keeps.

    Only `show` also checks an engine's content.
    """
    from trt_wan.engines.store.entries import entries
    from trt_wan.engines.store.folders import folders
    from trt_wan.engines.store.manifest import folder

    found, others = entries(), folders()
    rows = [_described(entry) for entry in found]
    for row in rows:
        if row["state"] == "damaged":
            cure = shell_command(row["rebuild"] or _remove(row["key"]))
            note(report, with_commands(f"The engine {row['key'][:SHORT]} is damaged. Run:", cure))
    if not rows:
        note(report, with_commands(f"There are no engines in {folder()}. Make them:", "trt-wan build"))
    data = {
        "engines": rows,
        "bytes": sum(entry.bytes for entry in found),
        "folders": [dataclasses.asdict(other) for other in others],
    }
    tables = [_list_table(rows)] if rows else []
    tables += [_folder_table(others)] if others else []
    return "\n\n".join(tables) or None, data


@click.command("show", short_help="Describe an engine, with its measurements.")
@click.argument("key")
@command
def show_engine(*, report: Report, key: str) -> Any:
    """Describe the engine KEY, check that it is whole, and show its measured candidates."""
    from trt_wan.engines.store.entries import entries
    from trt_wan.engines.store.manifest import path_of
    from trt_wan.engines.store.measurements import figures_beside

    entry = _find(entries(), key)
    manifest = _manifest(entry)
    if manifest is None:
        raise GraphError(
            f"The engine {entry.key[:SHORT]} is damaged and has no manifest.", command=_remove(entry.key)
        )
    row = _described(entry)
    plan = path_of(entry.key, "plan")
    if row["state"] == "whole" and hashlib.sha256(plan.read_bytes()).hexdigest() != manifest.sha256:
        row["state"] = "damaged"
    figures = figures_beside(manifest.source)
    data = dataclasses.asdict(manifest) | {"state": row["state"], "used": row["used"]}
    data["candidates"] = [dataclasses.asdict(figure) for figure in figures]
    return f"{_in_words(manifest, row)}\n\n{_candidates(figures)}", data


@click.command("rm", short_help="Remove engines and caches.")
@click.argument("names", nargs=-1, metavar="KEY|FOLDER...")
@click.option("--all", "everything", is_flag=True, help="All engines and folders.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@command
def remove_engines(*, report: Report, names: tuple[str, ...], everything: bool, yes: bool) -> Any:
    """Remove engines by KEY, folders by name (`trt-wan list` shows both), or everything with --all.

    trt-wan makes all of it again when it is needed.
    """
    from trt_wan.engines.store.entries import entries, remove
    from trt_wan.engines.store.folders import ABOUT, clear, folders

    if bool(names) == everything:
        raise UsageError(
            "Which engines?",
            with_commands(
                "Name their keys, folders such as kernels, or everything with --all. List them:",
                "trt-wan list",
            ),
        )
    there, others = entries(), folders()
    if not everything:
        keys = [name for name in names if name not in ABOUT]
        there = list({entry.key: entry for entry in (_find(there, key) for key in keys)}.values())
        others = [other for other in others if other.name in names]
    if (there or others) and not yes and not _agreed(f"Remove {_size_of(there, others)}?"):
        return "Nothing was removed.", {"removed": [], "folders": [], "freed_bytes": 0}
    removed = [entry for entry in there if remove(entry.key)]
    cleared = [other for other in others if clear(other.name)]
    said = f"{_size_of(removed, cleared)} removed"
    busy = [entry.key[:SHORT] for entry in there if entry not in removed]
    if busy := [*busy, *(other.name for other in others if other not in cleared)]:
        raise GraphError(
            f"Another process is building {', '.join(busy)}; {said}.",
            "Run it again when that build has ended.",
        )
    return said, {
        "removed": [entry.key for entry in removed],
        "folders": [other.name for other in cleared],
        "freed_bytes": _bytes(removed, cleared),
    }


def _agreed(question: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("Without a terminal trt-wan cannot ask whether to remove engines.", "Add --yes.")
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # click's exception for Ctrl-C
        raise KeyboardInterrupt from None


def _count(engines: int) -> str:
    return "1 engine" if engines == 1 else f"{engines} engines"


def _size_of(engines: "Sequence[Entry]", others: "Sequence[Folder]") -> str:
    parts = [_count(len(engines))] if engines or not others else []
    parts += [other.name for other in others]
    return f"{', '.join(parts)} ({readable_bytes(_bytes(engines, others))})"


def _bytes(engines: "Sequence[Entry]", others: "Sequence[Folder]") -> int:
    return sum(entry.bytes for entry in engines) + sum(other.bytes for other in others)


def _remove(key: str) -> tuple[str, ...]:
    """The command that removes an engine."""
    return ("rm", key[:SHORT], "--yes")


def _find(there: "list[Entry]", key: str) -> "Entry":
    """The one engine whose key begins with `key`."""
    fitting = [entry for entry in there if key and entry.key.startswith(key.lower())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(
            f"{_count(len(fitting))} begin with {key!r}.", f"Name one of them: {_named(fitting)}."
        )
    starts = {entry.key[: max(SHORT, len(key))]: entry for entry in there}
    close = [starts[start] for start in difflib.get_close_matches(key.lower(), starts)]
    hint = f"Close to it: {_named(close)}. " if close else ""
    raise UsageError(f"There is no engine {key!r}.", with_commands(f"{hint}Run:", "trt-wan list"))


def _named(some: "list[Entry]") -> str:
    """Keys as long as it takes to tell them apart, with their networks."""
    length = SHORT
    while len({entry.key[:length] for entry in some}) < len(some):
        length += 1
    names = [f"{e.key[:length]} ({e.manifest.network if e.manifest else 'damaged'})" for e in some[:5]]
    return ", ".join(names) + (" …" if len(some) > 5 else "")


def _manifest(entry: "Entry") -> "Manifest | None":
    """Also of a damaged engine whose manifest is good: it holds the command that rebuilds it."""
    from trt_wan.engines.store.manifest import read_manifest

    return entry.manifest or read_manifest(entry.key)


DESCRIBED = "kind network about precision target gpu driver flavour version rebuild".split()


def _described(entry: "Entry") -> Row:
    """A row of `list`; an engine whose file has another size is damaged."""
    manifest = _manifest(entry)
    return {
        "key": entry.key,
        "state": "whole" if entry.manifest else "damaged",
        **{name: getattr(manifest, name, None) for name in DESCRIBED},
        "bytes": entry.bytes,
        "used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
    }


def _folder_table(others: "Sequence[Folder]") -> str:
    rows = [(other.name, str(other.files), readable_bytes(other.bytes), other.about) for other in others]
    return table([("FOLDER", "FILES", "BYTES", "CONTENT; MADE AGAIN BY"), *rows])


def _list_table(rows: list[Row]) -> str:
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


def _in_words(m: "Manifest", row: Row) -> str:
    again = shell_command(m.rebuild) if m.rebuild else "the next use builds it"
    if row["state"] == "damaged" and not m.rebuild:
        again = shell_command(_remove(m.key))
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


def _candidates(figures: "list[Figure]") -> str:
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
