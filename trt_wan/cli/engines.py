"""`trt-wan list`, `show` and `rm`: the engines, and everything else that trt-wan keeps on disk.

A key, or the name of a set of graphs, may be shortened as long as one fits.
"""

import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report, readable_bytes
from trt_wan.cli.store_tables import (
    SHORT,
    candidates,
    described,
    engine_table,
    file_table,
    files_in,
    folder_table,
    in_words,
    manifest_of,
    removal,
)
from trt_wan.errors import GraphError, UsageError, shell_command, with_commands

if TYPE_CHECKING:
    from trt_wan.engines.store.entries import Entry
    from trt_wan.engines.store.folders import Folder


@click.command("list", short_help="List the engines and everything else on disk.")
@command
def list_engines(*, report: Report) -> Any:
    """List the engines on disk, the last used first, and everything else that trt-wan keeps: graphs, kernels,
    measurements, caches, locks, and leftovers of stopped processes.

    Only `show` also checks the content.
    """
    from trt_wan.engines.store.entries import entries
    from trt_wan.engines.store.folders import GRAPHS, folders
    from trt_wan.engines.store.home import home

    found, others = entries(), folders()
    rows = [described(entry) for entry in found]
    for row in rows:
        if row["state"] == "damaged":
            cure = shell_command(row["rebuild"] or removal(row["key"]))
            note(report, with_commands(f"The engine {row['key'][:SHORT]} is damaged. Run:", cure))
    graphs = any(other.name.startswith(f"{GRAPHS}/") for other in others)
    if not rows and not graphs:
        note(report, with_commands(f"There are no graphs and no engines in {home()}. Run:", "trt-wan build"))
    elif not rows:
        note(report, "There are no engines, which a GPU needs. The CPU runs the graphs.")
    engine_bytes, total = sum(entry.bytes for entry in found), _bytes(found, others)
    data = {
        "home": str(home()),
        "engines": rows,
        "bytes": engine_bytes,
        "folders": [dataclasses.asdict(other) for other in others],
        "total_bytes": total,
    }
    tables = [engine_table(rows)] if rows else []
    tables += [folder_table(others)] if others else []
    tables += [f"{readable_bytes(total)} in {home()}"] if tables else []
    return "\n\n".join(tables) or None, data


@click.command("show", short_help="Describe an engine with its measurements, or list the files of a folder.")
@click.argument("name", metavar="KEY|FOLDER")
@command
def show_engine(*, report: Report, name: str) -> Any:
    """Describe the engine KEY, check that it is whole, and show its measured candidates. For a FOLDER of
    `trt-wan list`, such as kernels or a set of graphs, list the files; graphs are checked.
    """
    from trt_wan.engines.store.entries import entries
    from trt_wan.engines.store.folders import folders
    from trt_wan.engines.store.manifest import path_of
    from trt_wan.engines.store.measurements import figures_beside

    if (others := _folders_named(name, folders())) is not None:
        if not others:
            return f"There is nothing in {name}.", {"folders": []}
        contents = [(other, files_in(other.name)) for other in others]
        text = "\n\n".join(f"{other.name}: {other.about}\n{file_table(files)}" for other, files in contents)
        return text, {"folders": [dataclasses.asdict(other) | {"content": f} for other, f in contents]}
    entry = _find(entries(), name)
    manifest = manifest_of(entry)
    if manifest is None:
        raise GraphError(
            f"The engine {entry.key[:SHORT]} is damaged and has no manifest.", command=removal(entry.key)
        )
    row = described(entry)
    plan = path_of(entry.key, "plan")
    if row["state"] == "whole" and hashlib.sha256(plan.read_bytes()).hexdigest() != manifest.sha256:
        row["state"] = "damaged"
    figures = figures_beside(manifest.source)
    data = dataclasses.asdict(manifest) | {"state": row["state"], "used": row["used"]}
    data["candidates"] = [dataclasses.asdict(figure) for figure in figures]
    return f"{in_words(manifest, row)}\n\n{candidates(figures)}", data


