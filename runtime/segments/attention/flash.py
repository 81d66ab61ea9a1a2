"""FlashAttention-4, in CuTe DSL. It takes torch tensors: no other module of the runtime imports torch.

torch views our memory without copies: q, k and v are strided views, and the output is written in place. The
kernel is compiled when the segment is made and does not depend on the number of tokens.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from flash_attn.cute.interface import _flash_attn_fwd  # the public function has no `out`

from trt_wan.errors import EnvironmentBroken, with_commands
from trt_wan.runtime.device.gpu import Gpu

WARM_UP_TOKENS = 1024


class Flash4:
    scratch_bytes = 1

    def __init__(self, gpu: Gpu, heads: int, tokens: int, head_dim: int) -> None:
        if not torch.cuda.is_available():
            raise EnvironmentBroken(
                f"flash4 needs a PyTorch with CUDA, and {torch.__version__} has none.",
                with_commands("Run:", "pip install --index-url https://download.pytorch.org/whl/cu130 torch"),
            )
        self._shape = heads, tokens, head_dim
        self._device = torch.device("cuda", gpu.device.device_id)
        self._stream = torch.cuda.ExternalStream(gpu.handle, self._device)  # type: ignore[no-untyped-call]
        self._compile(heads, min(tokens, WARM_UP_TOKENS), head_dim)

    def start(self, scratch: int) -> None:
        pass

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        heads, tokens, head_dim = self._shape
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            q, k, v = (self._view(addresses[name], (heads, tokens, head_dim)) for name in ("q", "k", "v"))
            self._attend(q, k, v, self._view(addresses["attended"], (tokens, heads, head_dim)))

    def settle(self) -> None:
        pass

    def _view(self, address: int, shape: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(_Memory(address, shape), device=self._device).view(torch.bfloat16)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        _flash_attn_fwd(q, k, v, softmax_scale=1.0, out=out.unsqueeze(0))

    def _compile(self, heads: int, tokens: int, head_dim: int) -> None:
        """Runs it once on few tokens: only a run compiles and loads the kernel."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CUTLASS warns of an argument type of FlashAttention
            x = torch.zeros(heads, tokens, head_dim, dtype=torch.bfloat16, device=self._device)
            self._attend(x, x, x, torch.empty_like(x).view(tokens, heads, head_dim))
            self._stream.synchronize()
            del x
            torch.cuda.empty_cache()


class _Memory:
    """Device memory for torch.as_tensor. The protocol has no bf16, so it says 16-bit integers."""

    def __init__(self, address: int, shape: Sequence[int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": tuple(shape),
            "typestr": "<i2",
            "version": 3,
        }
