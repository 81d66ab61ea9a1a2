"""The LoRAs that this server has."""

from contextlib import suppress
from pathlib import Path

from trt_wan.errors import WeightsError
from trt_wan.runtime.preset_loras import loras_below
from trt_wan.runtime.weights_folders import searched_folders
from trt_wan.serve.settings import ServeSettings


def loras(settings: ServeSettings) -> dict[str, Path]:
    """The LoRAs in the folders of the server's weights, by their names there."""
    named = [Path(text.partition("=")[2]) for text in settings.model if text.startswith("--weights=")]
    found: dict[str, Path] = {}
    with suppress(WeightsError):
        for folder in searched_folders(named):
            for path in loras_below(folder):
                found.setdefault(str(path.relative_to(folder)), path)
    return found
