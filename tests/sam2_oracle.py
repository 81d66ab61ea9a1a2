"""SAM2 from transformers with the official weights' names, and our tracker on ONNX Runtime beside it."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from trt_wan.build.sam2 import export_sam2
from trt_wan.engines.contract import Network
from trt_wan.engines.sam2.config import Sam2Config, Sam2Plan
from trt_wan.preprocess.sam2.model import Sam2Model
from trt_wan.preprocess.sam2.weights import weights_of
from trt_wan.runtime.executors import Array
from trt_wan.runtime.executors.onnxruntime import BoundWeights, OnnxRuntimeExecutor

Values = NDArray[np.float32]

# Official name to transformers' name, applied in order (preprocess_spec.md B2).
RENAMES = (
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"(backbone\.blocks\.\d+)\.norm", r"\1.layer_norm"),
    (r"(backbone\.blocks\.\d+\.mlp)\.layers\.0", r"\1.proj_in"),
    (r"(backbone\.blocks\.\d+\.mlp)\.layers\.1", r"\1.proj_out"),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^(memory_attention\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^memory_attention\.norm", "memory_attention.layer_norm"),
    (r"out_proj", "o_proj"),
    (r"^memory_encoder\.o_proj", "memory_encoder.projection"),
    (r"^memory_encoder\.pix_feat_proj", "memory_encoder.feature_projection"),
    (r"mask_downsampler\.encoder\.12", "mask_downsampler.final_conv"),
    *((rf"mask_downsampler\.encoder\.{3 * i}\.", f"mask_downsampler.layers.{i}.conv.") for i in range(4)),
    *(
        (rf"mask_downsampler\.encoder\.{3 * i + 1}\.", f"mask_downsampler.layers.{i}.layer_norm.")
        for i in range(4)
    ),
    (r"memory_encoder\.fuser", "memory_encoder.memory_fuser"),
    (r"\.dwconv", ".depthwise_conv"),
    (r"(memory_fuser\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"\.pwconv", ".pointwise_conv"),
    (r"\.gamma", ".scale"),
    (r"^sam_prompt_encoder\.mask_downscaling\.0", "prompt_encoder.mask_embed.conv1"),
    (r"^sam_prompt_encoder\.mask_downscaling\.1", "prompt_encoder.mask_embed.layer_norm1"),
    (r"^sam_prompt_encoder\.mask_downscaling\.3", "prompt_encoder.mask_embed.conv2"),
    (r"^sam_prompt_encoder\.mask_downscaling\.4", "prompt_encoder.mask_embed.layer_norm2"),
    (r"^sam_prompt_encoder\.mask_downscaling\.6", "prompt_encoder.mask_embed.conv3"),
    (
        r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    (r"^sam_prompt_encoder", "prompt_encoder"),
    (r"^sam_mask_decoder", "mask_decoder"),
    (r"(mask_decoder\.transformer\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0", r"\1.proj_in"),
    (r"(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.1", r"\1.proj_out"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"^obj_ptr_proj", "object_pointer_proj"),
    *(
        (rf"({head})\.layers\.{i}\.", rf"\1.{to}.")
        for head in (r"hypernetworks_mlps\.\d", "iou_prediction_head", "obj_score_head", "pointer_proj")
        for i, to in ((0, "proj_in"), (1, "layers.0"), (2, "proj_out"))
    ),
    (r"^obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    (r"^maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed", "no_memory_embedding"),
    (r"^no_mem_pos_enc", "no_memory_positional_encoding"),
    (r"^no_obj_ptr", "no_object_pointer"),
    (r"^no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
)
POINTS = [f"sam_prompt_encoder.point_embeddings.{i}.weight" for i in range(4)]
FOURIER = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def transformers_names(weights: Mapping[str, Values]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in weights.items():
        if name in POINTS:
            continue
        for pattern, to in RENAMES:
            # `layers.1` of a head becomes `layers.0`, which must not be renamed again
            new = re.sub(pattern, to, name)
            name = new
        found[name] = torch.from_numpy(value.copy())
    found["prompt_encoder.point_embed.weight"] = torch.from_numpy(
        np.concatenate([weights[p] for p in POINTS])
    )
    found["shared_image_embedding.positional_embedding"] = torch.from_numpy(weights[FOURIER])
    return found


def transformers_model(c: Sam2Config, weights: Mapping[str, Values], assign: bool = False) -> Sam2VideoModel:
    dims = [c.stage_dim(i) for i in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": c.dim,
        "num_attention_heads": c.heads,
        "image_size": [c.image_size] * 2,
        "window_positional_embedding_background_size": [c.background] * 2,
        "blocks_per_stage": list(c.blocks),
        "embed_dim_per_stage": dims,
        "num_attention_heads_per_stage": [c.stage_heads(i) for i in range(4)],
        "window_size_per_stage": list(c.windows),
        "global_attention_blocks": list(c.global_blocks),
    }
    sizes = [[c.image_size // n] * 2 for n in (4, 8, 16)]
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": dims[::-1],
            "backbone_feature_sizes": sizes,
        },
        prompt_encoder_config={"image_size": c.image_size},
        image_size=c.image_size,
        memory_attention_rope_feat_sizes=[c.grid, c.grid],
        enable_occlusion_spatial_embedding=c.new,
        enable_temporal_pos_encoding_for_object_pointers=c.new,
    )
    model = Sam2VideoModel(config)
    model.load_state_dict(transformers_names(weights), strict=True, assign=assign)
    return model.eval().requires_grad_(False)


def session_of(pixels: Values) -> Sam2VideoInferenceSession:
    """Frames [n, 3, S, S], already normalised."""
    return Sam2VideoInferenceSession(
        video=torch.from_numpy(pixels),
        video_height=pixels.shape[2],
        video_width=pixels.shape[3],
        dtype=torch.float32,
    )


def prompt(session: Sam2VideoInferenceSession, frame: int, points: Values, labels: list[int]) -> None:
    index = session.obj_id_to_idx(1)
    coords = torch.from_numpy(points)[None, None]
    kinds = torch.tensor(labels, dtype=torch.int32)[None, None]
    session.add_point_inputs(index, frame, {"point_coords": coords, "point_labels": kinds})
    if 1 not in session.obj_with_new_inputs:
        session.obj_with_new_inputs.append(1)


class ExportingExecutor(OnnxRuntimeExecutor):
    """Exports a graph the first time it is run; remembers what it was given last."""

    def __init__(self, folder: Path, config: Sam2Config, weights: Mapping[str, Array]) -> None:
        super().__init__(folder, BoundWeights({"sam2": weights}))
        self.config, self.last = config, dict[str, Array]()

    def run(self, network: Network, n: int, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        path = self.graphs / f"{network.name}.onnx"
        if not path.exists():
            export_sam2(network, self.config, path)
        self.last = dict(inputs)
        return super().run(network, n, inputs)


def our_model(config: Sam2Config, weights: Mapping[str, Values], folder: Path, plan: Sam2Plan) -> Sam2Model:
    ours = weights_of(config, weights)
    return Sam2Model(config, plan, ExportingExecutor(folder, config, ours), ours)
