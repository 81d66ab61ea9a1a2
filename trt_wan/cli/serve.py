"""`trt-wan serve`: videos over HTTP, with a web page (trt_wan/serve/)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_wan.cli.command import command, note
from trt_wan.cli.demo import DEMO_STEPS, DEMO_WINDOW, demo_weights
from trt_wan.cli.options import is_typed
from trt_wan.cli.preprocess import preprocess
from trt_wan.cli.report import Report
from trt_wan.cli.run import run
from trt_wan.cli.sections import SectionedCommand
from trt_wan.errors import EnvironmentBroken, UsageError, shown, with_commands
from trt_wan.install import install_command
from trt_wan.serve.settings import MODEL, NETWORKS, WEIGHTS

if TYPE_CHECKING:
    from trt_wan.serve.settings import ServeSettings

PACKAGES = ("fastapi", "uvicorn", "multipart", "prometheus_client")
# The options that a job may choose itself.
DEFAULTS = ("preset", "size", "window", "steps")
DEMO = {"window": DEMO_WINDOW, "steps": DEMO_STEPS, "size": "320x192"}


def _options(source: click.Command, names: tuple[str, ...]) -> list[click.Parameter]:
    by_name = {str(parameter.name): parameter for parameter in source.params}
    return [by_name[name] for name in names]


@click.command(cls=SectionedCommand, short_help="Serve videos over HTTP, with a web page.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of jobs, uploads and videos. Default: serve/ in trt-wan's cache.",
)
@click.option(
    "--token",
    envvar="TRT_WAN_TOKEN",
    help="Clients must send it. With another --host than this machine's one is made if none is given.",
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="A name of this server in URLs; may be repeated."
)
@click.option(
    "--allow-origin", multiple=True, metavar="URL", help="Another page that may call it; may be repeated."
)
@click.option(
    "--max-upload", type=click.IntRange(1), default=500, show_default=True, help="MB of one request."
)
@click.option(
    "--max-disk", type=click.IntRange(1, 10**6), default=100, show_default=True, help="GB of all jobs."
)
@click.option("--max-queue", type=click.IntRange(1), default=500, show_default=True, help="Jobs that wait.")
@click.option(
    "--max-frames", type=click.IntRange(1), default=5000, show_default=True, help="Frames of a clip."
)
@click.option(
    "--max-pixels", type=click.IntRange(256), default=1280 * 720, show_default=True, help="Of a frame."
)
@click.option(
    "--max-steps", type=click.IntRange(1), default=100, show_default=True, help="Steps of a window."
)
@click.option(
    "--warm-up/--no-warm-up",
    default=None,
    help="Open the model with one step at --size before the first job. Default: where there is a GPU.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Run jobs on the GPUs of a Ray cluster: its head, as 10.0.0.1:6379, or auto: the one here.",
)
@click.option(
    "--demo", is_flag=True, help="The tiny model with random weights and the sample: tries everything."
)
@command
def serve(
    *,
    report: Report,
    host: str,
    port: int,
    data: Path | None,
    token: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    max_upload: int,
    max_disk: int,
    max_queue: int,
    max_frames: int,
    max_pixels: int,
    max_steps: int,
    warm_up: bool | None,
    ray: str | None,
    demo: bool,
    **given: Any,
) -> Any:
    """Serve OpenAI's API for videos (POST /v1/videos) and a web page, on one model that stays open.

    \b
    trt-wan serve --demo
    trt-wan serve --weights models/ --tier fast
    trt-wan serve --weights models/ --host 0.0.0.0 --token "$TOKEN" --allow-host videos.example.org

    Jobs wait in a queue on the disk. A server that is stopped or killed goes on where it was.
    """
    _require_packages("serve", PACKAGES)
    if ray is not None:
        _require_packages("ray", ("ray",))
    from trt_wan.engines.store.home import home
    from trt_wan.runtime.device.driver import has_nvidia_gpu
    from trt_wan.serve.main import listen
    from trt_wan.serve.settings import LOOPBACK, MB, Limits, ServeSettings

    typed = {name: value for name, value in given.items() if is_typed(name)}
    model = _arguments(run, MODEL, typed)
    defaults = {name: _plain(typed[name]) for name in DEFAULTS if name in typed}
    if demo:
        model += _demo_model(report, typed)
        defaults = DEMO | defaults
    if host not in LOOPBACK and token is None:
        import secrets

        token = secrets.token_urlsafe(24)
        note(report, f"Clients need this token: {token}", "token", token=token)
    if token is not None and not (len(token) >= 8 and token.isascii() and token.isprintable()):
        raise UsageError(
            "A token has at least 8 letters, digits or signs of ASCII: a shorter one is guessed in minutes.",
            "Give another --token.",
        )
    for origin in allow_origin:
        if not origin.startswith(("http://", "https://")):
            raise UsageError(f"{shown(origin)} is no origin.", "Such as --allow-origin https://example.org")
    for name in NETWORKS:
        if name in typed and not Path(typed[name]).exists():
            raise UsageError(f"There is no {shown(typed[name])}.", f"Name the file with --{name}.")
    settings = ServeSettings(
        data=(data or home() / "serve").absolute(),
        model=tuple(model),
        preparing=tuple(_arguments(preprocess, NETWORKS, typed)),
        defaults=defaults,
        token=token,
        hosts=allow_host,
        origins=tuple(origin.rstrip("/") for origin in allow_origin),
        demo=demo,
        ray=ray,
        warm_up=(demo or has_nvidia_gpu()) if warm_up is None else warm_up,
        limits=Limits(
            upload=max_upload * MB,
            disk=max_disk * 10**9,
            queue=max_queue,
            frames=max_frames,
            pixels=max_pixels,
            steps=max_steps,
        ),
    )
    _require_jobs(settings)
    if not demo:
        _require_weights(report, model)
    return listen(settings, host, port, report), {}


serve.params += [
    *_options(run, MODEL),
    *_options(preprocess, NETWORKS),
    *_options(run, DEFAULTS),
]


def _require_jobs(settings: "ServeSettings") -> None:
    """Raises UsageError for settings with which every plain job would be refused. Jobs of a Ray cluster run
    on other machines.
    """
    from trt_wan.runtime.opening.model import refuse_on_cpu
    from trt_wan.serve.fields import arguments, require_possible
    from trt_wan.serve.orders import require_limits

    argv = [*settings.plain_model, *arguments("video", settings.defaults), "-o", "out.mp4"]
    params, options = require_possible("video", argv)
    require_limits(params, options, {}, params["size"], settings.limits)
    if settings.ray is None:
        refuse_on_cpu(options.settings())


def _require_packages(extra: str, packages: tuple[str, ...]) -> None:
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise EnvironmentBroken(
            f"The server's packages are not installed: {', '.join(missing)}.",
            with_commands("Install them:", install_command(extra)),
        )


def _arguments(source: click.Command, names: tuple[str, ...], typed: Mapping[str, Any]) -> list[str]:
    """The typed options for the jobs' own command lines; paths are absolute, for jobs run elsewhere."""
    made: list[str] = []
    for option in _options(source, names):
        if option.name not in typed:
            continue
        value, long = typed[option.name], max(option.opts, key=len)
        if isinstance(option, click.Option) and option.is_flag:
            made.append(long)
        elif isinstance(value, Mapping):
            made += [f"{long}={key}={choice}" for key, choice in value.items()]
        else:
            made += [f"{long}={_plain(one)}" for one in (value if isinstance(value, tuple) else (value,))]
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _demo_model(report: Report, typed: Mapping[str, Any]) -> list[str]:
    if given := [name for name in WEIGHTS if name in typed]:
        raise UsageError(
            f"The demo has weights of its own, so --{given[0].replace('_', '-')} would do nothing.",
            "Leave out --demo, or the weights.",
        )
    return [f"--weights={demo_weights(report)}"]


def _require_weights(report: Report, model: list[str]) -> None:
    """Raises TrtWanError before the server starts, for weights with which no job could run."""
    with run.make_context("trt-wan run", [*model, "-o", "out.mp4"]) as context:
        from trt_wan.cli.run import RunOptions

        named = {name: value for name, value in context.params.items() if name in MODEL and value is not None}
        options = RunOptions(**named)
    if options.random_weights is None:
        from trt_wan.runtime.weights.load import load_weights

        load_weights(options.folders(), options.weight_files().files, report.progress, "fp8")
