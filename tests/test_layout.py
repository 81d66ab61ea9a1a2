"""The packaging promises: one import package made of top-level folders, in a checkout and in a wheel alike;
no torch at run time; never two ONNX Runtimes. Each rule stands for a failure that has been seen.
"""

import ast
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"build", "runtime", "preprocess", "engines", "benchmarks"}
NOT_PACKAGED = {"trt_wan", "tests", "scripts"}

# Loaded only when chosen by an attention provider that needs torch.
MAY_IMPORT_TORCH = ROOT / "runtime" / "segments" / "attention"
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript"}

PLATFORMS = {
    "linux x86_64": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "linux aarch64": {"sys_platform": "linux", "platform_machine": "aarch64"},
    "windows": {"sys_platform": "win32", "platform_machine": "AMD64"},
    "mac": {"sys_platform": "darwin", "platform_machine": "arm64"},
}
EXTRAS = PROJECT["project"]["optional-dependencies"]


def modules(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts)


def imported(module: Path) -> set[str]:
    """Every module that is imported anywhere in the file, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_code_folders_are_the_same_everywhere() -> None:
    """A folder that one of them forgets is seen by the editable install and missing in the wheel."""
    tools = PROJECT["tool"]
    wheel = tools["hatch"]["build"]["targets"]["wheel"]
    code = {path.name for path in ROOT.iterdir() if path.name[0] != "." and any(modules(path))}
    assert code - NOT_PACKAGED == FOLDERS
    assert wheel["sources"] == {name: f"trt_wan/{name}" for name in FOLDERS}
    assert set(wheel["packages"]) == FOLDERS | {"trt_wan"}
    assert set(tools["mypy"]["packages"]) == {f"trt_wan.{name}" for name in FOLDERS} | {"trt_wan"}
    assert set(tools["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == FOLDERS
    links = {path.name: path.resolve() for path in (ROOT / ".typing" / "trt_wan").iterdir()}
    assert links == {name: ROOT / name for name in FOLDERS}


def test_build_is_no_regular_package_for_pypas_build() -> None:
    """With build/__init__.py, `python -m build` in the checkout would find us instead of PyPA's build."""
    assert not (ROOT / "build" / "__init__.py").exists()


def test_gitignore_lets_build_in() -> None:
    """Every stock Python .gitignore has `build/`: git would ignore our source, and hatch leave it out."""
    lines = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert not lines & (FOLDERS | {f"**/{name}" for name in FOLDERS})


@pytest.mark.parametrize("folder", ["runtime", "preprocess", "engines", "trt_wan"])
def test_the_runtime_imports_no_torch(folder: str) -> None:
    for module in modules(ROOT / folder):
        if not module.is_relative_to(MAY_IMPORT_TORCH):
            heavy = {name.partition(".")[0] for name in imported(module)} & HEAVY
            assert not heavy, f"{module.relative_to(ROOT)} imports {heavy}"


