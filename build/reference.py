"""The reference for candidates: the network in float32, for a sample of its tokens.

Every other part of a block acts on each token by itself, so a small fp32 graph that takes just the sample
computes it, on ONNX Runtime on the CPU. A fuser also knows each token's slot: its sample has a few slots.
Self-attention is numpy: the sampled queries against all keys, or against the blocks of keys that block-sparse
attention keeps. The VAE has no tokens: its reference is of a whole small picture, by torch on the CPU.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_wan.build.realistic import Float, Host, dequantised
from trt_wan.engines.config import ModelConfig
from trt_wan.engines.contract import Tensor
from trt_wan.engines.contracts import networks
from trt_wan.engines.contracts.sparse_attention import BLOCK, QUERIES, block_order
from trt_wan.engines.shape import Plan, VaeTile
from trt_wan.errors import UsageError, with_commands
from trt_wan.install import install_command

SMALL = Plan(64, 64, 9, "fp32")
SAMPLE = SMALL.tokens  # 64
# The VAE's networks alone, at a size whose fp32 reference takes the CPU seconds: 0.14 TFLOP a chunk.
SMALL_PICTURE = VaeTile(64, 64, 9, "fp32", whole=(64, 64))
Tokens = NDArray[np.int64]

BY_TOKENS = ("x", "attended", "rope_cos", "rope_sin", "x_out", "cross_q", "cross_attended")
TOKEN_AXIS = dict.fromkeys(BY_TOKENS, 0) | {"q": 1, "k": 1, "v": 1}
# A residual stream's outliers would hide a wrong result, so the difference from the stream is compared.
ADDED_TO = {"x_out": "x"}


def sample_of(name: str, plan: Plan, seed: int) -> Tokens:
    """SAMPLE tokens at random. A fuser's are laid out like SMALL's: equally many of each of a few slots."""
    rng = np.random.default_rng(seed)
    if name != "fuser":
        return rng.choice(plan.tokens, SAMPLE, replace=plan.tokens < SAMPLE)
    slots = rng.choice(plan.slots, SMALL.slots, replace=plan.slots < SMALL.slots)
    count, wanted = plan.tokens_per_slot, SMALL.tokens_per_slot
    within = rng.choice(count, wanted, replace=count < wanted)
    return (slots[:, None] * plan.tokens_per_slot + within).reshape(-1)


def sampled(name: str, array: Host, tokens: Tokens) -> Host:
    return np.take(array, tokens, axis=TOKEN_AXIS[name])


def reference(
    name: str, model: ModelConfig, values: dict[str, Host], tokens: Tokens, plan: Plan = SMALL
) -> dict[str, Float]:
    """The outputs of network `name` at `tokens` (SAMPLE of them) by name, from all its inputs and weights.
    Block-sparse attention depends on the shape of `plan`.
    """
    if name == "sparse_attention":
        return sparse_reference(values, tokens, plan)
    compute = attention_reference if name in ("attention", "uni3c_attention") else graph_reference
    return compute(name, model, values, tokens)


def attention_reference(
    name: str, model: ModelConfig, values: dict[str, Host], tokens: Tokens
) -> dict[str, Float]:
    heads = []
    for q, k, v in zip(values["q"], values["k"], values["v"], strict=True):
        logits = q[tokens].astype(np.float32) @ k.astype(np.float32).T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        heads.append(weights @ v.astype(np.float32) / weights.sum(axis=1, keepdims=True))
    return {"attended": np.concatenate(heads, axis=1)}


def sparse_reference(values: dict[str, Host], tokens: Tokens, plan: Plan) -> dict[str, Float]:
    """Attention to the blocks that the contract keeps, and to the means of the others."""
    order, first, heads = block_order(plan), plan.tokens_per_slot, []
    tokens = order.argsort()[tokens]  # their places in the blocks
    rows = tokens // QUERIES
    for q, k, v in zip(*(values[name][:, order].astype(np.float32) for name in "qkv"), strict=True):
        means = [
            np.stack([x[at : at + size].mean(axis=0) for at in range(0, len(x), size)])
            for x, size in ((q, QUERIES), (k, BLOCK), (v, BLOCK))
        ]
        scores = means[0][rows] @ means[1].T
        numbers, start = np.arange(scores.shape[1]), QUERIES * rows[:, None]
        own = (BLOCK * numbers < start + QUERIES) & (start < BLOCK * (numbers + 1))
        always = (numbers < -(-first // BLOCK)) | (numbers == len(numbers) - 1) | own
        wanted = np.maximum(np.rint(values["keep"] * np.float32(len(numbers))), always.sum(axis=1))
        places = np.argsort(np.where(always, -np.inf, -scores), axis=1, kind="stable").argsort(axis=1)
        kept = places < wanted[:, None]
        inside = np.repeat(kept, BLOCK, axis=1)[:, : len(k)]
        skipped = np.where(kept, -np.inf, q[tokens] @ means[1].T + np.log(np.float32(BLOCK)))
        logits = np.concatenate([np.where(inside, q[tokens] @ k.T, -np.inf), skipped], axis=1)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        attended = weights @ np.concatenate([v, means[2]])
        heads.append(attended / weights.sum(axis=1, keepdims=True))
    return {"attended": np.concatenate(heads, axis=1)}


def graph_reference(
    name: str, model: ModelConfig, values: dict[str, Host], tokens: Tokens
) -> dict[str, Float]:
    """UsageError without torch, which exports the graph."""
    assert len(tokens) == SAMPLE, f"{len(tokens)} tokens, the graph takes {SAMPLE}"
    network = networks(model, SMALL)[name]
    given = {tensor.name: dequantised(tensor.name, values) for tensor in network.inputs + network.weights}
    feeds = {n: sampled(n, array, tokens) if n in TOKEN_AXIS else array for n, array in given.items()}
    if "face_k" in given:
        slots = tokens[:: SMALL.tokens_per_slot] * len(given["face_k"]) // len(given["x"])
        feeds |= {n: given[n][slots] for n in ("face_k", "face_v")}
    outputs = [tensor.name for tensor in network.outputs]
    with TemporaryDirectory() as folder:
        session = _session(name, model, Path(folder) / f"{name}.onnx")
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def picture_reference(name: str, model: ModelConfig, plan: Plan, values: dict[str, Host]) -> dict[str, Float]:
    """The outputs of network `name` of the VAE by name. UsageError without torch."""
    exact = replace(plan, precision="fp32")
    network = networks(model, exact)[name]
    try:
        import torch

        from trt_wan.build.models import GRAPHS
    except ImportError as error:
        raise _lacking(error) from error

    def tensors(contract: tuple[Tensor, ...]) -> dict[str, Any]:
        return {t.name: torch.from_numpy(dequantised(t.name, values)) for t in contract}

    with torch.no_grad():
        given, weights = tensors(network.inputs), tensors(network.weights)
        made = GRAPHS[name](*given.values(), w=weights, model=model, plan=exact)
    return {t.name: output.numpy() for t, output in zip(network.outputs, made, strict=True)}


def picture_error(output: dict[str, Host], wanted: dict[str, Float]) -> float:
    """The worst output's error; infinite if any number is not finite. Some caches hold zeros alone."""
    errors = []
    for name, want in wanted.items():
        size = float(np.linalg.norm(want))
        errors.append(float(np.linalg.norm(output[name].astype(np.float32) - want)) / (size or 1.0))
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _lacking(error: ImportError) -> UsageError:
    return UsageError(
        f"Measuring needs packages that export its reference and are not here ({error}).",
        with_commands("Leave measuring out with --no-measure, or run:", install_command("build")),
    )


def _session(name: str, model: ModelConfig, path: Path) -> Any:
    import onnxruntime as ort

    try:
        from trt_wan.build.export import export

        export(networks(model, SMALL)[name], model, SMALL, path)
    except ImportError as error:  # torch imports onnxscript only when it exports
        raise _lacking(error) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def relative_error(
    output: dict[str, Host], wanted: dict[str, Float], values: dict[str, Host], tokens: Tokens
) -> float:
    """The worst output's error over the sample; infinite if any number of a whole output is not finite."""
    errors = []
    for name, whole in output.items():
        if not np.isfinite(whole).all():
            return float("inf")
        got, want = sampled(name, whole, tokens).astype(np.float32), wanted[name]
        if name in ADDED_TO:
            before = sampled(ADDED_TO[name], values[ADDED_TO[name]], tokens)
            got, want = got - before, want - before
        errors.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    return max(errors)
