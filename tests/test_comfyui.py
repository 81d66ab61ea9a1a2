"""The ComfyUI nodes, with a stand-in of ComfyUI and the real process. comfyui_by_hand.py has the real one."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_nets
import psutil
import pytest
import torch
from click.testing import CliRunner
from comfy_standin import Choice, Comfy, ComfyNode, InterruptProcessingException, Number, Widget
from tiny_job import PLAN, as_argv, prepare, read_frames, write_sound

from trt_wan import __version__
from trt_wan.api.media import video_file
from trt_wan.api.names import RENAMED
from trt_wan.api.preparing import prepare as prepare_clips
from trt_wan.cli.main import cli
from trt_wan.comfyui import install
from trt_wan.comfyui.messages import Animate, ModelChoice, Open
from trt_wan.comfyui.process import Process, RequestFailed
from trt_wan.comfyui.shared_frames import SHM, Block
from trt_wan.errors import MemoryShort, Stopped
from trt_wan.preprocess.pictures.masks import MaskShape
from trt_wan.runtime.colour_transfer import METHODS
from trt_wan.runtime.context.settings import Context
from trt_wan.runtime.events import Event, StepDone, silent
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.presets import PRESETS
from trt_wan.runtime.video.pictures import read_picture
from trt_wan.runtime.weights.tiny import write_tiny_weights
from trt_wan.worker.worker import WorkerDied

ROOT = Path(__file__).parents[1]
SHORT = {"window": PLAN.frames, "steps": 2, "seed": 7}
TINY = ModelChoice(random="tiny")
WORKFLOWS = sorted((install.PACK / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path) -> Iterator[Comfy]:
    made = Comfy(tmp_path_factory.mktemp("models"))
    folders = (*("diffusion_models", "vae", "text_encoders", "clip_vision", "loras"), "detection", "sam2")
    for name in folders:
        (made.models / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setenv("TRT_WAN_HOME", str(tiny_home))
        yield made
        node("asking").MODEL.close()


@pytest.fixture(autouse=True)
def calm(comfy: Comfy) -> None:
    comfy.shown.clear()
    comfy.freed.clear()


def node(module: str) -> Any:
    return importlib.import_module(f"trt_wan.comfyui.{module}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clips")
    return prepare(made, write_sound(made / "tone.m4a", 1))


@pytest.fixture(scope="module")
def media(folder: Path) -> dict[str, Any]:
    """The prepared clips as ComfyUI has them."""
    frames = {
        "reference_image": read_picture(folder / "src_ref.png")[None],
        "pose_video": read_frames(folder / "src_pose.mp4"),
        "face_video": read_frames(folder / "src_face.mp4"),
    }
    return {name: torch.from_numpy(values).float() / 255 for name, values in frames.items()}


@pytest.fixture(scope="module")
def quick(media: dict[str, Any]) -> dict[str, Any]:
    """One window, driven by the pose alone."""
    return {name: media[name][: PLAN.frames] for name in ("reference_image", "pose_video")}


@pytest.fixture(scope="module")
def wanted(folder: Path, comfy: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The frames of `trt-wan run`: of another process with as many threads, which decide the last bits."""
    out = tmp_path_factory.mktemp("run")
    options = " ".join(f"--{name} {value}" for name, value in SHORT.items())
    command = (
        f"trt-wan run --inputs {folder} --random-weights tiny {options} -o {out}/a.mp4 --frames {out}/frames"
    )
    subprocess.run(as_argv(command), check=True, capture_output=True)
    return np.stack([read_picture(path) for path in sorted((out / "frames").iterdir())])


def load(**chosen: Any) -> Any:
    tiny = {"diffusion_model": node("load_model").TINY, "preset": "quality20"}
    return node("load_model").LoadModel.run(**tiny | chosen).args[0]


def animate(model: Any, media: dict[str, Any], **chosen: Any) -> Any:
    (images,) = node("animate").AnimateCharacter.run(model=model, **SHORT | media | chosen).args
    assert images.dtype == torch.float32 and images.device.type == "cpu"
    return np.rint(images.numpy() * 255)


