"""Where exported graphs live: one folder per model, plan and version of the graphs' own source.

    $TRT_WAN_HOME (or the user's cache)/graphs/<model>-<width>x<height>x<frames>-<precision>-<hash>/
        <network>.onnx …  manifest.json

The hash covers the model, the plan and the source that the graphs are made from, so a folder is never stale:
when any of them changes, the name does. The folder gets its name when everything in it is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contracts import networks
from trt_wan.engines.shape import Plan
from trt_wan.engines.store.home import home
from trt_wan.errors import GraphError

MANIFEST = "manifest.json"


@cache
def _source_hash() -> str:
    """Of everything the exported graphs depend on: configurations, contracts, graph functions, export."""
    package = Path(__file__).parents[1]
    build = package.parent / "build"
    if not (build / "models").is_dir():
        raise GraphError(f"The installation lacks {build / 'models'}.", "Install trt-wan again.")
    files = [package / f"{name}.py" for name in ("config", "shape", "precision", "contract")]
    files.append(build / "export.py")
    files += sorted((package / "contracts").glob("*.py")) + sorted((build / "models").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def graphs_folder(model: ModelConfig, plan: Plan) -> Path:
    """Where the graphs of `model` and `plan` are, or will be."""
    digest = hashlib.sha256(f"{model!r} {plan!r} {_source_hash()}".encode()).hexdigest()[:12]
    name = f"{model.name}-{plan.width}x{plan.height}x{plan.frames}-{plan.precision}-{digest}"
    return home() / "graphs" / name


def is_complete(folder: Path, model: ModelConfig, plan: Plan) -> bool:
    """Whether every graph is there, byte for byte as it was exported. They hold no weights: 2 MB in all."""
    return holds(folder, networks(model, plan))


def holds(folder: Path, names: Collection[str]) -> bool:
    """Whether `folder` is a finished one of exactly the graphs `names`."""
    try:
        exported = json.loads((folder / MANIFEST).read_text())["sha256"]
        return bool(exported == {name: _sha256(folder / f"{name}.onnx") for name in names})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def require_graphs(model: ModelConfig, plan: Plan) -> Path:
    """The folder of complete graphs; GraphError with the command that makes them when there is none."""
    folder = graphs_folder(model, plan)
    if is_complete(folder, model, plan):
        return folder
    state = "damaged" if folder.exists() else "not built"
    raise GraphError(
        f"The graphs of the model {model.name} for {plan.width}x{plan.height}, {plan.frames} frames per "
        f"window, {plan.precision}, are {state} ({folder}).",
        f"Run: trt-wan build --model {model.name} --size {plan.width}x{plan.height} --window {plan.frames} "
        f"--precision {plan.precision}",
    )


@contextmanager
def building(model: ModelConfig, plan: Plan) -> Iterator[Path | None]:
    """A temporary folder to export into, which becomes the store's folder when the block ends without an
    error.

    None if the graphs are already there. One process at a time builds a given folder; the others wait and
    then find it.
    """
    described = {"model": model.name, "plan": repr(plan)}
    with filling(graphs_folder(model, plan), networks(model, plan), described) as temporary:
        yield temporary


@contextmanager
def filling(final: Path, names: Collection[str], described: Mapping[str, str]) -> Iterator[Path | None]:
    """`building` for any folder of the graphs `names`; `described` goes into its manifest."""
    from filelock import FileLock

    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f"{final.name}.lock")):
        if holds(final, names):
            yield None
            return
        temporary = final.with_name(f"{final.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            exported = {path.stem: _sha256(path) for path in sorted(temporary.glob("*.onnx"))}
            (temporary / MANIFEST).write_text(json.dumps({**described, "sha256": exported}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


GraphExported = Callable[[str, float], None]  # name, seconds
