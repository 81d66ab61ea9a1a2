"""The command line: parse, build the dataclasses, call one function, print. Nothing heavy is imported to show
help.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C, SIGTERM or SIGHUP.
"""

import click

from trt_wan.cli.bench import bench
from trt_wan.cli.build import build
from trt_wan.cli.comfyui import comfyui
from trt_wan.cli.command import Group
from trt_wan.cli.demo import demo
from trt_wan.cli.doctor import doctor
from trt_wan.cli.engines import list_engines, remove_engines, show_engine
from trt_wan.cli.join import join
from trt_wan.cli.live import live
from trt_wan.cli.preprocess import preprocess
from trt_wan.cli.pull import pull
from trt_wan.cli.run import run
from trt_wan.cli.serve import serve
from trt_wan.cli.version import show_version
from trt_wan.cli.weights import weights


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the versions of trt-wan, its packages, the driver and the GPU.",
)
def cli() -> None:
    """Wan2.2-Animate: one picture of a character and a driving video in, a finished video out."""


SUBCOMMANDS = (
    run,
    live,
    serve,
    doctor,
    pull,
    build,
    bench,
    preprocess,
    join,
    list_engines,
    show_engine,
    remove_engines,
    weights,
    demo,
    comfyui,
)
for subcommand in SUBCOMMANDS:
    cli.add_command(subcommand)
