"""Exported graphs on disk: one folder per model, plan and version of the graphs.

    $TRT_WAN_HOME (or the user's cache)/graphs/<model>-<width>x<height>x<frames>-<precision>-<hash>/
        <network>.onnx …  manifest.json

The hash covers the model, the plan and the version of the contracts (GRAPHS_VERSION), so that graphs that
compute something else get another folder and a change of comments does not. The manifest has the hash of
every finished graph, and is written after each one: an export that was stopped or killed goes on with the
next graph, and a graph that is cut, edited or half written is exported again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import GRAPHS_VERSION, LYNX_GRAPHS_VERSION, networks
from trt_wan.engines.lynx import FacePlan, LynxPlan, lynx_of
from trt_wan.engines.shape import CameraPlan, Plan, ShardPlan, VaeTile
from trt_wan.engines.store.files import forget_partials, read_json, replace_atomically
from trt_wan.engines.store.home import home
from trt_wan.engines.store.locks import Waiting, held, in_silence
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

    def missing(self) -> tuple[str, ...]:
        """The graphs that are not there byte for byte as they were exported. They hold no weights: 2 MB."""
        manifest = read_manifest(self.folder)
        return tuple(name for name in self.names if not is_whole(self.folder, name, manifest))

    def complete(self) -> bool:
        return not self.missing()

    def require(self) -> Path:
        """The folder of complete graphs. Raises GraphError with the command that exports the missing ones."""
        missing = self.missing()
        if not missing:
            return self.folder
        if len(missing) == len(self.names):
            state = "not built"
        else:
            state = f"not complete: {len(missing)} of {len(self.names)} are missing or damaged"
        raise GraphError(f"The graphs of {self.title}, are {state} ({self.folder}).", command=self.command)

    @contextmanager
    def filling(self, waiting: Waiting = in_silence) -> Iterator[tuple[str, ...]]:
        """The missing graphs: export each into the folder, then call `finished` with its name.

        One process at a time exports a given set; the others call `waiting`, wait, and then find it.
        """
        with held(lock_of(self.folder), waiting=waiting):
            if not self.folder.is_dir():
                self.folder.unlink(missing_ok=True)  # a file in its place
                self.folder.mkdir()
            forget_partials(self.folder)
            yield self.missing()

    def finished(self, name: str) -> None:
        """Records the exported graph of a network, which counts from now on."""
        known = read_manifest(self.folder).sha256
        exported = {name: sha256 for name, sha256 in known.items() if name in self.names}
        exported[name] = _sha256(self.folder / f"{name}.onnx")
        manifest = {"graphs": self.title, "command": self.command, "names": self.names, "sha256": exported}
        replace_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1))


@dataclass(frozen=True)
class GraphManifest:
    """The manifest of a folder of graphs: the names of all graphs, and the hashes of the finished ones."""

    title: str = ""
    names: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    sha256: Mapping[str, object] = field(default_factory=dict)


def read_manifest(folder: Path) -> GraphManifest:
    """The manifest of a folder; one that is missing or damaged knows nothing."""
    match read_json(folder / MANIFEST):
        case {"graphs": str(title), "sha256": dict(sha256), "names": list(names), "command": list(command)}:
            return GraphManifest(title, tuple(map(str, names)), tuple(map(str, command)), sha256)
        case {"graphs": str(title), "sha256": dict(sha256)}:  # by releases that kept complete sets alone
            return GraphManifest(title, tuple(sha256), (), sha256)
    return GraphManifest()


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def named_folder(name: str, *origin: object) -> Path:
    """The folder of graphs that `origin` decides; its reprs go into the folder's hash."""
    digest = hashlib.sha256(" ".join(map(repr, origin)).encode()).hexdigest()[:12]
    return home() / "graphs" / f"{name}-{digest}"


def graph_set(model: ModelConfig, plan: Plan) -> GraphSet:
    size = f"{plan.width}x{plan.height}"
    parts = {VaeTile: "VAE tiles of ", CameraPlan: "camera control of "}
    part = parts.get(type(plan), "")
    if isinstance(plan, ShardPlan):
        part = f"a block's share of one of {plan.ranks} GPUs in "
    version: object = GRAPHS_VERSION
    if isinstance(plan, LynxPlan | FacePlan):
        part = "Lynx in "
        version = GRAPHS_VERSION, LYNX_GRAPHS_VERSION, lynx_of(model)
    return GraphSet(
        named_folder(f"{model.name}-{size}x{plan.frames}-{plan.precision}", model, plan, version),
        tuple(networks(model, plan)),
        f"{part}the model {model.name} for {size}, {plan.frames} frames per window, {plan.precision}",
        plan.build_command(model.name),
    )


def graphs_folder(model: ModelConfig, plan: Plan) -> Path:
    """The folder of the exported graphs of `model` and `plan`, which need not exist."""
    return graph_set(model, plan).folder


def require_graphs(model: ModelConfig, plan: Plan) -> Path:
    """The folder of complete graphs. Raises GraphError with the command that exports them."""
    return graph_set(model, plan).require()


def is_whole(folder: Path, name: str, manifest: GraphManifest) -> bool:
    """Whether a graph is finished, and the file has the bytes that were exported."""
    try:
        return manifest.sha256.get(name) == _sha256(folder / f"{name}.onnx")
    except OSError:
        return False


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
