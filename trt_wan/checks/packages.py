"""Packages and libraries: versions, the two ONNX Runtimes, CUDA's libraries, torch, the codecs of PyAV."""

import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from trt_wan.checks.check import Check, State, of_error, ok
from trt_wan.checks.machine import FoundGpu
from trt_wan.cli.missing import lacking_exporters
from trt_wan.cli.version import versions
from trt_wan.engines.gpu import HOPPER
from trt_wan.errors import EnvironmentBroken
from trt_wan.install import install_command


@dataclass(frozen=True)
class Library:
    packages: tuple[str, ...]
    use: str
    extra: str  # the extra of trt-wan that installs it
    hopper: bool  # advised on Hopper only; the others are needed on every GPU


LIBRARIES = {
    "nvrtc": Library(("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "our kernels", "rtx", False),
    "cublasLt": Library(("nvidia-cublas", "nvidia-cublas-cu12"), "products on Hopper", "hopper", True),
    "cudnn": Library(("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"), "attention on Hopper", "hopper", True),
}
CODECS = {"libx264": "the video in .mp4", "aac": "its sound"}
ALSO = {"libvpx-vp9": ".webm", "libopus": "the sound of .webm"}


def package_checks(gpu: FoundGpu | None) -> list[Check]:
    programs = [ok(name, text) for name, text in versions() if name != "GPU" and "not installed" not in text]
    libraries = [_library(name, row, gpu) for name, row in LIBRARIES.items()]
    return [*programs, onnxruntime_check(), *libraries, _torch(), _codecs()]


def onnxruntime_check() -> Check:
    from trt_wan.runtime.executors.onnxruntime import refuse_two_packages

    try:
        refuse_two_packages()
    except EnvironmentBroken as error:
        return of_error("onnxruntime", error)
    try:
        import onnxruntime
    except ImportError as error:
        return Check(
            "onnxruntime", "fault", f"It does not load: {error}.", "Run:", ("pip install onnxruntime-gpu",)
        )
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return ok("onnxruntime", f"{onnxruntime.__version__}, {', '.join(providers)}")


def _library(name: str, row: Library, gpu: FoundGpu | None) -> Check:
    for package in row.packages:
        with suppress(PackageNotFoundError):
            return ok(name, f"{version(package)} ({package})")
    with suppress(Exception):  # not found; its class differs between releases
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ok(name, str(load_nvidia_dynamic_lib(name).abs_path))
    text = f"not found; for {row.use}"
    if gpu is None or (row.hopper and gpu.capability != HOPPER):
        return ok(name, text)
    state: State = "warning" if row.hopper else "fault"
    return Check(name, state, text, "Run:", (install_command(row.extra),))


def _torch() -> Check:
    """Exporting needs it. It is not imported."""
    if lacking := lacking_exporters():
        text = f"{', '.join(lacking)} not installed: graphs of new sizes cannot be exported here."
        return Check("export", "warning", text, "To export here:", (install_command("build"),))
    return ok("export", f"torch {version('torch')}: graphs of new sizes are exported when they are needed")


def _codecs() -> Check:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    import av

    there = av.codecs_available
    if lacking := [f"{name} ({use})" for name, use in CODECS.items() if name not in there]:
        text = f"PyAV {av.__version__} lacks {', '.join(lacking)}."
        return Check(
            "codecs", "fault", text, "Install PyAV's own wheel:", ("pip install --force-reinstall av",)
        )
    without = [use for name, use in ALSO.items() if name not in there]
    return ok(
        "codecs", f"PyAV {av.__version__}: libx264, aac" + (f"; not {', '.join(without)}" if without else "")
    )
