"""diffusers' WanAnimateTransformer3DModel with random weights or a checkpoint's, and random inputs.

The module is built without memory and filled on the device, so that the 14B is ready in seconds. Parameter
types are those of `from_pretrained(torch_dtype=bfloat16)`. Inputs are random and the same in every step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import WanRotaryPosEmbed
from torch.nn.attention import SDPBackend, sdpa_kernel

from trt_wan.benchmarks.peers.child import WARM_UP, NotRun
from trt_wan.benchmarks.peers.diffusers_arguments import diffusers_arguments
from trt_wan.benchmarks.peers.shape import Shape
from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Part
from trt_wan.runtime.weights.checkpoint import Checkpoint
from trt_wan.runtime.weights.stored import Stored

SEED = 0
E4M3_DEVIATION = 100.0  # normal numbers scaled so that a channel's largest is 448
BF16 = "bf16; norms, modulation and time embedding float32, as from_pretrained leaves them"
COMPILATION = (
    "blocks and face adapters by torch.compile(fullgraph=True, dynamic=False), backend inductor; "
    "embeddings, motion encoder and head eager"
)
READERS = 8  # threads
PLAIN = {
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
}
BLUR = (1.0, 3.0, 3.0, 1.0)  # a buffer of the motion encoder's halving convolutions, not a parameter

# The first backend that accepts a call's shapes computes it.
ATTENTION_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


Model = Any  # WanAnimateTransformer3DModel: diffusers has no types to check against


def make_model(
    shape: Shape, device: str, weights: Path | None = None, kind: torch.dtype = torch.bfloat16
) -> Model:
    """`weights` is a checkpoint of the transformer in any layout that ours reads; None: random weights."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NotRun("torch sees no CUDA GPU")
    c = shape.config.transformer
    with torch.device("meta"):
        model = WanAnimateTransformer3DModel(**diffusers_arguments(shape.config))
    exact = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else kind)
    if weights is None:
        model.to_empty(device=device)
        fill(model)
    else:
        load(model, shape, weights, device)
    rope = WanRotaryPosEmbed(c.head_dim, model.config.patch_size, model.config.rope_max_seq_len)
    model.rope = rope.to(device)
    row = torch.tensor(BLUR, device=device)
    for module in model.modules():
        if getattr(module, "blur", False):
            module.blur_kernel = torch.outer(row, row) / row.sum() ** 2
    return model.eval().requires_grad_(False)


def compile_blocks(model: Model) -> None:
    """Regional compilation, as diffusers documents it, and the face adapters as well."""
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    for adapter in model.face_adapter:
        adapter.compile(fullgraph=True, dynamic=False)


def fill(model: torch.nn.Module) -> None:
    """Random parameters that keep activations near unit variance, FP8 values times their scale as well."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(SEED)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "fp8" in n)]
    for name, tensor in tensors:
        data = tensor.data
        if data.dtype == torch.float8_e4m3fn:
            for rows in torch.split(data, 4096):
                values = torch.randn(rows.shape, device=device, generator=generator) * E4M3_DEVIATION
                rows.copy_(values.clamp_(-448, 448))
        elif name.endswith("fp8_scale"):  # one per output channel of a weight [out, in]
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            data.fill_(1 / math.sqrt(layer.in_features) / E4M3_DEVIATION)
        elif name.endswith(".weight") and tensor.ndim == 1:  # a norm
            data.normal_(1, 0.1, generator=generator)
        elif name.startswith("motion_encoder."):  # divides by the root of the fan-in itself
            data.normal_(0, 1, generator=generator)
        else:
            inner = max(1, math.prod(tensor.shape[1:]))
            data.normal_(0, 0.1 if tensor.ndim == 1 else 1 / math.sqrt(inner), generator=generator)


def load(model: Model, shape: Shape, path: Path, device: str) -> None:
    """Gives the parameters the tensors of a checkpoint: diffusers' own converter takes the official names."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    converted = convert_wan_transformer_to_diffusers(
        stored_tensors(path, shape.config, "transformer", device)
    )
    tensors = {name: tensor.to(kinds.get(name)) for name, tensor in converted.items()}
    model.load_state_dict(tensors, strict=True, assign=True)