async def nodes() -> list[type[ComfyNode]]:
    return await node("extension").comfy_entrypoint().get_node_list()  # type: ignore[no-any-return]


def all_nodes() -> dict[str, type[ComfyNode]]:
    coroutine = nodes()
    try:
        coroutine.send(None)
    except StopIteration as done:
        return {made.checked_schema().node_id: made for made in done.value}
    raise AssertionError("get_node_list waits for something")


def test_schemas(comfy: Comfy) -> None:
    made = all_nodes()
    assert list(made) == ["TrtWanLoadModel", "TrtWanPreprocess", "TrtWanAnimate", "TrtWanBuild"]
    sockets = {"reference_image", "pose_video", "face_video", "background_video", "character_mask"}
    assert sockets <= {given.id for given in made["TrtWanAnimate"].checked_schema().inputs}
    assert made["TrtWanBuild"].checked_schema().is_output_node
    assert set(node("animate").COLOUR_MATCHES) == set(METHODS)


def test_comfyui_imports_no_heavy_package_of_ours() -> None:
    code = (
        "import sys; from pathlib import Path; from comfy_standin import Comfy; Comfy(Path()).install()\n"
        "import trt_wan.comfyui.extension\n"
        "print({'torch', 'cv2', 'av', 'onnxruntime', 'click', 'scipy'} & sys.modules.keys())"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "set()\n"


def test_a_job_has_the_frames_of_run_twice(comfy: Comfy, media: dict[str, Any], wanted: Any) -> None:
    model = load()
    process = node("asking").MODEL
    first, id = animate(model, media), process.id
    np.testing.assert_array_equal(first, wanted)
    assert comfy.shown == [(1, 4), (2, 4), (3, 4), (4, 4)], "two windows of two steps"
    assert comfy.freed == [1e30, 1e30], "ComfyUI's models leave the GPU"
    np.testing.assert_array_equal(animate(model, media), wanted)
    assert process.id == id, "the model stays open"
    if Path("/proc").exists():
        assert "libtorch" not in Path(f"/proc/{id}/maps").read_text()


def test_an_interrupt_keeps_the_model(comfy: Comfy, quick: dict[str, Any]) -> None:
    model, process = load(), node("asking").MODEL
    comfy.interrupt_at = 1
    with pytest.raises(InterruptProcessingException):
        animate(model, quick, steps=500)
    assert len(comfy.shown) == 1
    id = process.id
    comfy.interrupted = True
    with pytest.raises(InterruptProcessingException):
        animate(model, quick, steps=500)
    assert not comfy.interrupted
    assert animate(model, quick).shape == (PLAN.frames, PLAN.height, PLAN.width, 3)
    assert process.id == id


def test_errors_are_those_of_the_command_line(comfy: Comfy, quick: dict[str, Any]) -> None:
    model, process = load(), node("asking").MODEL
    id = process.id
    for given, says in (
        ({"character_mask": torch.zeros(13, 48, 64)}, "Background and mask belong to the mode replace"),
        ({"window": 14}, "14"),
        ({"pose_video": torch.full((13, 48, 64, 3), torch.nan)}, "pose_video has values that are no numbers"),
    ):
        with pytest.raises(Exception, match=says) as error:
            animate(model, {**quick, **given})
        assert type(error.value).__name__ == "NodeFailed" and "\n" in str(error.value)
    with pytest.raises(Exception, match="There is no file none.safetensors"):
        load(vae="none.safetensors")
    clip = {"reference_image": quick["reference_image"], "driving_video": quick["pose_video"]}
    with pytest.raises(Exception, match="There is no file none.onnx in ComfyUI's folder detection") as error:
        node("preprocess_clip").PreprocessClip.run(**clip, detector="detection/none.onnx")
    assert type(error.value).__name__ == "NodeFailed"
    assert process.id == id


@pytest.mark.long
def test_more_references(comfy: Comfy, quick: dict[str, Any]) -> None:
    model, batch = load(), torch.rand(2, 40, 30, 3)
    alone, several = animate(model, quick), animate(model, quick, more_references=batch)
    assert several.shape == alone.shape and not np.array_equal(several, alone)
    np.testing.assert_array_equal(animate(model, quick, references_as="slots"), alone)
    with pytest.raises(Exception, match="5 reference pictures are too many"):
        animate(model, quick, more_references=torch.rand(4, 40, 30, 3))


@pytest.mark.long
def test_a_person_is_replaced(comfy: Comfy, quick: dict[str, Any]) -> None:
    """Background and mask, a mask without the dimension of frames, and RGBA."""
    background = torch.rand(1, PLAN.height, PLAN.width, 3)
    mask = torch.zeros(PLAN.height, PLAN.width)
    mask[:, :32] = 1
    opaque = torch.cat((quick["reference_image"], torch.ones_like(quick["reference_image"][..., :1])), -1)
    given = {**quick, "reference_image": opaque, "background_video": background, "character_mask": mask}
    made = animate(load(), given)
    assert made.shape == (PLAN.frames, PLAN.height, PLAN.width, 3)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"steps": 4, "sampler": "lcm", "shift": 8.0, "window": 77, "overlap": 5}),
        ({"steps": 6, "sampler": "euler"}, {"steps": 6, "sampler": "euler", "overlap": 5}),
        ({"context": "static_standard"}, {"window": 77, "overlap": 1, "context": Context()}),
        (
            {"context": "static_standard", "window": 229},
            {"window": 229, "overlap": 5, "context": Context(whole=False)},
        ),
    ],
)
def test_zeros_are_those_of_the_preset(comfy: Comfy, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    animate = node("animate")
    zeros = dict.fromkeys(("steps", "guidance", "shift", "window", "overlap"), 0)
    texts = {"prompt": "a", "negative_prompt": "b", "sampler": animate.AS_PRESET}
    strengths = {"seed": 7, "pose_strength": 1.0, "face_strength": 1.0}
    made = animate._settings(PRESETS["native4"].recipe, **zeros | texts | strengths | given)
    ours = {RENAMED.get(name, name): value for name, value in made.items()}
    ours["seed"] = ours.pop("generator")
    job = Job(Inputs(Path("a.png"), Path("b.mp4"), None), **ours)
    assert {name: getattr(job, name) for name in wanted} == wanted


@pytest.mark.long
def test_dropping_the_model_frees_it(comfy: Comfy, quick: dict[str, Any]) -> None:
    """ComfyUI drops the value of the socket when memory is to be freed, or another workflow runs."""
    process = node("asking").MODEL
    first = load()
    second = load(preset="fast4")
    id = process.id
    del first
    assert process.id == id and id is not None
    animate(second, quick, keep_open=False)
    assert process.id is None and not psutil.pid_exists(id)
    second = load()
    assert process.id is not None
    del second
    assert process.id is None


@pytest.mark.long
def test_a_changed_file_is_read_again(comfy: Comfy, quick: dict[str, Any], tmp_path: Path) -> None:
    places = {
        "wan2.2": "diffusion_models",
        "wan2.1": "vae",
        "umt5_t": "text_encoders",
        "tokeni": "text_encoders",
        "clip_v": "clip_vision",
    }

    def write(seed: int) -> None:
        for path in write_tiny_weights(tmp_path / str(seed), seed):
            path.replace(comfy.models / places[path.name[:6]] / path.name)

    loading = node("load_model").LoadModel
    try:
        write(5)
        chosen = {"diffusion_model": node("load_model").AUTOMATIC, "preset": "none"}
        print_of, first = loading.fingerprint_inputs(**chosen), load(**chosen)
        before, id = animate(first, quick), node("asking").MODEL.id
        assert loading.fingerprint_inputs(**chosen) == print_of
        write(6)
        assert loading.fingerprint_inputs(**chosen) != print_of
        second = load(**chosen)
        del first
        assert not np.array_equal(animate(second, quick), before)
        named = {"diffusion_model": "wan2.2_animate_tiny_fp8_e4m3fn_scaled.safetensors"}
        third = load(**chosen | named)
        assert node("asking").MODEL.id == id, "other files are opened in the same process"
        assert third.choice.files["transformer"].parent.name == "diffusion_models"
        with pytest.raises(Exception, match="fast4"):
            load(**chosen | {"preset": "fast4"})  # its LoRA is missing
    finally:
        for name in set(places.values()):
            for path in (comfy.models / name).iterdir():
                path.unlink()


def blocks() -> set[Path]:
    """Shared memory of Python's."""
    return set(SHM.glob("psm_*"))


@pytest.mark.long
def test_preprocessing(comfy: Comfy, folder: Path, tmp_path: Path) -> None:
    box = np.array([[220, 100, 420, 400, 0.9, 0]], np.float32)
    onnx_nets.detector(comfy.models / "detection" / "yolo.onnx", box)
    onnx_nets.standing_pose(comfy.models / "detection" / "pose.onnx")
    frames = np.full((9, 96, 96, 3), 200, np.uint8)
    reference = read_picture(folder / "src_ref.png")[None]
    tensors = {"reference_image": reference, "driving_video": frames}
    before = blocks()
    made = (
        node("preprocess_clip")
        .PreprocessClip.run(
            **{name: torch.from_numpy(values).float() / 255 for name, values in tensors.items()},
            mode="replace",
            width=128,
            height=128,
            fps=24.0,
            grow=3,
            detector="detection/yolo.onnx",
            pose="detection/pose.onnx",
            segmenter="box",
        )
        .args
    )
    assert blocks() == before
    options = {
        "mask": MaskShape(grow=3),
        "detector": comfy.models / "detection" / "yolo.onnx",
        "pose": comfy.models / "detection" / "pose.onnx",
        "segmenter": "box",
    }
    clip = video_file(frames, "clip", tmp_path, 24)  # type: ignore[arg-type]
    reference_file = folder / "src_ref.png"
    want = prepare_clips(reference_file, clip, tmp_path / "out", "replace", (128, 128), options, silent)
    for tensor, name in zip(made, ("src_pose", "src_face", "src_bg", "src_mask"), strict=True):
        expected = read_frames(want / f"{name}.mp4")
        if name == "src_mask":
            expected = (expected[..., 0] >= 128) * 255
            assert 0 < expected.mean() < 255
        np.testing.assert_array_equal(np.rint(tensor.numpy() * 255), expected)
    assert comfy.shown and all(done <= total for done, total in comfy.shown)


@pytest.mark.long
def test_a_build(comfy: Comfy, tiny_home: Path) -> None:
    model = load()
    size = {"width": PLAN.width, "height": PLAN.height, "window": PLAN.frames}
    made = node("build_engines").BuildEngines.run(model=model, **size)
    assert made.args == (model,) and str(tiny_home) in made.ui.value
    assert node("asking").MODEL.id is None, "the build has the memory"


def requests(quick: dict[str, Any]) -> tuple[list[Block], Animate]:
    shared = {
        name: Block(values.shape, (values.numpy() * 255).astype(np.uint8))
        for name, values in zip(("image", "pose_video"), quick.values(), strict=True)
    }
    settings = {"mode": "animate", "segment_frame_length": PLAN.frames, "num_inference_steps": 500}
    return list(shared.values()), Animate(
        TINY, {name: block.frames for name, block in shared.items()}, settings, None
    )


@pytest.mark.long
def test_a_process_that_dies(comfy: Comfy, quick: dict[str, Any]) -> None:
    shared, job = requests(quick)

    def kill(event: Event) -> None:
        if isinstance(event, StepDone):
            os.kill(process.id or 0, signal.SIGKILL)

    with Process() as process:
        with pytest.raises(WorkerDied, match="was killed, as the system does when the memory is full"):
            process.ask(job, kill)
        assert process.id is None
        process.ask(Open(TINY))
        assert process.id is not None
        with pytest.raises(RequestFailed, match="There is no model 'huge'"):
            process.ask(Open(ModelChoice(random="huge")))
    with Process(grace=0) as process, pytest.raises(Stopped):
        process.ask(job, should_stop=lambda: True)
    assert process.id is None
    for block in shared:
        block.close()


def test_the_process_ends_with_comfyui() -> None:
    code = (
        "from trt_wan.comfyui.messages import ModelChoice, Open\n"
        "from trt_wan.comfyui.process import Process\n"
        "process = Process(); process.ask(Open(ModelChoice(random='tiny')))\n"
        "print(process.id, process._running._folder, flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    comfyui = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert comfyui.stdout is not None
    id, folder = comfyui.stdout.readline().split()
    assert psutil.pid_exists(int(id)) and Path(folder).is_dir()
    comfyui.kill()
    comfyui.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(id)) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_frames_that_do_not_fit() -> None:
    if not SHM.exists():
        pytest.skip("no /dev/shm")
    before = blocks()
    for size in (shutil.disk_usage(SHM).total + (1 << 30), 1 << 62):
        with pytest.raises(MemoryShort, match="GB of shared memory, and /dev/shm has"):
            Block((size,), iter(()))
    assert blocks() == before


def checkout(folder: Path) -> Path:
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "folder_paths.py").touch()
    return folder


