"""`trt-wan --version`: the versions that a report of a fault needs, in under a second.

They are read from the packages' metadata and from nvidia-smi. No package is imported.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from trt_wan import __version__
from trt_wan.cli.report import table

# By line the packages that can stand for it.
PACKAGES = {
    "TensorRT-RTX": ("tensorrt-rtx", "tensorrt_rtx"),
    "TensorRT": ("tensorrt",),
    "ONNX Runtime": ("onnxruntime-gpu", "onnxruntime"),
    "CUDA bindings": ("cuda-bindings",),
    "torch": ("torch",),
}


def versions() -> list[tuple[str, str]]:
    rows = [("trt-wan", __version__), ("Python", f"{platform.python_version()}, {platform.platform()}")]
    rows += [(line, _first(names)) for line, names in PACKAGES.items()]
    return [*rows, *_gpu()]


def _first(packages: tuple[str, ...]) -> str:
    for package in packages:
        try:
            return f"{version(package)} ({package})"
        except PackageNotFoundError:
            continue
    return "not installed"


def _gpu() -> list[tuple[str, str]]:
    from trt_wan.runtime.device.driver import nvidia_smi

    return [("GPU", row) for row in nvidia_smi()] or [("GPU", "no NVIDIA driver answers")]


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(table(versions()))
        ctx.exit()
