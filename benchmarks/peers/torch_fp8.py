"""Linear layers in row-wise FP8 on torch._scaled_mm, in the place of torch.nn.Linear."""

import torch

from trt_wan.benchmarks.peers.diffusers_model import Model
from trt_wan.engines.fp8 import E4M3_MAX


class Fp8Linear(torch.nn.Module):
    """[..., in] to [..., out] in bf16. The weight is E4M3 [out, in] with a scale per output channel."""

    fp8_weight: torch.Tensor
    fp8_scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        self.register_buffer("fp8_weight", torch.empty_like(weight, dtype=torch.float8_e4m3fn))
        self.register_buffer("fp8_scale", weight.new_empty(1, self.out_features, dtype=torch.float32))
        self.bias = linear.bias

    def load(self, weight: torch.Tensor) -> None:
        """Quantises `weight` [out, in]."""
        scale = weight.float().abs().amax(1).clamp_min(1e-10) / E4M3_MAX
        self.fp8_scale.copy_(scale[None])
        self.fp8_weight.copy_((weight.float() / scale[:, None]).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        scale = tokens.abs().amax(-1, keepdim=True).float().clamp_min(1e-10) / E4M3_MAX
        values = (tokens.float() / scale).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            values,
            self.fp8_weight.t(),
            scale_a=scale,
            scale_b=self.fp8_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.reshape(*x.shape[:-1], self.out_features)


def quantize_blocks(model: Model) -> None:
    """Every linear layer of the blocks and face adapters; each bf16 weight goes as soon as it is done."""
    for root in (model.blocks, model.face_adapter):
        for name, module in list(root.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, child = name.rpartition(".")
                quantized = Fp8Linear(module)
                quantized.load(module.weight.detach())
                root.get_submodule(parent).register_module(child, quantized)
