"""cuDNN's attention in bf16 and in E4M3, through the graph API of nvidia-cudnn-frontend. No torch.

A graph is one attention of one shape. Its plan is built once: the first of cuDNN's heuristics that this GPU
supports, which is the same every time. The output's strides write [tokens, heads, head_dim].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_wan.engines.fp8 import E4M3_MAX
from trt_wan.engines.gpu import FP8_ATTENTION_RANGE
from trt_wan.errors import EnvironmentBroken
from trt_wan.runtime.device.arena import laid_out
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments import cudnn_library
from trt_wan.runtime.segments.attention.fp8_kernels import Fp8Kernels

SCALAR = (1, 1, 1, 1)


class Cudnn:
    """bf16 in and out."""

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        self._graph = AttentionGraph(gpu, heads, tokens, head_dim, "BFLOAT16")
        q, k, v = (self._graph.input(name) for name in ("q", "k", "v"))
        attended, _ = self._graph.graph.sdpa(q, k, v, attn_scale=1.0, generate_stats=False)
        self._graph.attended(attended)
        self._graph.build()
        self.scratch_bytes, self._scratch = self._graph.workspace_bytes, 0

    def start(self, scratch: int) -> None:
        self._scratch = scratch

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        self._graph.run({name: addresses[name] for name in ("q", "k", "v", "attended")}, self._scratch)

    def settle(self) -> None:
        pass


class CudnnFp8:
    """bf16 in and out, E4M3 between, with the constant scales of TensorRT's FP8 attention.

    On Hopper cuDNN can write the output of FP8 attention in FP8 only, so a separate pass widens it.
    """

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        self._kernels = Fp8Kernels(gpu, heads, tokens, head_dim)
        self._graph = AttentionGraph(gpu, heads, tokens, head_dim, "FP8_E4M3")
        q, k, v = (self._graph.input(name) for name in ("q", "k", "v"))

        # E4M3_MAX stands for these values. Softmax weights are at most 1, outputs are means of v.
        ranges = {
            "q": FP8_ATTENTION_RANGE * head_dim**-0.5,
            "k": FP8_ATTENTION_RANGE,
            "v": FP8_ATTENTION_RANGE,
        }
        self._factors = {name: E4M3_MAX / largest for name, largest in ranges.items()}
        scales = {
            "descale_q": 1 / self._factors["q"],
            "descale_k": 1 / self._factors["k"],
            "descale_v": 1 / self._factors["v"],
            "descale_s": 1 / E4M3_MAX,
            "scale_s": E4M3_MAX,
            "scale_o": self._factors["v"],
        }
        numbers = [*scales, "amax_s", "amax_o"]  # cuDNN writes the last two; nothing reads them
        self._numbers_buffer = gpu.allocate(4 * len(numbers))
        address = int(self._numbers_buffer.handle)
        gpu.write(gpu.view(address, (len(scales),), np.float32), np.array([*scales.values()], np.float32))
        self._numbers = {name: address + 4 * i for i, name in enumerate(numbers)}

        attended, _, *peaks = self._graph.graph.sdpa_fp8(
            q, k, v, *(self._graph.number(name) for name in scales), attn_scale=1.0, generate_stats=False
        )
        self._graph.attended(attended)
        for name, peak in zip(("amax_s", "amax_o"), peaks, strict=True):
            self._graph.number_out(name, peak)
        self._graph.build()

        values = heads * tokens * head_dim
        parts = {
            "workspace": self._graph.workspace_bytes,
            "partial": self._kernels.partial_bytes,
            "means": heads * head_dim * 4,
        }
        parts |= dict.fromkeys(("q", "k", "v", "attended"), values)
        self._offsets, self.scratch_bytes = laid_out(parts)
        self._parts: dict[str, int] = {}

    def start(self, scratch: int) -> None:
        self._parts = {name: scratch + offset for name, offset in self._offsets.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        parts = self._parts
        self._kernels.key_means(addresses["k"], parts["partial"], parts["means"])
        self._kernels.quantize(addresses["q"], parts["q"], self._factors["q"])
        self._kernels.quantize(addresses["k"], parts["k"], self._factors["k"], parts["means"])
        self._kernels.quantize(addresses["v"], parts["v"], self._factors["v"])
        quantised = {name: parts[name] for name in ("q", "k", "v", "attended")}
        self._graph.run(quantised | self._numbers, parts["workspace"])
        self._kernels.dequantize(parts["attended"], addresses["attended"], 1 / self._factors["v"])

    def settle(self) -> None:
        pass


class AttentionGraph:
    """A cuDNN graph on the Gpu's stream, with tensors by name. `io` is cuDNN's name of their type."""

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int, io: str) -> None:
        self._cudnn = cudnn = cudnn_library.load()
        self.shape = heads, tokens, head_dim
        self._io = getattr(cudnn.data_type, io)
        self._handle = cudnn_library.handle(gpu)
        self.graph = cudnn.pygraph(
            io_data_type=self._io,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )
        self._tensors: dict[str, Any] = {}

    def input(self, name: str) -> Any:
        """[heads, tokens, head_dim]."""
        heads, tokens, head_dim = self.shape
        stride = (heads * tokens * head_dim, tokens * head_dim, head_dim, 1)
        self._tensors[name] = self.graph.tensor(
            dim=(1, heads, tokens, head_dim), stride=stride, data_type=self._io, name=name
        )
        return self._tensors[name]

    def attended(self, tensor: Any) -> None:
        """Makes `tensor` the output, [tokens, heads, head_dim]."""
        heads, tokens, head_dim = self.shape
        tensor.set_output(True).set_dim([1, heads, tokens, head_dim]).set_data_type(self._io)
        tensor.set_stride([heads * tokens * head_dim, head_dim, heads * head_dim, 1])
        self._tensors["attended"] = tensor

    def number(self, name: str) -> Any:
        """One float32 in device memory."""
        self._tensors[name] = self.graph.tensor(
            dim=SCALAR, stride=SCALAR, data_type=self._cudnn.data_type.FLOAT, name=name
        )
        return self._tensors[name]

    def number_out(self, name: str, tensor: Any) -> None:
        tensor.set_output(True).set_dim(list(SCALAR)).set_stride(list(SCALAR))
        self._tensors[name] = tensor.set_data_type(self._cudnn.data_type.FLOAT)

    def build(self) -> None:
        """Raises EnvironmentBroken if cuDNN has no plan for it on this GPU."""
        # The frontend also offers this kernel, which CUTLASS would compile at run time.
        self.graph.deselect_engines(["sdpa_fwd_prefill"])
        try:
            self.graph.build([self._cudnn.heur_mode.A])
        except self._cudnn.cudnnGraphNotSupportedError as error:
            version = self._cudnn.backend_version_string()
            reason = " ".join(str(error).split())[:300]
            raise EnvironmentBroken(
                f"cuDNN {version} has no such attention for this GPU ({reason}).", "Choose another attention."
            ) from error

    @property
    def workspace_bytes(self) -> int:
        return max(1, int(self.graph.get_workspace_size()))

    def run(self, addresses: Mapping[str, int], workspace: int) -> None:
        bound = {self._tensors[name]: address for name, address in addresses.items()}
        self.graph.execute(bound, workspace, handle=self._handle)
