"""`trt-wan list`, `show` and `rm`: the engines on disk. A key may be shortened as long as one engine fits."""

import dataclasses
import difflib
import hashlib
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.report import Report, readable_bytes, table
from trt_wan.errors import GraphError, UsageError

if TYPE_CHECKING:
    from trt_wan.engines.store.engines import Entry, Manifest
    from trt_wan.engines.store.measurements import Figure

SHORT = 8  # digits of a key that are shown
Row = dict[str, Any]


@click.command("list", short_help="List the engines on disk.")
@command
def list_engines(*, report: Report) -> Any:
    """List the engines on disk, what was used last first. Only `show` also checks their content."""
    from trt_wan.engines.store.engines import entries, folder

    found = entries()
    rows = [_described(entry) for entry in found]
    damaged = [row for row in rows if row["state"] == "damaged"]
    for row in damaged:
        note(
            report,
            f"The engine {row['key'][:SHORT]} is damaged. Run: {row['rebuild'] or _remove(row['key'])}",
        )
    if not rows:
        note(report, f"There are no engines in {folder()}. Run: trt-wan build")
    data = {"engines": rows, "bytes": sum(entry.bytes for entry in found)}
    return (_list_table(rows) if rows else None), data


@click.command("show", short_help="Say what an engine is, with its measurements.")
@click.argument("key")
@command
def show_engine(*, report: Report, key: str) -> Any:
    """Say what the engine KEY is, whether it is whole, and what the autotuning measured."""
    from trt_wan.engines.store.engines import entries, folder

    entry = _find(entries(), key)
    manifest = _manifest(entry)
    if manifest is None:
        raise GraphError(
            f"The engine {entry.key[:SHORT]} is damaged: what it was is not known.",
            f"Run: {_remove(entry.key)}",
        )
    row = _described(entry)
    plan = folder() / f"{entry.key}.plan"
    if row["state"] == "whole" and hashlib.sha256(plan.read_bytes()).hexdigest() != manifest.sha256:
        row["state"] = "damaged"
    data = dataclasses.asdict(manifest) | {
        "state": row["state"],
        "used": row["used"],
        "rebuild": row["rebuild"],
    }
    return _in_words(manifest, row), data


