"""The whole pipeline, from files to frames, against diffusers' WanAnimatePipeline with the same weights and
noise.

Both read the same checkpoint files' values and the same decoded clips; diffusers gets transformers' own umT5
and CLIP. Its picture processor alone is replaced: diffusers shows CLIP the original picture, cropped, where
the official code shows the letter-boxed one, squashed (model_spec.md 2.5), and we follow the official code.

TOLERANCE is on frames in [-1, 1]: two fp32 implementations differ by 1e-5 in a velocity; the steps and the
VAE, whose output here spans the whole range, carry that to about 1e-4, and later windows start from earlier
ones' frames. Half a level of an 8-bit picture is 4e-3.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanAnimatePipeline
from oracles import (
    diffusers_transformer,
    diffusers_vae,
    transformers_image_encoder,
    transformers_text_encoder,
)
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast

from trt_wan.engines.checkpoint import required_tensors
from trt_wan.engines.config import TINY
from trt_wan.runtime.executors import Array
from trt_wan.runtime.guidance import ClipVision, Nag, per_step
from trt_wan.runtime.job import Inputs, Job
from trt_wan.runtime.networks.image_encoder import MEAN, STD
from trt_wan.runtime.opening.model import OpenModel, open_model
from trt_wan.runtime.prompts import DEFAULT_PROMPT
from trt_wan.runtime.settings import Settings, WeightFiles
from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.video.writer import VideoWriter
from trt_wan.runtime.weights.load import load_weights
from trt_wan.runtime.weights.tiny import write_tiny_weights

TOLERANCE = 1e-4
WIDTH, HEIGHT, WINDOW, STEPS = 64, 48, 13, 3
FRAMES = {(1, 1): 13, (3, 1): 30, (1, 5): 9, (3, 5): 27}  # by (windows, overlap); most need padding
LONGEST = max(FRAMES.values())


class SquashedReference:
    """In place of CLIPImageProcessor: the official squash to 224x224, by torch."""

    def __call__(self, images: Image.Image, return_tensors: str) -> BatchFeature:
        pixels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float() / 127.5 - 1
        size = (TINY.image.size, TINY.image.size)
        small = torch.nn.functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
        values = (small * 0.5 + 0.5 - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
        return BatchFeature({"pixel_values": values.float()})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_weights(folder, seed=5)
    return folder


@pytest.fixture(autouse=True)
def graphs(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_WAN_HOME", str(tiny_home))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of prepared clips by length: moving blobs, the reference at the canvas' size."""
    folders = {}
    for frames in FRAMES.values():
        folder = folders[frames] = tmp_path_factory.mktemp(f"clips{frames}")
        rng = np.random.default_rng(3)
        cv2.imwrite(str(folder / "src_ref.png"), rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
        for name, (w, h) in {
            "src_pose": (WIDTH, HEIGHT),
            "src_bg": (WIDTH, HEIGHT),
            "src_mask": (WIDTH, HEIGHT),
            "src_face": (512, 512),
        }.items():
            with VideoWriter(folder / f"{name}.mp4", w, h, Fraction(12)) as writer:
                start = rng.integers(0, w // 2, 2)
                for k in range(frames):
                    frame = np.zeros((h, w, 3), np.uint8)
                    centre = tuple(int(v) for v in (start + k * w / 60))
                    colour = (
                        (255, 255, 255) if name == "src_mask" else tuple(rng.integers(60, 255, 3).tolist())
                    )
                    cv2.circle(frame, centre, w // 4, colour, -1)
                    writer.write(frame)
                writer.finish()
    return folders


@pytest.fixture(scope="module")
def diffusers_pipeline(weights: Path) -> WanAnimatePipeline:
    _, checkpoints = load_weights([weights], {})
    tensors = {
        part: {name: checkpoint[name] for name in required_tensors(TINY, part)}
        for part, checkpoint in checkpoints.items()
    }
    pipeline = WanAnimatePipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(weights / "tokenizer.json"),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
        text_encoder=transformers_text_encoder(TINY, tensors["text_encoder"]),
        vae=diffusers_vae(TINY, tensors["vae"]),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        image_processor=SquashedReference(),
        image_encoder=transformers_image_encoder(TINY, tensors["image_encoder"]),
        transformer=diffusers_transformer(TINY, tensors["transformer"]),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def job(folder: Path, **changes: object) -> Job:
    mode = changes.get("mode", "animate")
    settings = {"window": WINDOW, "steps": STEPS, "grid": "diffusers", "seed": 11} | changes
    return Job(inputs=Inputs.from_folder(folder, mode), **settings)  # type: ignore[arg-type]


class Changing:
    """diffusers' callback after every step: sets the guidance of the next step, and after the last one of a
    segment the prompts of the next.
    """

    def __init__(self, pipeline: WanAnimatePipeline, task: Job) -> None:
        self.pipeline, self.schedule, self.segment = pipeline, per_step(task.guidance, STEPS), 0
        self.prompts, self.negatives = (
            [text.strip() for text in prompt.split("|")] for prompt in (task.prompt, task.negative_prompt)
        )

    def __call__(self, pipeline: WanAnimatePipeline, i: int, t: object, given: object) -> dict[str, object]:
        pipeline._guidance_scale = self.schedule[(i + 1) % STEPS]
        if i + 1 < STEPS:
            return {}
        self.segment += 1
        texts = (texts[min(self.segment, len(texts) - 1)] for texts in (self.prompts, self.negatives))
        guided = max(self.schedule) > 1
        embeds = pipeline.encode_prompt(next(texts), next(texts), guided, max_sequence_length=512)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))


class NagProcessor:
    """Cross-attention of diffusers with NAG, as addons_spec.md 3 writes it."""

    def __init__(self, nag: Nag, tokens: torch.Tensor) -> None:
        self.nag, self.tokens = nag, tokens

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        image, text = encoder_hidden_states[:, :-512], encoder_hidden_states[:, -512:]
        q = attn.norm_q(attn.to_q(hidden_states))

        def attended(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

        s, tau, alpha = self.nag.scale, self.nag.tau, self.nag.alpha
        zp, zn = (attended(attn.norm_k(attn.to_k(x)), attn.to_v(x)) for x in (text, self.tokens))
        g = s * zp - (s - 1) * zn
        norm_g, norm_p = (x.abs().sum(-1, keepdim=True) for x in (g, zp))
        g = torch.where(norm_g / norm_p > tau, g * tau * norm_p / (norm_g + 1e-7), g)
        shown = attended(attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))
        return attn.to_out[1](attn.to_out[0](alpha * g + (1 - alpha) * zp + shown))


def run_diffusers(pipeline: WanAnimatePipeline, task: Job) -> Array:
    def pictures(path: Path | None) -> list[Image.Image] | None:
        if path is None:
            return None
        clip = Clip(path, history=LONGEST)
        return [Image.fromarray(frame) for frame in clip.window(range(clip.frames))]

    mask = pictures(task.inputs.mask)
    schedule, changing = per_step(task.guidance, STEPS), Changing(pipeline, task)
    result = pipeline(
        image=Image.open(task.inputs.reference),
        pose_video=pictures(task.inputs.pose),
        face_video=pictures(task.inputs.face),
        background_video=pictures(task.inputs.background),
        # We make masks hard, so theirs must be: codec noise in a mask is 1e-3 in a frame.
        mask_video=[frame.getchannel(0).point(lambda level: 255 * (level >= 128)) for frame in mask]
        if mask
        else None,
        prompt=changing.prompts[0],
        negative_prompt=changing.negatives[0],
        callback_on_step_end=changing,
        height=HEIGHT,
        width=WIDTH,
        segment_frame_length=WINDOW,
        num_inference_steps=STEPS,
        mode=task.mode,
        prev_segment_conditioning_frames=task.overlap,
        guidance_scale=schedule[0],
        generator=torch.Generator("cpu").manual_seed(task.seed),
        output_type="pt",
    ).frames[0]
    return result.permute(1, 0, 2, 3).numpy() * 2 - 1


@pytest.fixture(scope="module")
def model(weights: Path) -> Iterator[OpenModel]:
    """One model for all jobs."""
    with open_model(WeightFiles((weights,)), Settings(executor="onnxruntime", text_cache=False)) as opened:
        yield opened


# Every value of a setting comes in one of these; all sixteen with the marker `long`.
IN_CI = {("animate", 1, 1, 1.0), ("replace", 3, 5, 2.0)}


@pytest.mark.parametrize(
    ("mode", "windows", "overlap", "guidance"),
    [
        pytest.param(*case, marks=() if case in IN_CI else pytest.mark.long)
        for case in product(("animate", "replace"), (1, 3), (1, 5), (1.0, 2.0))
    ],
)
def test_frames_equal_diffusers(
    diffusers_pipeline: WanAnimatePipeline,
    model: OpenModel,
    clips: dict[int, Path],
    mode: str,
    windows: int,
    overlap: int,
    guidance: float,
) -> None:
    frames = FRAMES[windows, overlap]
    task = job(clips[frames], mode=mode, overlap=overlap, guidance=guidance)
    pieces = list(model.pieces(task))
    # Each piece is 4 frames or what of them the output keeps; the first of a window is one.
    assert {piece.shape[1] for piece in pieces} <= {1, 2, 3, 4} and len(pieces) >= frames / 4
    ours, theirs = np.concatenate(pieces, axis=1).clip(-1, 1), run_diffusers(diffusers_pipeline, task)
    require_same(ours, theirs, frames)


def require_same(ours: Array, theirs: Array, frames: int) -> None:
    assert ours.shape == theirs.shape == (3, frames, HEIGHT, WIDTH)
    assert theirs.std() > 0.05 and np.abs(theirs).mean() < 0.95, "the oracle's frames are degenerate"
    assert np.abs(ours - theirs).max() <= TOLERANCE


def frames_of(model: OpenModel, task: Job) -> Array:
    return np.concatenate(list(model.pieces(task)), axis=1).clip(-1, 1)


def test_guidance_by_step_and_prompts_that_travel(
    diffusers_pipeline: WanAnimatePipeline, model: OpenModel, clips: dict[int, Path]
) -> None:
    """diffusers scales by the first value in every step that it guides."""
    travel = {"prompt": "he walks | he sits | he dances", "negative_prompt": "blurred | dark"}
    task = job(clips[30], guidance=(3.0, 1.0, 3.0), **travel)
    ours = frames_of(model, task)
    require_same(ours, run_diffusers(diffusers_pipeline, task), 30)
    other = frames_of(model, replace(task, prompt="he walks | he sits | he sits"))
    np.testing.assert_array_equal(other[:, :25], ours[:, :25])
    assert np.abs(other - ours)[:, 25:].max() > 100 * TOLERANCE


def test_nag(diffusers_pipeline: WanAnimatePipeline, model: OpenModel, clips: dict[int, Path]) -> None:
    transformer = diffusers_pipeline.transformer
    task = job(clips[13], nag=Nag("blurred", scale=4, tau=1.5, alpha=0.5))
    with torch.no_grad():
        features, _ = diffusers_pipeline.encode_prompt(
            "blurred", do_classifier_free_guidance=False, max_sequence_length=512
        )
        tokens = transformer.condition_embedder.text_embedder(features)
    before = [block.attn2.processor for block in transformer.blocks]
    for block in transformer.blocks:
        block.attn2.processor = NagProcessor(task.nag, tokens)
    theirs = run_diffusers(diffusers_pipeline, task)
    for block, processor in zip(transformer.blocks, before, strict=True):
        block.attn2.processor = processor
    ours = frames_of(model, task)
    require_same(ours, theirs, 13)
    plain = frames_of(model, replace(task, nag=None))
    assert np.abs(plain - ours).max() > 100 * TOLERANCE
    same = frames_of(model, replace(task, nag=Nag("blurred", scale=1)))
    np.testing.assert_allclose(same, plain, atol=TOLERANCE)


def test_no_clip_picture_an_empty_prompt_and_no_face(
    diffusers_pipeline: WanAnimatePipeline,
    model: OpenModel,
    clips: dict[int, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = TINY.image
    zeros = torch.zeros(1, image.tokens, image.dim)
    monkeypatch.setattr(diffusers_pipeline, "encode_image", lambda picture, device: zeros)
    task = job(clips[13], clip_vision=ClipVision(off=True), prompt="")
    ours = frames_of(model, task)
    require_same(ours, run_diffusers(diffusers_pipeline, task), 13)
    no_face = replace(task, face_strength=0)
    made = [ours, *(frames_of(model, other) for other in (no_face, replace(task, clip_vision=ClipVision())))]
    made.append(frames_of(model, replace(task, prompt=DEFAULT_PROMPT)))
    apart = [np.abs(a - b).max() for k, a in enumerate(made) for b in made[:k]]
    assert min(apart) > 100 * TOLERANCE, apart
    without = replace(no_face, inputs=replace(task.inputs, face=None), face_strength=1)
    np.testing.assert_array_equal(frames_of(model, without), made[1])