@click.command("rm", short_help="Remove engines, graphs, caches and leftovers.")
@click.argument("names", nargs=-1, metavar="KEY|FOLDER...")
@click.option("--all", "everything", is_flag=True, help="All engines and folders.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@command
def remove_engines(*, report: Report, names: tuple[str, ...], everything: bool, yes: bool) -> Any:
    """Remove engines by KEY, folders by name (`trt-wan list` shows both), or everything with --all.

    trt-wan makes all of it again when it is needed. `graphs` means all sets of graphs, `leftovers` the parts
    that stopped processes left. What a process is making stays, and so do files that trt-wan did not make.
    """
    from trt_wan.engines.store.entries import entries, remove
    from trt_wan.engines.store.folders import STAY, clear, folders

    if bool(names) == everything:
        raise UsageError(
            "Which engines or folders?",
            with_commands(
                "Name their keys, folders such as kernels, or everything with --all. List them:",
                "trt-wan list",
            ),
        )
    there, others = entries(), folders()
    if everything:
        others = [other for other in others if other.name not in STAY]
    else:
        there, others = _named_by(names, there, others)
    if not there and not others:
        said = f"There is nothing in {', '.join(names)}." if names else "There is nothing on disk."
        return f"{said} Nothing was removed.", {"removed": [], "folders": [], "freed_bytes": 0}
    if not yes and not _agreed(f"Remove {_size_of(there, others)}?"):
        return "Nothing was removed.", {"removed": [], "folders": [], "freed_bytes": 0}
    removed = [entry for entry in there if remove(entry.key)]
    cleared = [other for other in others if clear(other.name)]
    said = f"{_size_of(removed, cleared)} removed" if removed or cleared else "nothing was removed"
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
        raise UsageError("Without a terminal trt-wan cannot ask whether to remove them.", "Add --yes.")
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # click's exception for Ctrl-C
        raise KeyboardInterrupt from None


def _count(number: int, one: str, many: str) -> str:
    return f"1 {one}" if number == 1 else f"{number} {many}"


def _size_of(engines: "Sequence[Entry]", others: "Sequence[Folder]") -> str:
    """What is removed, and its size: "2 engines, kernels (1.20 MB)"."""
    from trt_wan.engines.store.folders import GRAPHS

    graphs = [other for other in others if other.name.startswith(f"{GRAPHS}/")]
    parts = [_count(len(engines), "engine", "engines")] if engines else []
    parts += [_count(len(graphs), "set of graphs", "sets of graphs")] if graphs else []
    parts += [other.name for other in others if other not in graphs]
    return f"{', '.join(parts)} ({readable_bytes(_bytes(engines, others))})"


def _bytes(engines: "Sequence[Entry]", others: "Sequence[Folder]") -> int:
    return sum(entry.bytes for entry in engines) + sum(other.bytes for other in others)


def _named_by(
    names: Sequence[str], there: "list[Entry]", others: "list[Folder]"
) -> "tuple[list[Entry], list[Folder]]":
    """The engines and folders that `names` mean, each once. Raises UsageError for those that `rm` leaves."""
    from trt_wan.engines.store.folders import STAY

    engines: dict[str, Entry] = {}
    chosen: dict[str, Folder] = {}
    for name in names:
        if name in STAY:
            raise UsageError(
                f"{STAY[name][:1].upper()}{STAY[name][1:]} are not removed.",
                with_commands("See them:", f"trt-wan show {name}"),
            )
        folders = _folders_named(name, others)
        if folders is None:
            entry = _find(there, name)
            engines[entry.key] = entry
        chosen |= {folder.name: folder for folder in folders or ()}
    return list(engines.values()), list(chosen.values())


def _folders_named(name: str, there: "list[Folder]") -> "list[Folder] | None":
    """The folders that `name` means: `graphs` all sets, graphs/tiny the one that begins so. None: a key."""
    from trt_wan.engines.store.folders import GRAPHS, NAMES, STAY

    if name == GRAPHS:
        return [folder for folder in there if folder.name.startswith(f"{GRAPHS}/")]
    if name in NAMES or name in STAY:
        return [folder for folder in there if folder.name == name]
    if not name.startswith(f"{GRAPHS}/"):
        return None
    fitting = [folder for folder in there if folder.name.startswith(name.rstrip("/"))]
    fitting = [folder for folder in fitting if folder.name == name] or fitting
    if len(fitting) == 1:
        return fitting
    if not fitting:
        raise UsageError(f"There is no set of graphs {name!r}.", with_commands("Run:", "trt-wan list"))
    names = ", ".join(folder.name for folder in fitting)
    raise UsageError(f"{len(fitting)} sets of graphs begin with {name!r}.", f"Name one of them: {names}.")


def _find(there: "list[Entry]", key: str) -> "Entry":
    """The one engine whose key begins with `key`."""
    from trt_wan.engines.store.folders import NAMES

    fitting = [entry for entry in there if key and entry.key.startswith(key.lower())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        count = _count(len(fitting), "engine", "engines")
        raise UsageError(f"{count} begin with {key!r}.", f"Name one of them: {_named(fitting)}.")
    starts = {entry.key[: max(SHORT, len(key))]: entry for entry in there}
    close = difflib.get_close_matches(key.lower(), [*starts, *NAMES])
    engines = [starts[name] for name in close if name in starts]
    names = [*filter(None, [_named(engines)]), *(name for name in close if name in NAMES)]
    hint = f"Close to it: {', '.join(names)}. " if names else ""
    raise UsageError(
        f"There is no engine and no folder {key!r}.", with_commands(f"{hint}Run:", "trt-wan list")
    )


def _named(some: "list[Entry]") -> str:
    """Keys as long as it takes to tell them apart, with their networks."""
    length = SHORT
    while len({entry.key[:length] for entry in some}) < len(some):
        length += 1
    names = [f"{e.key[:length]} ({e.manifest.network if e.manifest else 'damaged'})" for e in some[:5]]
    return ", ".join(names) + (" …" if len(some) > 5 else "")
