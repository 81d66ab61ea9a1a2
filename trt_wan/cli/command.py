"""Shared by all commands: the report, and the way from an exception to output and an exit code."""

import errno
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.report import Report, Result, StdoutLost, TextReport, report_for
from trt_wan.cli.session import current_session
from trt_wan.cli.stopping import forget, ignored, interrupts
from trt_wan.engines.store.environment import check_environment
from trt_wan.errors import MemoryShort, OutputError, Stopped, TrtWanError, UsageError, with_commands
from trt_wan.runtime.events import Note

if TYPE_CHECKING:
    from rich.console import RenderableType


def command(function: Callable[..., tuple[Result, dict[str, Any]]]) -> Callable[..., None]:
    """Gives a command its `report`, and turns its result or exception into output and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Events and the result as JSON lines on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress.")
    @wraps(function)
    def wrapped(as_json: bool, quiet: bool, **options: Any) -> None:
        session = current_session()
        report = session.report if session is not None else report_for(as_json, quiet)
        try:
            with interrupts():
                for name in check_environment():
                    note(report, f"trt-wan reads no variable {name}.", "unknown_variable", name=name)
                result = function(report=report, **options)
            with ignored():
                report.done(*result)
        except BrokenPipeError:
            raise  # the reader of stdout is gone: click ends quietly
        except (Exception, KeyboardInterrupt) as error:
            forget()
            told = _told(error)
            (TextReport(quiet) if isinstance(error, StdoutLost) else report).failed(told)
            if type(told) is TrtWanError:
                raise
            sys.exit(told.exit_code)

    return wrapped


def _told(error: BaseException) -> TrtWanError:
    """The error for the user; a plain TrtWanError stands for a mistake in trt-wan."""
    notes = "\n".join(getattr(error, "__notes__", ()))
    if isinstance(error, TrtWanError):
        return error
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        return Stopped("Stopped at once.", notes)
    if isinstance(error, MemoryError):
        hint = f"Use a smaller size or window.\n{notes}".strip()
        return MemoryShort(f"The memory is full ({error}).", hint)
    if isinstance(error, OSError):
        return _told_by_system(error, notes)
    message = f"{type(error).__name__}: {error}"
    return TrtWanError(
        message, f"This is a mistake in trt-wan: please report it, with the lines below. {notes}"
    )


def _told_by_system(error: OSError, notes: str) -> OutputError:
    """A file that cannot be written, with the way out: another disk, or another folder for the cache."""
    from trt_wan.engines.store.home import home

    file = error.filename or "A file"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "Free some space" if full else "Check the disk and its rights"
    if error.filename and Path(file).absolute().is_relative_to(home().absolute()):
        elsewhere = 'export TRT_WAN_HOME="$PWD/trt-wan-cache"'
        hint = with_commands(f"{hint}, or keep trt-wan's own files in another folder:", elsewhere)
    else:
        hint = f"{hint}."
    reason = "the disk is full" if full else error.strerror or str(error)
    return OutputError(f"{file}: {reason}.", "\n".join(filter(None, (hint, notes))))


class Command(click.Command):
    """Names the choices of an option that has none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadOptionUsage as error:
            option = next((each for each in self.params if error.option_name in each.opts), None)
            if option is not None and isinstance(option.type, click.Choice):
                choices = ", ".join(map(str, option.type.choices))
                text = f"{error.option_name} needs one of these behind it: {choices}."
                raise click.BadOptionUsage(error.option_name, text, error.ctx) from error
            raise


class Group(click.Group):
    """A group that reports click's own errors as JSON too, when the command line asks for JSON."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if not as_json:
                raise
            where = error.ctx.command_path if error.ctx else ctx.command_path
            report_for(as_json, quiet=True).failed(
                UsageError(error.format_message(), with_commands("Run:", f"{where} --help"))
            )
            ctx.exit(UsageError.exit_code)


def note(report: Report, text: str, code: str = "", **data: object) -> None:
    report.progress(Note(text, code, data))


def show(report: Report, tables: "RenderableType") -> None:
    """Prints a benchmark's tables for people: not in quiet runs, and not beside JSON lines."""
    if isinstance(report, TextReport) and not report.quiet:
        from trt_wan.benchmarks.report.sheet import console

        console().print(tables)
