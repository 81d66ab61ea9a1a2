"""The model that a worker keeps open from command to command."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trt_wan.errors import GpuFault, Stopped
from trt_wan.runtime.events import silent
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.serve.orders import _networks
from trt_wan.serve.settings import ServeSettings
from trt_wan.worker import kept_model
from trt_wan.worker.kept_model import KeptModel


class Model:
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every basis that is opened, in order. `free` are the bytes of its GPU."""
    made: list[Any] = []
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"1")

    def open_basis(files: WeightFiles, settings: Settings, progress: object) -> Any:
        gpu = SimpleNamespace(free_bytes=lambda: basis.free)
        basis = SimpleNamespace(free=1 << 40, file=file, settings=settings, place=(gpu, None))
        basis.weights = SimpleNamespace(files={"vae": (file,)})
        basis.open = lambda export_tiles: Model()
        made.append(basis)
        return basis

    monkeypatch.setattr(kept_model, "open_basis", open_basis)
    return made


FILES, SETTINGS = WeightFiles(random="tiny"), Settings(keep_encoders=False)


def use(models: KeptModel, settings: Settings = SETTINGS) -> Any:
    with models.opened(models.basis(FILES, settings, silent), None) as model:
        return model


def test_the_next_command_gets_the_same_model(opened: list[Any]) -> None:
    models = KeptModel()
    assert use(models) is use(models) and len(opened) == 1
    assert opened[0].settings.keep_encoders, "the next job needs them again"


def test_other_settings_and_changed_files_open_another(opened: list[Any]) -> None:
    models = KeptModel()
    first = use(models)
    second = use(models, Settings(vram=12.0))
    opened[-1].file.write_bytes(b"22")
    third = use(models, Settings(vram=12.0))
    assert first.closed and second.closed and not third.closed and len(opened) == 3


@pytest.mark.parametrize("error, stays", [(Stopped("x"), True), (GpuFault("x"), False), (OSError(), False)])
def test_a_model_that_failed_is_closed(opened: list[Any], error: Exception, stays: bool) -> None:
    models = KeptModel()
    first = use(models)
    with pytest.raises(type(error)), models.opened(models.basis(FILES, SETTINGS, silent), None):
        raise error
    assert first.closed is not stays and (use(models) is first) is stays


@pytest.mark.parametrize("free, stays", [(10**9, False), (10**11, True)])
def test_the_preprocessing_gets_room_on_the_gpu(opened: list[Any], free: int, stays: bool) -> None:
    models = KeptModel()
    first = use(models)
    opened[0].free = free
    models.make_room()
    assert first.closed is not stays and len(opened) == 1
    use(models)


@pytest.mark.parametrize(
    "options, files, used",
    [
        ({}, {}, "detector pose"),
        ({"mode": "replace"}, {}, "detector pose sam2"),
        ({"mode": "replace", "segmenter": "box"}, {}, "detector pose"),
        ({}, {"keypoints": Path("k.json")}, ""),
        ({"retarget": "safe"}, {"keypoints": Path("k.json")}, "detector pose"),
    ],
)
def test_a_job_gets_the_networks_that_it_uses(options: Any, files: Any, used: str, tmp_path: Path) -> None:
    """The others would be refused, as on the command line."""
    networks: Callable[[str], str] = lambda name: f"--{name}=file"  # noqa: E731
    settings = ServeSettings(tmp_path, preparing=tuple(map(networks, ("detector", "pose", "sam2"))))
    assert _networks(settings, options, files) == [networks(name) for name in used.split()]
