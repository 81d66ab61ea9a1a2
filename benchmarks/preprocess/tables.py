"""What `trt-wan bench preprocess` measured, as tables for people."""

from collections.abc import Callable, Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.preprocess.result import NetworkTimes, PreprocessResult, WholeTimes
from trt_wan.benchmarks.report.tables import giga, table


def render(result: PreprocessResult) -> Group:
    parts: list[RenderableType] = [_card(result), _networks(result)]
    parts += [_inside(n) for n in result.networks if n.inside]
    if result.whole:
        parts += [_whole(result), _parts(result)]
    if result.about_random:
        parts.append(Text(result.about_random, style="bold"))
    if result.not_measured:
        parts.append(Text("Not measured: " + "; ".join(result.not_measured)))
    return Group(*parts)


def _card(result: PreprocessResult) -> Table:
    card, gpu, (width, height) = result.card, result.card.gpu, result.size
    rows = [
        ("clip", f"{result.clip}: {result.frames} frames, {width}x{height}"),
        *((name, source) for name, source in result.sources.items()),
        ("host", f"{card.cpu}, {card.cores} cores, {card.memory_gb:.0f} GB, {card.system}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in card.packages.items())),
    ]
    if gpu:
        rows[0:0] = [("GPU", f"{gpu.name}, {gpu.memory}, driver {gpu.driver}, power limit {gpu.power_limit}")]
    shown = table(f"trt-wan {result.version}, {result.time}", "", "", rows=rows)
    shown.show_header = False
    shown.columns[1].justify = "left"
    return shown


def _networks(result: PreprocessResult) -> Table:
    heads = (
        "frames/s",
        "ms a frame",
        "runs",
        "TFLOP/s",
        "by arrays frames/s",
        "batch",
        "opened in",
        "GPU",
        "host",
    )
    title = (
        "Networks: frames per second from pictures to results; by arrays: prepared floats in, raw ones out"
    )
    return table(title, "", *heads, rows=map(_network_row, result.networks))


def _inside(n: NetworkTimes) -> Table:
    whole = sum(row.seconds for row in n.inside)
    rows = [
        (
            row.name,
            str(row.calls),
            f"{row.median * 1e3:.2f}",
            f"{row.seconds:.3f}",
            f"{row.seconds / whole:.0%}",
        )
        for row in n.inside
    ]
    heads = ("calls", "ms a call, median", "seconds a clip", "of all")
    return table(f"Inside {n.name}, over the clip once more", "", *heads, rows=rows)


def _network_row(n: NetworkTimes) -> tuple[str, ...]:
    arrays = n.by_arrays_rate
    prompts = f", {n.prompted} prompts" if n.prompted is not None else ""
    return (
        f"{n.name}{prompts}",
        f"{n.rate:.1f}",
        f"{1e3 / n.rate:.2f}",
        str(n.seconds.count),
        f"{n.rate * n.flops / 1e12:.3g}" if n.flops else "",
        f"{arrays:.1f}" if arrays else "",
        str(n.batch),
        f"{n.open_seconds:.1f} s",
        giga(n.usage.peak_memory_bytes),
        giga(n.host_peak_bytes),
    )


WHOLE: tuple[tuple[str, Callable[[WholeTimes], str]], ...] = (
    ("stages opened: seconds a clip", lambda w: _seconds(w.seconds)),
    ("  frames/s", lambda w: f"{w.rate:.1f}"),
    ("  finding the person", lambda w: _seconds(w.finding)),
    ("  writing the clips", lambda w: _seconds(w.writing)),
    ("  the first clip, warming up", lambda w: f"{w.first_seconds:.3f}"),
    ("opening the stages", lambda w: f"{w.open_seconds:.3f}"),
    ("whole command, from process start", lambda w: _seconds(w.command)),
    ("  of it opening and making", lambda w: _seconds(w.command_work)),
    ("clips made", lambda w: f"{w.frames} frames, {w.size[0]}x{w.size[1]}"),
    ("peak device memory", lambda w: giga(w.usage.peak_memory_bytes)),
    ("  of the whole command", lambda w: giga(w.command_usage.peak_memory_bytes)),
    ("peak host memory", lambda w: giga(w.host_peak_bytes)),
)


def _whole(result: PreprocessResult) -> Table:
    rows = [(name, *(value(w) for w in result.whole)) for name, value in WHOLE]
    title = "A whole preprocessing: seconds, median (p10 to p90) of n"
    return table(title, "", *(f"mode {w.mode}" for w in result.whole), rows=rows)


def _seconds(spread: Spread | None) -> str:
    if spread is None:
        return "not known"
    return f"{spread.median:.3f} ({spread.p10:.3f} to {spread.p90:.3f}) of {spread.count}"


def _parts(result: PreprocessResult) -> Table:
    names = list(dict.fromkeys(part.name for w in result.whole for part in w.parts))
    rows = [(name, *_part_cells(result.whole, name)) for name in names]
    rows.append(("rest", *(cell for w in result.whole for cell in (f"{w.rest:.3f}", ""))))
    heads = [head for w in result.whole for head in (w.mode, "beside it")]
    title = "Parts of it, stages opened: seconds on the thread that makes the folder, and on others beside it"
    return table(title, "", *heads, rows=rows)


def _part_cells(whole: Iterable[WholeTimes], name: str) -> Iterable[str]:
    for w in whole:
        part = next((part for part in w.parts if part.name == name), None)
        yield f"{part.seconds:.3f}" if part and part.seconds else ""
        yield f"{part.beside:.3f}" if part and part.beside else ""
