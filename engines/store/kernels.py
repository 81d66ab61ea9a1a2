"""Kernels that TensorRT-RTX finishes for a GPU, one file per plan, GPU and driver.

$TRT_WAN_HOME/kernels/<flavour>/<hash of the plan>-<hash of GPU and driver>.kernels
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.store.home import home


def folder() -> Path:
    return home() / "kernels"


@dataclass(frozen=True)
class KernelCache:
    """The place of the kernels for one GPU and driver; `driver` is its full version."""

    flavour: str
    gpu: str
    driver: str

    def file(self, plan_sha256: str) -> Path:
        place = hashlib.sha256(f"{self.gpu} {self.driver}".encode()).hexdigest()[:12]
        return folder() / self.flavour / f"{_short(plan_sha256)}-{place}.kernels"


def kernel_bytes(plan_sha256: str) -> int:
    """The size of a plan's kernels, for all GPUs and drivers."""
    size = 0
    for path in _files(plan_sha256):
        with suppress(FileNotFoundError):  # removed meanwhile by another process
            size += path.stat().st_size
    return size


def forget_kernels(plan_sha256: str) -> None:
    """Removes a plan's kernels."""
    for path in _files(plan_sha256):
        path.unlink(missing_ok=True)


def forget_orphans(plans: Collection[str]) -> None:
    """Removes the kernels of all plans but those with the hashes `plans`."""
    known = {_short(sha256) for sha256 in plans}
    for path in folder().glob("*/*.kernels"):
        if path.name.partition("-")[0] not in known:
            with suppress(OSError):
                path.unlink()


def _files(plan_sha256: str) -> Iterator[Path]:
    return folder().glob(f"*/{_short(plan_sha256)}-*.kernels")


def _short(sha256: str) -> str:
    return sha256[:32]
