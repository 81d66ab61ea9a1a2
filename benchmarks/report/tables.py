"""A result as tables for people: the card, what a step is made of, stages, starts, peers."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trt_wan.benchmarks.measure.card import Card
from trt_wan.benchmarks.measure.quality import Quality, QualityRow
from trt_wan.benchmarks.measure.repeat import LARGEST_SPREAD, Repeated
from trt_wan.benchmarks.measure.spread import Spread
from trt_wan.benchmarks.measure.sweep import Point, Sweep, crossing
from trt_wan.benchmarks.report.compare import Comparison, Ratio
from trt_wan.benchmarks.report.result import OURS, WRITING, JobTimes, Result

COLUMNS = 120  # where stderr is no terminal


def console() -> Console:
    """On stderr; as wide as the terminal, or wide enough for the tables."""
    terminal = Console(stderr=True)
    return terminal if terminal.is_terminal else Console(stderr=True, width=COLUMNS)


def render(result: Result) -> Group:
    parts: list[RenderableType] = [
        _card(result),
        _ceilings(result),
        _work(result),
        _step(result),
        _stages(result),
        _ends(result),
    ]
    if result.not_measured:
        parts.append(Text("Not measured: " + "; ".join(result.not_measured)))
    return Group(*parts)


def table(title: str, *columns: str, rows: Iterable[Iterable[str]]) -> Table:
    """The first column is text, the others are figures."""
    found = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        found.add_column(column, justify="right" if i else "left")
    for row in rows:
        found.add_row(*row)
    return found


def _card(result: Result) -> Table:
    card, gpu = result.card, result.card.gpu
    rows = [
        (
            "job",
            f"{result.shape.title}, {result.tokens} tokens, {result.precision}, weights {result.weights}",
        ),
        ("settings", ", ".join(f"{k} {v}" for k, v in result.settings.items()) or "the defaults"),
        ("host", f"{card.cpu}, {card.cores} cores{_quota(card)}, {card.memory_gb:.0f} GB, {card.system}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in card.packages.items())),
    ]
    if gpu:
        rows[0:0] = [
            ("GPU", f"{gpu.name}, {gpu.memory}, driver {gpu.driver}"),
            (
                "clocks",
                f"{gpu.clock_now} now, {gpu.clock_highest} at most, memory {gpu.memory_clock_highest}; "
                f"power limit {gpu.power_limit}, {gpu.temperature} °C",
            ),
        ]
    rows += [("choice", choice) for choice in result.choices]
    shown = table(f"trt-wan {result.version}, {result.time}", "", "", rows=rows)
    shown.show_header = False
    shown.columns[1].justify = "left"
    return shown


def _ceilings(result: Result) -> Table:
    def rate(name: str, value: float | None, reason: str) -> str:
        if value is None:
            return f"not measured: {reason}"
        return f"{value / 1e12:.2f} TB/s" if name == "copy" else f"{value / 1e12:.4g} TFLOP/s"

    rows = [(c.name, c.shape, rate(c.name, c.rate, c.reason)) for c in result.ceilings]
    return table("Ceilings of this machine, measured", "what", "shape", "rate", rows=rows)


def _work(result: Result) -> Table:
    """FLOPs and least bytes of the whole job by part: one step, a window beside its steps, the rest."""
    rows = []
    most = max(row.linear + row.attention + row.convolution for row in result.work)
    factor, unit = (1e12, "TFLOP") if most >= 1e12 else (1e9, "GFLOP")

    def figure(flops: int) -> str:
        return f"{flops / factor:.3g}" if flops else ""

    for row in result.work:
        flops = row.linear + row.attention + row.convolution
        counts = (row.calls_step, row.calls_window, row.calls_job)
        cells = [f"{n} x" if n else "" for n in counts]
        kinds = (row.linear, row.attention, row.convolution)
        rows.append((row.name, *cells, figure(flops), *map(figure, kinds), f"{row.bytes / 1e9:.3g}"))
    heads = ("in a step", "window", "job", f"{unit} a call", "linear", "attention", "convolution", "GB")
    return table("Work: calls, FLOPs of one call, least bytes of one call", "network", *heads, rows=rows)


def _step(result: Result) -> Table:
    steps = result.steps
    rows = []
    for n in steps.networks:
        bound = n.bound_seconds
        rows.append(
            (
                n.name,
                str(n.calls),
                _milli(n.seconds),
                _milli(n.seconds / n.calls),
                f"{n.rate / 1e12:.4g}" if n.flops else "",
                _milli(bound),
                f"{n.seconds / bound:.2f}" if bound else "",
            )
        )
    total = sum(n.seconds for n in steps.networks)
    rows.append(("all networks", "", _milli(total), "", f"{result.step_flops / total / 1e12:.4g}", "", ""))
    bound = steps.bound_seconds
    rows.append(("lower bound", "", "", "", "", _milli(bound), _ratio(steps.seconds.median, bound)))
    sheet = steps.datasheet_seconds
    if sheet is not None:
        rows.append(
            ("at the datasheet's peaks", "", "", "", "", _milli(sheet), _ratio(steps.seconds.median, sheet))
        )
    heads = ("calls", "ms a step", "ms a call", "TFLOP/s", "bound ms", "times the bound")
    return table(f"A step of {OURS} ({steps.bound_about})", "network", *heads, rows=rows)


def _milli(seconds: float | None) -> str:
    return f"{seconds * 1e3:.2f}" if seconds is not None else "not known"


def _ratio(seconds: float, bound: float | None) -> str:
    return f"{seconds / bound:.2f}" if bound else ""


def _quota(card: Card) -> str:
    return "" if card.cpu_quota is None else f" (of which the container may use {card.cpu_quota:g})"


def _stages(result: Result) -> Table:
    jobs = [("warm", result.warm)] + ([("cold", result.cold)] if result.cold else [])
    names = list(dict.fromkeys(stage for _, job in jobs for stage in job.stages))
    rows = [
        (name, *(f"{job.stages.get(name, 0):.3f} ({job.stages_cpu.get(name, 0):.2f})" for _, job in jobs))
        for name in names
    ]
    rows += [(label, *(value(job) for _, job in jobs)) for label, value in _JOB_FIGURES]
    title = f"A whole job: one window, {len(result.warm.steps)} steps (seconds, in brackets of CPU)"
    if len(result.warm_jobs) > 1:
        title += f"; warm: the middle one of {len(result.warm_jobs)}"
    return table(title, "stage", *(f"{name} start" for name, _ in jobs), rows=rows)


_JOB_FIGURES: tuple[tuple[str, Callable[[JobTimes], str]], ...] = (
    (WRITING, lambda job: f"{job.writing_seconds:.3f}"),
    ("whole job", lambda job: f"{job.seconds:.3f} ({job.cpu_seconds:.2f})"),
    ("process start to first finished step", lambda job: f"{job.first_step_seconds:.3f}"),
    ("stopped by the container's quota", lambda job: _or_unknown(job.host.throttled_seconds)),
    ("CPUs given to others by the host", lambda job: _or_unknown(job.host.stolen_seconds)),
    ("peak device memory", lambda job: giga(job.usage.peak_memory_bytes)),
    ("peak host memory", lambda job: giga(job.host_peak_bytes)),
    ("energy", lambda job: f"{job.usage.joules:.0f} J" if job.usage.joules else "not known"),
)


def _or_unknown(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.2f}"


def giga(size: int | None) -> str:
    return f"{size / 1e9:.2f} GB" if size is not None else "not known"


def _ends(result: Result) -> Table:
    def row(
        title: str, s: Spread | None, start: float | None, memory: int | None, ours: float, reason: str
    ) -> tuple[str, ...]:
        if s is None:
            return title, f"not run: {reason}", "", "", "", "", ""
        first = f"{start:.1f} s" if start is not None else ""
        spread = f"{s.p10:.3f} to {s.p90:.3f}"
        return title, f"{s.median:.3f}", spread, str(s.count), f"{s.median / ours:.2f}", first, giga(memory)

    steps, ours = result.steps, result.steps.seconds.median
    first, memory = result.headlines()[f"{OURS} first step, warm"], result.warm.usage.peak_memory_bytes
    rows = [row(OURS, steps.seconds, first, memory, ours, "")]
    for p in result.peers:
        start = None if p.first_step_seconds is None else (p.build_seconds or 0) + p.first_step_seconds
        memory = next(iter(p.memory_bytes.values()), None)
        rows.append(row(p.title, p.seconds, start, memory, ours, p.reason))
    heads = ("s/step, median", "p10 to p90", "steps", "times ours", "first step after", "memory")
    host = _milli(steps.host_seconds.median)
    title = f"Seconds per step, {result.title}; the host asks for a step of ours in {host} ms"
    return table(title, "", *heads, rows=rows)


def parts_table(rows: Sequence[Repeated]) -> Table:
    """What the spread of starts and jobs comes from; no part has a limit of its own."""
    cells = (
        (row.name, f"{row.median:.3f} s", ", ".join(f"{v:.3f}" for v in row.values), f"{row.spread:.1%}")
        for row in rows
    )
    title = "What a start and a job are made of, warm (each run's median)"
    return table(title, "part", "median", "runs", "spread", rows=cells)


def repeat_table(rows: Sequence[Repeated], title: str) -> Table:
    def value(row: Repeated, figure: float) -> str:
        return giga(int(figure)) if row.name.endswith("memory") else f"{figure:.4g} s"

    cells = (
        (
            row.name,
            value(row, row.median),
            ", ".join(value(row, v) for v in row.values),
            f"{row.spread:.2%}",
            "" if row.steady else f"over {LARGEST_SPREAD:.0%}",
        )
        for row in rows
    )
    heads = ("median", "runs", "spread", "")
    return table(
        f"Repeatability: {title} (spread: the whole range over the median)", "figure", *heads, rows=cells
    )


def comparison_table(comparison: Comparison) -> Group:
    def cells(row: Ratio) -> tuple[str, ...]:
        if row.low is None or row.high is None:
            spread, verdict = "measured once", ""
        else:
            spread, verdict = (
                f"{row.low:.3f} to {row.high:.3f}",
                "differs" if row.differs else "no difference seen",
            )
        return row.name, f"{row.first:.4g}", f"{row.second:.4g}", f"{row.ratio:.3f}", spread, verdict

    heads = (comparison.first, comparison.second, "second / first", "95 % of the ratio", "")
    shown = table(f"{comparison.shape}: seconds, bytes", "figure", *heads, rows=map(cells, comparison.ratios))
    return Group(shown, *(Text(f"Different {warning}") for warning in comparison.warnings))


def sweep_table(sweep: Sweep) -> Group:
    def cells(p: Point) -> tuple[str, ...]:
        work = (str(p.tokens), f"{p.flops / 1e15:.3g}", f"{p.attention_share:.0%}")
        if p.seconds is None:
            return p.axis, p.label, *work, f"not measured: {p.reason}", "", "", ""
        rate = f"{p.flops / p.seconds.median / 1e12:.4g}"
        law = ""
        if sweep.rates is not None and p.axis in ("size", "window"):
            law = f"{p.seconds.median / sweep.rates.seconds(p.flops, p.attention_share):.2f}"
        return p.axis, p.label, *work, f"{p.seconds.median:.4g}", rate, law, giga(p.peak_memory_bytes)

    heads = ("point", "tokens", "PFLOP", "attention", "seconds", "TFLOP/s", "times the law", "memory")
    shown = table(f"Sweep, {sweep.card.hardware}", "axis", *heads, rows=map(cells, sweep.points))
    said = []
    if sweep.rates is not None:
        worst = max(abs(error) for error in sweep.errors)
        said.append(Text(f"Cost law over sizes and windows: {sweep.rates.text}; off by {worst:.1%} at most"))
    if sweep.law is not None:
        said.append(Text(f"As one power of the work: {sweep.law.text}"))
        local = ", ".join(
            f"{b.exponent:.2f} from {b.first / 1e15:.3g} to {b.second / 1e15:.3g}" for b in sweep.bends
        )
        said.append(Text(f"Exponent between neighbours (PFLOP): {local}"))
    if (pair := crossing(sweep.points)) is not None:
        said.append(
            Text(f"Attention takes most of a step from {pair[1].label} on ({pair[1].tokens} tokens).")
        )
    return Group(shown, *said)


def quality_table(quality: Quality) -> Group:
    def cells(row: QualityRow) -> tuple[str, ...]:
        errors = row.velocity_errors
        return (
            row.name,
            f"{max(errors):.2e}",
            ", ".join(f"{e:.1e}" for e in errors),
            "equal" if row.psnr is None else f"{row.psnr:.1f}",
            f"{row.ssim:.4f}",
            "not measured" if row.lpips is None else f"{row.lpips:.3f}",
        )

    heads = ("velocity, worst", "by step", "PSNR dB", "SSIM", "LPIPS")
    title = (
        f"Against {quality.reference}: {quality.shape.title}, seed {quality.seed}, {quality.card.hardware}"
    )
    shown = table(title, "", *heads, rows=map(cells, quality.rows))
    said = [Text(f"Weights: {quality.weights}."), *(Text(f"Not measured: {x}") for x in quality.not_measured)]
    return Group(shown, *said)