def stored_tensors(
    path: Path, config: ModelConfig, part: Part, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """A part's tensors by their official names, from a file in any layout that ours reads.

    For a GPU several threads read into page-locked memory, from which copies to the device go on beside.
    """
    checkpoint, required = Checkpoint(path, part), required_tensors(config, part)
    checkpoint.require(required)
    with ThreadPoolExecutor(READERS) as threads:
        tensors = threads.map(lambda name: _tensor(checkpoint.stored(name), device), required)
        return dict(zip(required, tensors, strict=True))


def _tensor(stored: Stored, device: str) -> torch.Tensor:
    """The plain numbers of the file as they are, others in float32."""
    plain = stored.scales is None and not stored.rotation and not stored.blocks and stored.delta is None
    if not plain or stored.dtype not in PLAIN:
        return torch.from_numpy(stored.float32()).to(device)
    size = stored.nbytes(math.prod(stored.shape))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")
    stored.read(0, host.numpy())
    return host.view(PLAIN[stored.dtype]).reshape(stored.shape).to(device, non_blocking=True)


def make_inputs(shape: Shape, device: str) -> dict[str, Any]:
    """Returns the arguments of one call: a batch of one."""
    config, plan = shape.config, shape.plan
    c = config.transformer
    grid = (plan.latent_height, plan.latent_width)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    torch.manual_seed(SEED)
    return {
        "hidden_states": noise(1, c.latent_channels + c.condition_channels, plan.slots, *grid),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": noise(1, config.text.length, config.text.dim),
        "encoder_hidden_states_image": noise(1, config.image.tokens, config.image.dim),
        "pose_hidden_states": noise(1, c.latent_channels, plan.latent_frames, *grid),
        "face_pixel_values": noise(1, 3, plan.frames, config.motion.size, config.motion.size),
    }


class DiffusersPeer:
    """A model as a peer. `wanted` are its attention kernels, best first."""

    def __init__(
        self,
        model: Model,
        shape: Shape,
        device: str,
        settings: dict[str, str],
        wanted: list[SDPBackend] | None = None,
    ) -> None:
        self.model, self.shape, self.device = model, shape, device
        self.wanted = wanted or ATTENTION_ORDER
        self.inputs = make_inputs(shape, device)
        self.settings = settings | common_settings(shape, device)
        self._sizes: dict[str, int] = {}
        if device == "cuda":  # making the weights takes more than running them
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> torch.Tensor:
        velocity: torch.Tensor = self.model(**self.inputs, return_dict=False)[0]
        return velocity

    def warm_up(self) -> float:
        start = time.perf_counter()  # the host compiles: no event would see all of it
        self.timed(1)
        first = time.perf_counter() - start
        self.timed(WARM_UP - 1)
        return first

    def timed(self, steps: int) -> list[float]:
        with torch.inference_mode(), self._attention():
            return time_calls(self.step, steps, self.device)

    def memory(self) -> dict[str, int]:
        if self.device != "cuda":
            return {}
        return {
            "peak allocated": torch.cuda.max_memory_allocated(),
            "peak reserved": torch.cuda.max_memory_reserved(),
        }

    def parts(self) -> dict[str, float]:
        """Times the parts that diffusers recomputes in every step without need, and one self-attention."""
        faces = self.inputs["face_pixel_values"][0].transpose(0, 1)
        batch = self.model.config.motion_encoder_batch_size

        def encode_faces() -> None:
            motion = torch.cat([self.model.motion_encoder(part) for part in faces.split(batch)])
            self.model.face_encoder(motion[None])

        c = self.shape.config.transformer
        heads = (1, c.heads, self.shape.plan.tokens, c.head_dim)
        q, k, v = (torch.randn(heads, device=self.device, dtype=torch.bfloat16) for _ in range(3))
        attend = torch.nn.functional.scaled_dot_product_attention
        with torch.inference_mode(), self._attention():
            return {
                "face encoding, in every step": sorted(time_calls(encode_faces, 3, self.device))[1],
                "PyTorch's attention, one call": sorted(time_calls(lambda: attend(q, k, v), 3, self.device))[
                    1
                ],
            }

    def rest(self) -> None:
        for name, tensor in self._tensors():
            self._sizes[name] = tensor.untyped_storage().size()
            tensor.untyped_storage().resize_(0)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        for name, tensor in self._tensors():
            tensor.untyped_storage().resize_(self._sizes[name])
        fill(self.model)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights; `fill` makes them again."""
        yield from self.model.named_parameters()
        yield from ((n, b) for n, b in self.model.named_buffers() if "fp8" in n)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        if self.device != "cuda":
            return contextlib.nullcontext()
        return sdpa_kernel(self.wanted, set_priority=True)


def common_settings(shape: Shape, device: str) -> dict[str, str]:
    tokens, slots = shape.plan.tokens, shape.plan.slots
    settings = {
        "library": f"diffusers {version('diffusers')}, torch {torch.__version__}",
        "class": "WanAnimateTransformer3DModel, one forward per step, batch 1, no guidance",
        "shape": f"{shape.title}, {slots} latent slots, {tokens} tokens",
        "weights": "random, normal, made on the device",
        "not in the step": "sampler, VAE, text and image encoders",
        "in the step": "patch, time, text, image and pose embeddings, motion and face encoder, blocks, head",
        "offloading": "none",
        "CUDA graphs": "none",
    }
    if device == "cuda":
        cudnn: Any = torch.backends.cudnn  # untyped
        settings["GPU"] = torch.cuda.get_device_name()
        settings["CUDA, cuDNN"] = f"{torch.version.cuda}, {cudnn.version()}"
    return settings


def attention_setting(shape: Shape, device: str) -> str:
    """Returns the kernel PyTorch takes for the self-attention if cuDNN's comes first."""
    if device != "cuda":
        return "PyTorch's for the CPU"
    c = shape.config.transformer
    heads = torch.empty(1, c.heads, shape.plan.tokens, c.head_dim, device=device, dtype=torch.bfloat16)
    asked = torch.backends.cuda.SDPAParams(heads, heads, heads, None, 0.0, False, False)
    if torch.backends.cuda.can_use_cudnn_attention(asked):
        return "cuDNN, bf16"
    return "not cuDNN, which refuses the shape: the next of FlashAttention-2, memory-efficient, math"


def time_calls(call: Callable[[], Any], count: int, device: str) -> list[float]:
    """Seconds between the ends of consecutive calls, by events on a GPU: gaps are counted with the call."""
    if device != "cuda":
        ends = [time.perf_counter()]
        for _ in range(count):
            call()
            ends.append(time.perf_counter())
        return [after - before for before, after in zip(ends, ends[1:], strict=False)]
    event_type: Any = torch.cuda.Event  # untyped
    events = [event_type(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]
