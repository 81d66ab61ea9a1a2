"""Where fetched files are put: the cache of huggingface_hub, or the folders of a ComfyUI.

A file under its final name is complete and has been checked. Until then its bytes are in a file that ends in
`.incomplete`, beside it, which a later call goes on with.
"""

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trt_wan.engines.store.files import can_make, replace_atomically
from trt_wan.errors import UsageError, with_commands
from trt_wan.runtime.published.files import PublishedFile
from trt_wan.runtime.weights.find_files import files_below

INCOMPLETE = ".incomplete"
# The relight LoRA is found under diffusion_models too, where the official page puts it.
ALSO = {"loras": ("diffusion_models",), "diffusion_models": ("unet",), "text_encoders": ("clip",)}


@dataclass(frozen=True)
class Remote:
    """A file as the Hub has it now."""

    url: str
    commit: str
    etag: str  # the SHA-256 of every large file
    size: int


class Place(Protocol):
    def find(self, file: PublishedFile) -> Path | None:
        """The file, if it is there with the size that it should have."""
        ...

    def require_free(self, file: PublishedFile) -> None:
        """Raises UsageError if its final name belongs to a file with other content."""
        ...

    def incomplete(self, file: PublishedFile, remote: Remote) -> Path:
        """Where its bytes are collected. Its folder has to be made."""
        ...

    def lock(self, file: PublishedFile, remote: Remote) -> Path:
        """Held by the process that fetches it."""
        ...

    def put(self, file: PublishedFile, remote: Remote) -> Path:
        """Gives the complete file its final name."""
        ...


@dataclass(frozen=True)
class ComfyFolder:
    """`models` is ComfyUI's folder of that name."""

    models: Path

    def find(self, file: PublishedFile) -> Path | None:
        folders = [self.models / name for name in (file.folder, *ALSO.get(file.folder, ()))]
        found = (path for path in files_below(folders) if path.name == file.name)
        return next((path for path in found if _fits(path, file)), None)

    def require_free(self, file: PublishedFile) -> None:
        target = self._target(file)
        if target.exists():
            raise UsageError(
                f"{target} has {target.stat().st_size} bytes, and the published file has {file.size}.",
                "Move it away, or name another folder with --into.",
            )

    def incomplete(self, file: PublishedFile, remote: Remote) -> Path:
        return self._target(file).with_name(f".{file.name}.{remote.etag[:12]}{INCOMPLETE}")

    def lock(self, file: PublishedFile, remote: Remote) -> Path:
        return self._target(file).with_name(f".{file.name}.lock")

    def put(self, file: PublishedFile, remote: Remote) -> Path:
        self.incomplete(file, remote).replace(self._target(file))
        return self._target(file)

    def _target(self, file: PublishedFile) -> Path:
        return self.models / file.folder / file.name


@dataclass(frozen=True)
class HubCache:
    """The cache that huggingface_hub shares between programs, in its layout and with its locks:
    models--<owner>--<name>/{blobs/<etag>, snapshots/<commit>/<path>, refs/<revision>}.
    """

    root: Path

    def find(self, file: PublishedFile) -> Path | None:
        found = sorted((self._folder(file) / "snapshots").glob(f"*/{file.path}"))
        return next((path for path in found if _fits(path, file)), None)

    def require_free(self, file: PublishedFile) -> None:
        pass  # blobs are named by their content

    def incomplete(self, file: PublishedFile, remote: Remote) -> Path:
        return self._folder(file) / "blobs" / f"{remote.etag}{INCOMPLETE}"

    def lock(self, file: PublishedFile, remote: Remote) -> Path:
        return self.root / ".locks" / self._folder(file).name / f"{remote.etag}.lock"

    def put(self, file: PublishedFile, remote: Remote) -> Path:
        folder = self._folder(file)
        blob, link = folder / "blobs" / remote.etag, folder / "snapshots" / remote.commit / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        self.incomplete(file, remote).replace(blob)
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:  # Windows without the right to make links: huggingface_hub does the same
            blob.replace(link)
        if file.revision != remote.commit:
            replace_atomically(folder / "refs" / file.revision, remote.commit)
        return link

    def _folder(self, file: PublishedFile) -> Path:
        return self.root / f"models--{file.repository.replace('/', '--')}"


def hub_cache() -> HubCache:
    """The cache of this user: HF_HUB_CACHE, or `hub` in HF_HOME, or ~/.cache/huggingface/hub. As
    huggingface_hub decides, whose import takes a quarter of a second.
    """
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return HubCache(Path(os.path.expanduser(os.path.expandvars(named))))
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return HubCache(Path(os.path.expanduser(os.path.expandvars(home))) / "hub")


def comfy_folder(folder: Path) -> ComfyFolder:
    """The folders in a ComfyUI, or in its models/. Raises UsageError."""
    if not folder.is_dir():
        hint = "Give --into a ComfyUI, its models/, or a folder for the models"
        if can_make(folder):
            hint = with_commands(f"{hint}. To make one:", f"mkdir -p {shlex.quote(str(folder / 'models'))}")
        else:
            hint = f"{hint}. This one cannot be made there: choose a place that you can write to."
        raise UsageError(f"There is no folder {folder}.", hint)
    return ComfyFolder(folder / "models" if (folder / "models").is_dir() else folder)


def _fits(path: Path, file: PublishedFile) -> bool:
    with suppress(OSError):
        return file.size in (None, path.stat().st_size)
    return False
