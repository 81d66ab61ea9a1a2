"""A fuser without TensorRT: native kernels between two products, in bf16 like its weights or in FP8.

In FP8 each call quantises the weights, with a scale per output channel; that takes 1 % of the call. The
bf16 form rounds like the graph in build/models/face.py, except that q and the probabilities stay in float32.
"""

from collections.abc import Mapping

import numpy as np

from trt_wan.engines.config import ModelConfig
from trt_wan.engines.shape import Plan
from trt_wan.runtime.device.gpu import Gpu
from trt_wan.runtime.segments.native.block import Linear, Operands

PARTS_OF_SLOT = 4  # blocks of threads that share a slot's tokens, for each pair of heads
ATTENTION_THREADS = 128


class Fuser(Linear):
    operands: Operands = "bf16"

    def __init__(self, model: ModelConfig, plan: Plan, gpu: Gpu) -> None:
        super().__init__(model, plan, gpu)
        self._slots, self._tokens_of_slot = plan.slots, plan.tokens_per_slot

    def _parts(self) -> dict[str, int]:
        return super()._parts() | {"product": self.tokens * self.dim * 2}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        self._each_token("norm_tokens", a["x"], at["operand"])
        self._multiply(self._square, "operand", a["linear1_q.weight"], "product")
        self._attend(a, 0, 0, at["operand"])
        self._multiply(self._square, "operand", a["linear2.weight"], "product")
        self._add(a, 0, 0)

    def _attend(self, a: Mapping[str, int], token_scale: int, weight_scale: int, out: int) -> None:
        self._launch(
            "face_attention",
            (PARTS_OF_SLOT, self.heads // 2, self._slots),
            ATTENTION_THREADS,
            *(self._at["product"], token_scale, weight_scale, a["linear1_q.bias"], a["q_norm.weight"]),
            *(a["face_k"], a["face_v"], out, np.int32(self._tokens_of_slot)),
        )

    def _add(self, a: Mapping[str, int], token_scale: int, weight_scale: int) -> None:
        product = self._at["product"], token_scale, weight_scale, a["linear2.bias"]
        self._each_token("add_face", a["x"], *product, a["face_strength"], a["x_out"])


class Fp8Fuser(Fuser):
    operands = "fp8"

    def _parts(self) -> dict[str, int]:
        weight = {"weight": self.dim * self.dim, "weight_scale": self.dim * 4}
        return super()._parts() | weight | {"face": self.tokens * self.dim * 2}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        a, at = addresses, self._at
        scales = at["scale"], at["weight_scale"]
        self._each_token("norm_quantize", a["x"], 0, 0, at["operand"], at["scale"])
        self._multiply_quantized(a["linear1_q.weight"])
        self._attend(a, *scales, at["face"])
        self._quantize(at["face"])
        self._multiply_quantized(a["linear2.weight"])
        self._add(a, *scales)

    def _multiply_quantized(self, weight: int) -> None:
        at = self._at
        rows = weight, at["weight"], at["weight_scale"]
        self._launch("quantize_tokens", self.dim, self._dim_threads, *rows)
        self._multiply(self._square, "operand", at["weight"], "product")
