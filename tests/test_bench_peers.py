"""The peers on the CPU, tiny: what is timed computes what it should, and what cannot run says why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import as_argv

from trt_wan.benchmarks.peers import torch_attention
from trt_wan.benchmarks.peers.diffusers_model import DiffusersPeer, make_model
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.benchmarks.peers.table import PEERS
from trt_wan.benchmarks.peers.torch_fp8 import Fp8Linear, quantize_blocks
from trt_wan.cli.bench import PEER_NAMES
from trt_wan.engines.config import TINY
from trt_wan.runtime.weights.tiny import write_tiny_weights

SHAPE = Shape("tiny", 64, 48, 5)


@pytest.fixture(scope="module")
def peer() -> DiffusersPeer:
    return DiffusersPeer(make_model(SHAPE, "cpu"), SHAPE, "cpu", {})


@pytest.fixture(scope="module")
def stepped(peer: DiffusersPeer) -> torch.Tensor:
    """A step's result. It takes seconds, most of them for the faces."""
    with torch.inference_mode():
        return peer.step()


def test_random_weights_keep_the_model_alive(peer: DiffusersPeer, stepped: torch.Tensor) -> None:
    """Weights that explode or vanish would time another computation: of NaN, or of zeros."""
    velocity = stepped.float()
    assert velocity.shape == (1, 16, 3, 6, 8)
    assert velocity.isfinite().all() and 0.05 < float(velocity.std()) < 20
    kinds = {name: p.dtype for name, p in peer.model.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.scale_shift_table"] == torch.float32  # as from_pretrained leaves it


def test_the_module_built_without_memory_is_the_real_one(peer: DiffusersPeer, stepped: torch.Tensor) -> None:
    """Buffers are not in a state dict: the rotary table and the blur have to be made again."""
    from diffusers import WanAnimateTransformer3DModel

    real = WanAnimateTransformer3DModel(**dict(peer.model.config)).eval()
    real.load_state_dict({name: p.float() for name, p in peer.model.state_dict().items()}, strict=True)
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in peer.inputs.items()}
    with torch.inference_mode():
        expected = real(**inputs, return_dict=False)[0]
        error = (stepped.float() - expected).norm() / expected.norm()
    assert error < 0.05  # bf16 against float32


@pytest.mark.long
def test_a_peer_at_rest_holds_nothing_and_comes_back_the_same(
    peer: DiffusersPeer, stepped: torch.Tensor
) -> None:
    with torch.inference_mode():
        peer.rest()
        assert sum(p.untyped_storage().size() for p in peer.model.parameters()) == 0
        peer.wake()
        assert torch.equal(peer.step(), stepped)


def test_fp8_linears_are_near_the_layers_they_replace() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    quantised = Fp8Linear(linear)
    quantised.load(linear.weight)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    error = (quantised(x) - linear(x)).float().norm() / linear(x).float().norm()
    assert quantised(x).shape == (3, 5, 32) and 1e-3 < error < 0.06
    stored = quantised.fp8_weight.float().abs().amax(1)
    assert stored.min() == stored.max() == 448  # a scale per output channel uses the whole range


@pytest.mark.long
def test_fp8_replaces_every_linear_of_blocks_and_adapters() -> None:
    model = make_model(SHAPE, "cpu")
    quantize_blocks(model)
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("blocks.", "face_adapter."))
    ]
    assert left == []
    assert isinstance(model.blocks[0].attn1.to_out[0], Fp8Linear)
    peer = DiffusersPeer(model, SHAPE, "cpu", {})
    with torch.inference_mode():
        quantised = peer.step()
    peer.rest()
    peer.wake()  # refilled: other numbers of the same size
    with torch.inference_mode():
        assert 0.3 < float(peer.step().float().std() / quantised.float().std()) < 3


@pytest.mark.long
def test_self_attention_goes_to_the_chosen_kernel_and_nothing_else(
    peer: DiffusersPeer, stepped: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = diffusers_model_module()
    monkeypatch.setattr(module, "dispatch_attention_fn", module.dispatch_attention_fn)
    seen: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(k.shape))
        return torch_attention._native(q, k, v)

    with torch.inference_mode():
        monkeypatch.setattr(torch_attention, "_chosen", torch_attention._chosen)
        torch_attention.use_for_self_attention(attend, SHAPE.plan.tokens)
        assert torch.equal(peer.step(), stepped)
    assert seen == [(1, SHAPE.plan.tokens, 2, 128)] * TINY.transformer.layers