# Arrows between folders go down only; the front (trt_wan) may import all of them.
BELOW = {
    "engines": set[str](),
    "runtime": {"engines"},
    "preprocess": {"runtime", "engines"},
    "build": {"runtime", "engines"},
    "benchmarks": {"build", "preprocess", "runtime", "engines"},
}
DEVICE_MAY_IMPORT = (  # runtime/device knows no model
    "trt_wan.errors",
    "trt_wan.engines.gpu",
    "trt_wan.engines.store.files",
    "trt_wan.engines.store.home",
    "trt_wan.runtime.device",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "trt_wan" else ("trt_wan", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE = {module_name(path): path for folder in ("trt_wan", *FOLDERS) for path in modules(ROOT / folder)}


def import_graph(package: dict[str, str]) -> dict[str, set[str]]:
    """The modules of `package` (name to source) that each imports, lazy imports included. `from a import b`
    counts for a.b alone if a.b is a module: a table such as engines/contracts/__init__.py may import the
    modules of its folder.
    """
    graph: dict[str, set[str]] = {name: set() for name in package}
    for name, source in package.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {one if one in package else str(node.module) for one in full}
        graph[name] = (graph[name] & package.keys()) - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other: strongly connected components, by Tarjan."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            place = stack.index(name)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(found)


def test_a_cycle_is_seen() -> None:
    sources = {
        "p.a": "def f():\n    from p import b",
        "p.b": "from p.c import x",
        "p.c": "import p.a\nimport p.d",
        "p.d": "import os",
    }
    assert cycles(import_graph(sources)) == [["p.a", "p.b", "p.c"]]
    assert cycles(import_graph(sources | {"p.c": "import p.d"})) == []


def test_no_modules_import_each_other() -> None:
    sources = {name: path.read_text() for name, path in PACKAGE.items()}
    assert cycles(import_graph(sources)) == []


@pytest.mark.parametrize("folder", BELOW)
def test_folders_import_only_what_lies_below_them(folder: str) -> None:
    allowed = BELOW[folder] | {folder, "errors", "install"}
    for module in modules(ROOT / folder):
        ours = {name for name in imported(module) if name.startswith("trt_wan.")}
        above = {name for name in ours if name.split(".")[1] not in allowed} - {"trt_wan.__version__"}
        assert not above, f"{module.relative_to(ROOT)} imports {above}"


def test_device_knows_no_model() -> None:
    for module in modules(ROOT / "runtime" / "device"):
        ours = {name for name in imported(module) if name.startswith("trt_wan.")}
        model = {name for name in ours if not name.startswith(DEVICE_MAY_IMPORT)}
        # `from trt_wan.engines import gpu` names the folder too.
        model -= {"trt_wan.engines", "trt_wan.engines.store", "trt_wan.runtime"}
        assert not model, f"{module.relative_to(ROOT)} imports {model}"


def test_nothing_but_tests_patches() -> None:
    patching = {name for name, path in PACKAGE.items() if {"unittest", "unittest.mock"} & imported(path)}
    assert not patching


def required(extras: set[str], platform: dict[str, str]) -> list[Requirement]:
    """What pip would look at for `trt-wan[extras]`, our own extras that name others included."""
    found, asked = [], [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    pending, seen = set(extras), set()
    while pending:
        extra = pending.pop()
        seen.add(extra)
        asked += [Requirement(line) for line in EXTRAS[extra]]
        pending |= {e for r in asked if r.name == "trt-wan" for e in r.extras} - seen
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({**platform, "extra": ""}):
            found.append(requirement)
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
def test_exactly_one_onnx_runtime_on_every_platform_with_any_extras(platform: str) -> None:
    """Installed together, onnxruntime and onnxruntime-gpu overwrite each other's files."""
    combinations = [c for n in range(len(EXTRAS) + 1) for c in itertools.combinations(EXTRAS, n)]
    assert len(combinations) == 2 ** len(EXTRAS)
    for extras in combinations:
        names = {requirement.name for requirement in required(set(extras), PLATFORMS[platform])}
        assert len(names & {"onnxruntime", "onnxruntime-gpu"}) == 1, (extras, names)


def test_dev_includes_build() -> None:
    """So that the recursion above is not idle, and `pip install -e .[dev]` can run every test."""
    names = {requirement.name for requirement in required({"dev"}, PLATFORMS["linux x86_64"])}
    assert {"torch", "onnx", "onnxscript", "pytest", "packaging"} <= names


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: a build that writes into it is noticed, and harms nothing."""
    copy = tmp_path_factory.mktemp("checkout") / "trt-wan"
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv*", "*.onnx")
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    before = set(checkout.rglob("*"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
    ]
    made = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert set(checkout.rglob("*")) == before, "building the wheel left files in the checkout"
    return zipfile.ZipFile(next(out.glob("*.whl")))


def packaged(checkout: Path) -> dict[str, bytes]:
    """Every file that an install must have, by its path in the wheel."""
    files = {}
    for name in ("trt_wan", *FOLDERS):
        prefix = "" if name == "trt_wan" else "trt_wan/"
        found = (path for path in (checkout / name).rglob("*") if path.is_file())
        files |= {prefix + path.relative_to(checkout).as_posix(): path.read_bytes() for path in found}
    return files


def test_the_wheel_holds_the_five_folders_and_the_sample(wheel: zipfile.ZipFile, checkout: Path) -> None:
    want = packaged(checkout)
    assert len(want) > 60 and {"trt_wan/sample/src_ref.png", "trt_wan/build/export.py"} <= set(want)
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(want), "the wheel and the checkout differ"
    assert all(wheel.read(name) == content for name, content in want.items())


def test_the_wheel_has_nothing_beside_trt_wan(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {"trt_wan"} == {name for name in top if not name.endswith(".dist-info")}
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"trt-wan = trt_wan.__main__:main" in wheel.read(entry_points)


def test_the_sdist_makes_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=checkout, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    want = {
        name.removeprefix("trt_wan/") if name.split("/")[1] in FOLDERS else name
        for name in packaged(checkout)
    }
    assert want <= names, f"missing in the sdist: {sorted(want - names)}"
    assert {"pyproject.toml", "README.md", "tests/test_layout.py"} <= names
    assert not {name for name in names if name.startswith(".typing")}


def test_the_wheel_works_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Its modules are its own, and its graphs go where the checkout's go: the same source, the same hash."""
    wheel.extractall(tmp_path)
    program = """
from importlib.util import find_spec
import trt_wan.cli.main, trt_wan.runtime.pipeline
from trt_wan.engines import shape as plan
from trt_wan.engines.store import graphs as store
from trt_wan.engines import config
files = [trt_wan.cli.main.__file__, trt_wan.runtime.pipeline.__file__, store.__file__]
names = ("build.export", "runtime.video.reader", "benchmarks")
files += [find_spec(f"trt_wan.{name}").origin for name in names]
print(store.graphs_folder(config.TINY, plan.Plan()).name, *files, len(trt_wan.__path__))
"""

    def printed(path: Path) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(path)}
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, cwd="/", env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    key, *files, paths = printed(tmp_path)
    assert all(file.startswith(f"{tmp_path}/trt_wan/") for file in files) and paths == "1", files
    assert key == printed(ROOT)[0]
