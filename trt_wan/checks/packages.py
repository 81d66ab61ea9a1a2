"""Packages and libraries: versions, the two ONNX Runtimes, CUDA's libraries, torch, the codecs of PyAV."""

import os
from importlib.metadata import PackageNotFoundError, version

from trt_wan.checks.check import Check, of_error, ok
from trt_wan.cli.missing import lacking_exporters
from trt_wan.cli.version import versions
from trt_wan.errors import EnvironmentBroken
from trt_wan.install import install_command

# By library its package, its use, and the extra that installs it.
LIBRARIES = {
    "nvrtc": ("nvidia-cuda-nvrtc", "compiles our own kernels", "rtx"),
    "cublasLt": ("nvidia-cublas", "candidates of the extra hopper", "hopper"),
    "cudnn": ("nvidia-cudnn-cu13", "attention of the extra hopper", "hopper"),
}
NEEDED_ON_A_GPU = ("nvrtc",)
CODECS = {"libx264": "the video in .mp4", "aac": "its sound"}
ALSO = {"libvpx-vp9": ".webm", "libopus": "the sound of .webm"}


def package_checks(has_gpu: bool) -> list[Check]:
    programs = [ok(name, text) for name, text in versions() if name != "GPU" and "not installed" not in text]
    return [
        *programs,
        onnxruntime_check(),
        *map(lambda name: _library(name, has_gpu), LIBRARIES),
        _torch(),
        _codecs(),
    ]


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


def _library(name: str, has_gpu: bool) -> Check:
    package, use, extra = LIBRARIES[name]
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        where = load_nvidia_dynamic_lib(name).abs_path
    except Exception:  # its class differs between releases
        state = "fault" if has_gpu and name in NEEDED_ON_A_GPU else "ok"
        if state == "ok":
            return ok(name, f"not found; {use}")
        return Check(name, "fault", f"Not found; it {use}.", "Run:", (install_command(extra),))
    try:
        return ok(name, f"{version(package)} ({package})")
    except PackageNotFoundError:
        return ok(name, str(where))


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