@click.command("rm", short_help="Remove engines.")
@click.argument("keys", nargs=-1, metavar="KEY...")
@click.option("--all", "everything", is_flag=True, help="All engines.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@command
def remove_engines(*, report: Report, keys: tuple[str, ...], everything: bool, yes: bool) -> Any:
    """Remove the engines KEY... or --all from the disk. `trt-wan build` makes them again."""
    from trt_wan.engines.store.engines import entries, remove

    if bool(keys) == everything:
        raise UsageError(
            "Which engines?", "Name their keys, or all of them with --all; trt-wan list shows them."
        )
    there = entries()
    chosen = there if everything else list({e.key: e for e in (_find(there, key) for key in keys)}.values())
    size = readable_bytes(sum(entry.bytes for entry in chosen))
    if chosen and not yes and not _agreed(f"Remove {_count(len(chosen))}, {size}?"):
        return "Nothing was removed.", {"removed": [], "freed_bytes": 0}
    removed = [entry for entry in chosen if remove(entry.key)]
    freed = sum(entry.bytes for entry in removed)
    said = f"{_count(len(removed))} removed, {readable_bytes(freed)} freed"
    if busy := [entry.key[:SHORT] for entry in chosen if entry not in removed]:
        raise GraphError(
            f"Another process is building {', '.join(busy)}; {said}.",
            "Run it again when that build has ended.",
        )
    return said, {"removed": [entry.key for entry in removed], "freed_bytes": freed}


def _agreed(question: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("Nobody can be asked here whether to remove engines.", "Add --yes.")
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # what click makes of Ctrl-C
        raise KeyboardInterrupt from None


def _count(engines: int) -> str:
    return "1 engine" if engines == 1 else f"{engines} engines"


def _remove(key: str) -> str:
    return f"trt-wan rm {key[:SHORT]} --yes"


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
    raise UsageError(f"There is no engine {key!r}.", f"{hint}Run: trt-wan list")


def _named(some: "list[Entry]") -> str:
    """Keys as long as it takes to tell them apart, with their networks."""
    length = SHORT
    while len({entry.key[:length] for entry in some}) < len(some):
        length += 1
    names = [f"{e.key[:length]} ({e.manifest.network if e.manifest else 'damaged'})" for e in some[:5]]
    return ", ".join(names) + (" …" if len(some) > 5 else "")


def _manifest(entry: "Entry") -> "Manifest | None":
    """Also of a damaged engine, if it still has a good manifest: that tells how to build it again."""
    from trt_wan.engines.store import engines as engine_store

    return entry.manifest or engine_store.read_manifest(entry.key)


def _described(entry: "Entry") -> Row:
    """A row of `list`. Whether it is damaged is told by the size of the file."""
    m = _manifest(entry)
    return {
        "key": entry.key,
        "state": "whole" if entry.manifest else "damaged",
        "network": m.network if m else None,
        "model": m.model if m else None,
        "width": m.width if m else None,
        "height": m.height if m else None,
        "frames": m.frames if m else None,
        "precision": m.precision if m else None,
        "target": m.target if m else None,
        "gpu": m.gpu if m else None,
        "driver": m.driver if m else None,
        "flavour": m.flavour if m else None,
        "version": m.version if m else None,
        "bytes": entry.bytes,
        "used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
        "rebuild": _rebuild(m) if m else None,
    }


def _rebuild(m: "Manifest") -> str:
    from trt_wan.engines.flavour import Flavour, FlavourName
    from trt_wan.engines.gpu import GpuKind, Target
    from trt_wan.engines.precision import Precision
    from trt_wan.engines.shape import Plan
    from trt_wan.engines.store.engine_id import EngineId
    from trt_wan.preprocess.onnx.engine import FileEngine
    from trt_wan.preprocess.sam2.engine import PREFIX, Sam2Engine

    flavour = Flavour(cast(FlavourName, m.flavour), m.version, None, m.flavour_reason)
    plan = Plan(m.width, m.height, m.frames, cast(Precision, m.precision))
    gpu = GpuKind(m.gpu, m.driver) if m.gpu is not None and m.driver is not None else None
    kind: type[EngineId] = Sam2Engine if m.network.startswith(PREFIX) else EngineId
    if m.network.endswith(".onnx"):
        kind = FileEngine
    return kind(m.network, m.model, plan, m.source, cast(Target, m.target), flavour, gpu).rebuild


def _list_table(rows: list[Row]) -> str:
    header = "KEY ENGINE MODEL SIZE PRECISION TARGET GPU TENSORRT BYTES USED STATE".split()
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
        case "SIZE":
            return f"{row['width']}x{row['height']}x{row['frames']}"
        case "GPU":
            return _gpu(row["gpu"], row["driver"])
        case "TENSORRT":
            return f"{row['flavour']} {row['version']}"
    return str(row[column.lower()])


def _gpu(name: str | None, driver: int | None) -> str:
    return f"{name}, CUDA {driver}" if name else "-"


def _in_words(m: "Manifest", row: Row) -> str:
    state = "whole" if row["state"] == "whole" else f"damaged; run: {row['rebuild']}"
    lines = [
        ("key", m.key),
        ("engine", m.network),
        ("first for", f"{m.model}, {m.width}x{m.height}, {m.frames} frames per window"),
        ("precision", m.precision),
        ("target", m.target if m.gpu is None else f"{m.target}: {_gpu(m.gpu, m.driver)}"),
        ("tensorrt", f"{m.flavour} {m.version} ({m.flavour_reason})"),
        ("built", f"{m.built}, in {m.build_seconds:.1f} s"),
        ("last used", str(row["used"])),
        ("plan", f"{readable_bytes(m.bytes)}, sha256 {m.sha256}"),
        ("graph", f"sha256 {m.source}"),
        ("state", state),
        ("rebuild", str(row["rebuild"])),
    ]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)
    return f"{text}\n\n{_candidates(m.candidates)}"


def _candidates(figures: "list[Figure]") -> str:
    """The fastest first; what has no time comes last, with the reason."""
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