def installed(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["comfyui", "install", *arguments])


def test_install_and_upgrade(tmp_path: Path) -> None:
    comfyui = checkout(tmp_path / "ComfyUI")
    ran = installed(str(comfyui))
    target = comfyui / "custom_nodes" / "trt-wan"
    assert ran.exit_code == 0 and str(target) in ran.stdout
    assert f'version = "{__version__}"' in (target / "pyproject.toml").read_text()
    assert (target / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert {path.name for path in (target / "example_workflows").iterdir()} >= {p.name for p in WORKFLOWS}
    (target / "old.py").touch()
    (comfyui / "custom_nodes" / ".trt-wan-killed.disabled").mkdir()
    assert installed(str(comfyui)).exit_code == 0
    assert not (target / "old.py").exists() and (target / "__init__.py").exists()
    assert [path.name for path in (comfyui / "custom_nodes").iterdir()] == ["trt-wan"], "no leftovers"


def test_install_refuses(tmp_path: Path) -> None:
    ran = installed(str(tmp_path))
    assert ran.exit_code == 2 and "is no ComfyUI" in ran.stderr
    theirs = checkout(tmp_path / "ComfyUI") / "custom_nodes" / "trt-wan"
    theirs.mkdir()
    (theirs / "pyproject.toml").write_text('[tool.comfy]\nPublisherId = "another"')
    ran = installed(str(tmp_path / "ComfyUI"))
    assert ran.exit_code == 2 and "is there and is not ours" in ran.stderr
    assert [path.name for path in theirs.iterdir()] == ["pyproject.toml"]


def test_another_python_is_told(tmp_path: Path) -> None:
    comfyui = checkout(tmp_path / "ComfyUI")
    python = comfyui / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    ran = installed(str(comfyui))
    assert ran.exit_code == 0
    (line,) = (line for line in ran.stderr.splitlines() if "-m pip install" in line)
    assert line.startswith(f"{python} -m pip install ") and "[build]" in line
    python.write_bytes(b"MZ")  # a program of Windows
    assert "pip install" in installed(str(comfyui)).stderr
    python.write_text(f"#!/bin/sh\necho {__version__}\n")
    assert "pip install" not in installed(str(comfyui)).stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(comfy: Comfy, path: Path) -> None:
    schemas = {name: made.checked_schema() for name, made in all_nodes().items()}
    workflow = json.loads(path.read_text())
    ours = [made for made in workflow["nodes"] if made["type"] in schemas]
    assert {"TrtWanLoadModel", "TrtWanAnimate"} <= {made["type"] for made in ours}
    for made in ours:
        schema = schemas[made["type"]]
        assert [given["name"] for given in made["inputs"]] == sorted(
            (given.id for given in schema.inputs),
            key=lambda id: [given["name"] for given in made["inputs"]].index(id),
        )
        values = list(made["widgets_values"])
        for widget in (given for given in schema.inputs if isinstance(given, Widget)):
            value = values.pop(0)
            if isinstance(widget, Choice):
                assert value in widget.options, (made["type"], widget.id)
            if isinstance(widget, Number):
                assert widget.min <= value <= widget.max, (made["type"], widget.id)
                if widget.control_after_generate:
                    assert values.pop(0) == "fixed"
        assert not values
        assert [output["name"] for output in made["outputs"]] == [o.display_name for o in schema.outputs]
