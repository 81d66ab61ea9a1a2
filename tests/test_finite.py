"""A NaN or an infinity anywhere ends the job with the name of the layer, and of the weight that holds it."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_job import PLAN, prepare, write_sound

from trt_wan.cli.main import cli
from trt_wan.engines.contract import Network
from trt_wan.errors import NotFinite, WeightsError
from trt_wan.runtime.events import Event, StepDone
from trt_wan.runtime.executors import Array, Executor
from trt_wan.runtime.executors.forwarding import ForwardingExecutor
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.opening.model import open_model
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.weights.tiny import write_tiny_weights

Spoil = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module", autouse=True)
def home(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("finite")
    prepare(base / "clips", write_sound(base / "tone.m4a", 1))
    write_tiny_weights(base / "weights", seed=5)
    return base


def spoiled(base: Path, folder: Path, file: str, spoil: Spoil) -> WeightFiles:
    """The tiny weights with one file changed."""
    shutil.copytree(base / "weights", folder)
    (path,) = folder.glob(f"{file}*.safetensors")
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    return WeightFiles((folder,))


def first_of(name: str, value: float) -> Spoil:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].reshape(-1)[0] = value

    return spoil


def job(base: Path, **changes: object) -> Job:
    job = Job(Inputs.from_folder(base / "clips", "animate"), window=PLAN.frames, steps=2)
    return replace(job, **changes)  # type: ignore[arg-type]


def failure(files: WeightFiles, task: Job, **more: object) -> NotFinite:
    settings = Settings(executor="onnxruntime", text_cache=False)
    with open_model(files, settings, **more) as model, pytest.raises(NotFinite) as caught:  # type: ignore[arg-type]
        list(model.stream(task))
    return caught.value


@pytest.mark.parametrize(
    ("file", "tensor", "layer", "value"),
    [
        ("wan2.2", "blocks.1.self_attn.norm_q.weight", "attn_in 1", float("nan")),
        ("clip", "vision_model.pre_layrnorm.weight", "image_encoder_embed", float("inf")),
        *(
            pytest.param("wan2.2", *case, marks=pytest.mark.long)
            for case in (
                ("blocks.2.ffn.2.bias", "ffn 2", float("inf")),
                ("text_embedding.0.bias", "text_embed", float("-inf")),
                ("head.head.bias", "head", float("nan")),
            )
        ),
    ],
)
def test_a_damaged_weight_is_named(
    base: Path, tmp_path: Path, file: str, tensor: str, layer: str, value: float
) -> None:
    files = spoiled(base, tmp_path / "weights", file, first_of(tensor, value))
    message = failure(files, job(base)).message
    assert message.startswith(f"{layer} gives a NaN or an infinity as ")
    assert f": the tensor {tensor} of {files.folders[0]}" in message
    assert message.endswith("holds one (window 1 of 2, step 1 of 2).")


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.long)])
def test_a_damaged_decoder_makes_no_black_video(base: Path, tmp_path: Path, value: float) -> None:
    """The clamp to [-1, 1] would turn a NaN into black."""
    files = spoiled(base, tmp_path / "weights", "wan2.1", first_of("decoder.head.2.bias", value))
    message = failure(files, job(base)).message
    assert message.startswith("vae_decode_first gives a NaN or an infinity as frames: ")
    assert "tensor decoder.head.2.bias of " in message and message.endswith("(window 1 of 2, decoding).")


@pytest.mark.parametrize(
    "tensor",
    ["encoder.block.0.layer.0.layer_norm.weight", "encoder.final_layer_norm.weight", "shared.weight"],
)
def test_a_damaged_text_encoder_is_named(base: Path, tmp_path: Path, tensor: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor][...] = float("nan")

    files = spoiled(base, tmp_path / "weights", "umt5", spoil)
    assert f"tensor {tensor} " in failure(files, job(base)).message


@pytest.mark.parametrize("file", ["wan2.2", "umt5"])
@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -0.5])
def test_a_bad_scale_is_refused_before_anything_is_computed(
    base: Path, tmp_path: Path, file: str, scale: float
) -> None:
    names: list[str] = []

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        names.append(sorted(name for name in tensors if name.endswith("scale_weight"))[3])
        tensors[names[0]][...] = scale

    files = spoiled(base, tmp_path / "weights", file, spoil)
    with pytest.raises(WeightsError) as caught:
        open_model(files, Settings(executor="onnxruntime"))
    layer = names[0].removesuffix(".scale_weight")
    assert f"no positive number, such as {layer}.weight ({scale:g})" in caught.value.message


class Failing(ForwardingExecutor):
    """Spoils the outputs of one network, from its `after`-th call on, while `on`."""

    def __init__(self, executor: Executor, network: str, after: int) -> None:
        super().__init__(executor)
        self.network, self.left, self.on = network, after, True

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        first, *others = self.executor.run(network, n, inputs)
        if network.name == self.network and self.on:
            self.left -= 1
            if self.left < 0:
                first = np.full(first.shape, np.nan, np.float32)
        return (first, *others)


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.long), 2.0])
def test_finite_weights_are_not_blamed(base: Path, guidance: float) -> None:
    """The third step, which is in the second window, is computed again with its carried frames."""
    files = WeightFiles((base / "weights",))
    fault = failure(
        files,
        job(base, guidance=guidance),
        observe=lambda executor: Failing(executor, "patch_embed", 2 * int(guidance)),
    )
    assert fault.message == (
        "patch_embed gives a NaN or an infinity as x; its weights and inputs are finite "
        "(window 2 of 2, step 1 of 2)."
    )


def test_a_fault_that_does_not_come_back_is_told(base: Path) -> None:
    made: list[Failing] = []

    def observe(executor: Executor) -> Executor:
        made.append(Failing(executor, "ffn", 0))
        return made[-1]

    def heal(event: Event) -> None:
        if isinstance(event, StepDone):
            made[0].on = False

    settings = Settings(executor="onnxruntime", text_cache=False)
    with open_model(WeightFiles((base / "weights",)), settings, observe=observe) as model:
        with pytest.raises(NotFinite, match="computed again, it is one"):
            list(model.stream(job(base), progress=heal))
        assert len(list(model.stream(job(base)))) == 20, "the model stays usable"


def test_the_command_line_ends_with_the_layer(base: Path, tmp_path: Path) -> None:
    files = spoiled(base, tmp_path / "weights", "wan2.2", first_of("blocks.0.modulation", float("nan")))
    arguments = ["run", "--inputs", str(base / "clips"), "--weights", str(files.folders[0])]
    settings = ["--window", str(PLAN.frames), "--steps", "1", "-o", str(tmp_path / "out.mp4"), "--json"]
    result = CliRunner().invoke(cli, [*arguments, *settings])
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert result.exit_code == 1 and error["code"] == "not_finite"
    assert "the tensor blocks.0.modulation of " in error["message"]
    assert not (tmp_path / "out.mp4").exists()
