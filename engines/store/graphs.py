"""Exported graphs on disk: one folder per model, plan and version of the graphs.

    $TRT_WAN_HOME (or the user's cache)/graphs/<model>-<width>x<height>x<frames>-<precision>-<hash>/
        <network>.onnx …  manifest.json

The hash covers the model, the plan and the version of the contracts (GRAPHS_VERSION), so that graphs that
compute something else get another folder and a change of comments does not. The folder gets its name when
everything in it is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import GRAPHS_VERSION, networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.files import replace_atomically
from trt_wan.engines.store.home import home
from trt_wan.engines.store.locks import held
from trt_wan.errors import GraphError

MANIFEST = "manifest.json"

GraphExported = Callable[[str, float], None]  # name, seconds


@dataclass(frozen=True)
class GraphSet:
    """The graphs of one model and plan, whether they are exported or not."""

    folder: Path
    names: tuple[str, ...]
    title: str
    command: tuple[str, ...]  # the arguments of trt-wan that export them

    def complete(self) -> bool:
        """Whether every graph is there, byte for byte as it was exported. They hold no weights: 2 MB."""
        try:
            exported = json.loads((self.folder / MANIFEST).read_text())["sha256"]
            return bool(exported == {name: _sha256(self.folder / f"{name}.onnx") for name in self.names})
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def require(self) -> Path:
        """The folder of complete graphs. Raises GraphError with the command that exports them."""
        if self.complete():
            return self.folder
        state = "damaged" if self.folder.exists() else "not built"
        raise GraphError(f"The graphs of {self.title}, are {state} ({self.folder}).", command=self.command)

    @contextmanager
    def filling(self) -> Iterator[Path | None]:
        """A temporary folder to export into, which becomes the set's folder if the block raises nothing.

        Yields None if the graphs are already there. One process at a time exports a given set; the others
        wait and then find it.
        """
        final = self.folder
        with held(final.with_name(f"{final.name}.lock")):
            if self.complete():
                yield None
                return
            temporary = final.with_name(f"{final.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                yield temporary
                exported = {path.stem: _sha256(path) for path in sorted(temporary.glob("*.onnx"))}
                manifest = json.dumps({"graphs": self.title, "sha256": exported}, indent=1)
                replace_atomically(temporary / MANIFEST, manifest)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def named_folder(name: str, *origin: object) -> Path:
    """The folder of graphs that `origin` decides; its reprs go into the folder's hash."""
    digest = hashlib.sha256(" ".join(map(repr, origin)).encode()).hexdigest()[:12]
    return home() / "graphs" / f"{name}-{digest}"


def graph_set(model: ModelConfig, plan: Plan) -> GraphSet:
    size = f"{plan.width}x{plan.height}"
    return GraphSet(
        named_folder(f"{model.name}-{size}x{plan.frames}-{plan.precision}", model, plan, GRAPHS_VERSION),
        tuple(networks(model, plan)),
        f"the model {model.name} for {size}, {plan.frames} frames per window, {plan.precision}",
        plan.build_command(model.name),
    )


def graphs_folder(model: ModelConfig, plan: Plan) -> Path:
    """The folder of the exported graphs of `model` and `plan`, which need not exist."""
    return graph_set(model, plan).folder


def require_graphs(model: ModelConfig, plan: Plan) -> Path:
    """The folder of complete graphs. Raises GraphError with the command that exports them."""
    return graph_set(model, plan).require()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