def diffusers_model_module() -> Any:
    from diffusers.models.transformers import transformer_wan_animate

    return transformer_wan_animate


def peer_command(name: str, *arguments: str, lines: str = "", **env: str) -> list[dict[str, Any]]:
    row = PEERS[name]
    command = [
        sys.executable,
        "-m",
        row.module,
        *row.arguments,
        *SHAPE.arguments(),
        "--device",
        "cpu",
        *arguments,
    ]
    ran = subprocess.run(command, input=lines, env=os.environ | env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.long
def test_a_peer_alone_says_everything_in_one_line() -> None:
    (result,) = peer_command("diffusers_eager", "--steps", "2", "--json")
    assert result["ran"] and len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    assert result["shape"] == {"model": "tiny", "width": 64, "height": 48, "window": 5}
    assert {"library", "precision", "attention", "compilation", "in the step", "offloading"} <= set(
        result["settings"]
    )
    assert result["first_step_seconds"] > 0 and result["part_seconds"]


def test_the_command_line_names_all_peers() -> None:
    assert PEER_NAMES == tuple(PEERS)


@pytest.mark.parametrize("name", ["lightx2v"])
def test_a_peer_that_cannot_run_says_why(name: str) -> None:
    (result,) = peer_command(name, "--serve", lines="3\n")
    assert not result["ran"] and len(result["reason"]) > 20


def test_a_package_that_is_not_installed_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("raise ModuleNotFoundError(\"No module named 'diffusers'\")")
    (result,) = peer_command("diffusers_eager", "--json", PYTHONPATH=str(tmp_path))
    assert (result["ran"], result["reason"]) == (False, "No module named 'diffusers'")


FAKE_LIGHTX2V = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
config = json.load(open(options["--config_json"]))
assert (config["target_width"], config["target_height"], config["target_video_length"]) == (64, 48, 5)
for step in range(config["infer_steps"]):
    seconds = 9.0 if step < 2 else 1.5
    print(f"[Profile] Single GPU - Level1_Log Run Dit every step cost {seconds:.6f} seconds", file=sys.stderr)
"""


def test_lightx2v_is_read_from_its_own_log(tmp_path: Path) -> None:
    """Two warm-up steps are asked for on top and left out; the configuration is the checkout's, our size."""
    (tmp_path / "lightx2v").mkdir()
    (tmp_path / "lightx2v" / "infer.py").write_text(FAKE_LIGHTX2V)
    config = tmp_path / "configs" / "wan22" / "wan_animate.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"infer_steps": 20, "self_attn_1_type": "flash_attn3"}))
    given = ("--path", str(tmp_path), "--weights", str(tmp_path))
    (result,) = peer_command("lightx2v", "--steps", "3", "--json", *given)
    assert result["seconds"] == [1.5, 1.5, 1.5]
    assert "flash_attn3" in result["settings"]["configuration"]


@pytest.mark.long
def test_diffusers_computes_our_velocities_from_our_weights_and_inputs(
    tiny_home: Path, tmp_path: Path
) -> None:
    """The whole of `bench quality --peers`, where both are float32: names, layouts and inputs are right."""
    write_tiny_weights(tmp_path / "weights", seed=3)
    options = f"--model tiny --size 64x48 --window 13 --weights {tmp_path / 'weights'} --steps 1 --no-frames"
    env = os.environ | {"TRT_WAN_HOME": str(tiny_home), "PATH": os.defpath}
    ran = subprocess.run(
        as_argv(f"trt-wan bench quality --peers {options}"), env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    quality = json.loads(ran.stdout.splitlines()[-1])
    (row,) = quality["rows"]
    assert row["name"] == "diffusers float32" and 0 < row["velocity_errors"][0] < 3e-5
    assert quality["not_measured"] == [] and "diffusers float32: velocity off by" in ran.stderr
